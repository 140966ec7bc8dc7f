"""HeadKV (2410.19258): room by how much each head of the model matters for retrieval, measured once."""

from typing import Literal

from kvthrift.allocate import TableHeads
from kvthrift.calibrate import load_named
from kvthrift.calibrate.heads import KIND, importance
from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe
from kvthrift.score import WindowAttention


@published("headkv", title="HeadKV", paper="2410.19258")
def headkv(
    calibration: str = "smollm2",
    beta: float = 1.2,
    window: int = 32,
    pool: Literal["max", "avg", "none"] = "max",
    kernel: int = 7,
    group: Literal["mean", "max", "sum"] = "mean",
) -> Recipe:
    """Shares room out over all heads of the model by an offline importance, then chooses as SnapKV does.

    The importance belongs to one model; another is refused. Only the model's config is compared, so that
    another dtype or fine-tuned weights of the same architecture are accepted.

    Args:
        calibration: "smollm2", shipped for the embedded model, or a file from 'kvthrift calibrate headkv'.
        beta: 1 / beta of the room is shared out; the paper tries 1.005, 1.01, 1.1, 1.2, 1.5, 2, 5 and 10.
        window: newest queries that are asked, and entries that stay.
        pool: how neighbours share a score.
        kernel: neighbours that share it (odd).
        group: how the query heads of a KV head are joined.
    """
    table = load_named(calibration, method="headkv", kind=KIND)
    return Recipe(
        "headkv",
        scorer=WindowAttention(window=window, pool=pool, kernel=kernel, group=group),
        heads=TableHeads(importance(table), beta, protected=window, model=table.meta.model),
        protect=Protect(recent=window),
    )
