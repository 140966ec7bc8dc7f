"""SABlock (2510.22556): punctuation cuts the text into segments, each kept in blocks as large as its scores allow."""

from typing import Literal

from kvthrift.allocate import PyramidLayers, UniformLayers
from kvthrift.errors import OptionError
from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe
from kvthrift.score import SegmentGuided, WindowAttention
from kvthrift.select import SegmentBlocks


@published("sablock", title="SABlock", paper="2510.22556")
def sablock(
    window: int = 8,
    kernel: int = 7,
    alpha: float = 0.9,
    eta: float = 1.0,
    tau: float = 0.85,
    blocks: str = "13/11/9/7/5/3/2/1",
    pyramid: bool = False,
    group: Literal["mean", "max", "sum"] = "mean",
) -> Recipe:
    """Raises window attention by the weight of a token's segment, and keeps blocks within segments.

    Needs the text's tokens: read with kvthrift.prefill or kvthrift.generate and give the tokenizer. Segments end with
    , . ; : ! ? or a line break, fused tokens included; a text without any is one segment, of which the best single
    tokens stay. Choices are per KV head, scores joined over its query heads first. Of the code that is taken for the
    authors', what it defines is followed, not its slips: every listed size is tested, by the quota's best entries.

    Args:
        window: newest queries that are asked, and entries that stay.
        kernel: neighbours that share a score (odd), by their maximum.
        alpha: weight of segments; 0 is SnapKV's score.
        eta: weight of how evenly heads attend to a segment.
        tau: share of the single best entries' score that blocks must hold; above 1 only single entries are kept.
        blocks: block sizes that are tried, falling to 1.
        pyramid: layer budgets that fall from bottom to top, as in one version of the code.
        group: how the query heads of a KV head are joined.
    """
    try:
        sizes = tuple(int(part) for part in blocks.split("/"))
    except ValueError:
        raise OptionError(f"blocks={blocks!r} are not numbers parted by slashes, such as 5/3/1.") from None
    return Recipe(
        "sablock",
        scorer=SegmentGuided(WindowAttention(window, "sum", kernel=kernel, group=group), alpha, eta, window),
        layers=PyramidLayers() if pyramid else UniformLayers(),
        unit=SegmentBlocks(tau, sizes),
        protect=Protect(recent=window),
    )
