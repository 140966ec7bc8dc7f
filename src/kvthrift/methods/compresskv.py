"""CompressKV (2508.02401): a few heads of each layer choose for all, and layers get room by measured error."""

from kvthrift.allocate import TableLayers, UniformLayers
from kvthrift.calibrate import load_named
from kvthrift.calibrate.retrieval import KIND, tables
from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe
from kvthrift.score import ChosenHeads


@published("compresskv", title="CompressKV", paper="2508.02401")
def compresskv(
    calibration: str = "smollm2",
    heads: int = 4,
    window: int = 8,
    kernel: int = 5,
    least: int = 32,
    most: float = 3.0,
    uniform: bool = False,
) -> Recipe:
    """Asks the query heads that find meaning, and keeps the same tokens in all KV heads of a layer.

    Layer budgets are fixed before a prompt is seen: ``least`` entries each, the rest by the error that eviction caused
    on calibration texts. A text shorter than a layer's budget fills it only so far. Heads and errors belong to one
    model; another is refused, by its config. As in the authors' code, a calibration step counts as often as its token
    occurs in the needle; calibration texts are none of an evaluation.

    Args:
        calibration: "smollm2", shipped for the embedded model, or a file from 'kvthrift calibrate compresskv'.
        heads: query heads of each layer that are asked, best first.
        window: newest queries that are asked, and entries that stay.
        kernel: neighbours that share a score (odd), by their mean.
        least: entries of every layer; budgets below it are the same for all layers.
        most: the most a layer may get, as a multiple of the mean.
        uniform: the same budget for every layer (the paper's ablation).
    """
    table = load_named(calibration, method="compresskv", kind=KIND)
    ranked, errors = tables(table)
    model = table.meta.model
    return Recipe(
        "compresskv",
        scorer=ChosenHeads(ranked, heads, window, "avg", kernel, model),
        layers=UniformLayers() if uniform else TableLayers(errors, least, most, model),
        protect=Protect(recent=window),
    )
