"""UNComp (2410.03090): heads are grouped by the entropy of their queries, and groups differ in size."""

from typing import Literal

from kvthrift.allocate import DeletedHeads, GroupHeads, TableLayers, UniformLayers
from kvthrift.calibrate import load_named
from kvthrift.calibrate.entropy import (
    KIND,
    SHORTEST,
    effective_ranks,
    entropies,
    head_groups,
    layer_groups,
    staged_lengths,
)
from kvthrift.errors import OptionError
from kvthrift.methods.registry import published
from kvthrift.part import require
from kvthrift.recipe import Protect, Recipe, Trigger
from kvthrift.score import WindowAttention

PUBLISHED_SIZES = {
    "256/512": 384,
    "32/384/736": 384,
    "128/298/470/640": 384,
    "256/320/384/448/512": 384,
    "128/256/384/512/640": 384,
    "32/132/232/334/434/534/635/736": 384,
    "20/128/256/384/384/512/640/748": 384,
    "16/112": 64,
    "16/48/80/112": 64,
    "16/30/44/64/64/84/98/112": 64,
}
"""The published sizes of groups, lowest entropy first, and the mean budget they are for."""


@published("uncomp", title="UNComp", paper="2410.03090")
def uncomp(
    calibration: str = "smollm2",
    sizes: str = "256/512",
    window: int = 8,
    kernel: int = 7,
    pooled: Literal["mean", "max"] = "mean",
    group: Literal["mean", "max", "sum"] = "mean",
    staged: int = 0,
    decode: bool = False,
    deleted: bool = False,
    short: Literal["shared", "halved"] = "shared",
) -> Recipe:
    """Gives heads whose queries use more directions more room, then chooses as SnapKV does.

    Heads are sorted offline into as many groups as ``sizes`` names; sizes are proportions, scaled so that the mean is
    the budget (at the mean they were published for, they are the sizes themselves). The paper groups query heads over
    repeated keys; here a KV head is one unit. Higher entropy keeps more, as in the authors' code. Of a short text,
    heads leave to others what they cannot fill (see ``short``), and none falls below the window.
    ``decode`` evicts one entry for each new one; the attention of the last queries is taken over what is held then,
    not carried along, and neighbours are those in the text.
    ``staged`` shares room out over layers by the lengths of the paper's staged prefill; prefill itself drops nothing,
    for an attention interface cannot take tokens out of the hidden states that later layers are given.

    Extreme forms: a small first size (``sizes="8/512"`` with a budget of 260) leaves the lowest group its window; with
    ``deleted`` its heads are given up, and once something has been dropped the output of the head of the layer with the
    most similar keys (mean cosine of the window's, at the end of what was compressed) takes the place of theirs. Such
    heads still hold the window and what is decoded behind it, to which nothing attends.

    Args:
        calibration: "smollm2", shipped for the embedded model, or a file from 'kvthrift calibrate uncomp'.
        sizes: relative sizes of the groups, lowest entropy first; the paper's for small caches is 16/112.
        window: newest queries that are asked, and entries that stay.
        kernel: neighbours that share a score (odd).
        pooled: how a KV head's entropy is made of its query heads'.
        group: how the scores of a KV head's query heads are joined.
        staged: the model's most tokens, of which layer groups keep less and less (4096 in the paper); 0 for no groups.
        decode: keep every head at its size at every decoded token too.
        deleted: give the group of lowest entropy up; the others share the budget. Not in a server.
        short: what a text leaves over that is no longer than the larger of two groups' size: it is "shared" with the
            other heads; or, as in the authors' code, they are "halved": they keep half of the text.
    """
    require(staged == 0 or staged > SHORTEST, f"staged={staged} must be 0, or more than {SHORTEST} tokens.")
    table = load_named(calibration, method="uncomp", kind=KIND)
    found, model = entropies(table), table.meta.model
    wanted = _sizes(sizes)
    halved = short == "halved"
    require(not (halved and deleted), "short=halved is of two groups that stay, but deleted=True gives one up.")
    per_head = found.mean(dim=-1) if pooled == "mean" else found.amax(dim=-1)  # [S, L, H]
    labels = head_groups(per_head, len(wanted))
    layers: TableLayers | UniformLayers = UniformLayers()
    if staged:
        stages = layer_groups(effective_ranks(found, int(table.meta.provenance["head_dim"])))
        layers = TableLayers(tuple(map(float, staged_lengths(stages, staged))), 0, model=model)
    return Recipe(
        "uncomp",
        scorer=WindowAttention(window=window, queries="sum", kernel=kernel, group=group),
        layers=layers,
        heads=(DeletedHeads if deleted else GroupHeads)(labels, wanted, window, model, halved),
        protect=Protect(recent=window),
        trigger=Trigger(every=1 if decode else None),
    )


def _sizes(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split("/"))
    except ValueError:
        raise OptionError(f"sizes={text!r} are not numbers parted by slashes, such as 256/512.") from None
    require(all(0 < size < float("inf") for size in found), f"sizes={text!r} must be positive numbers.")
    return found
