"""ChunkKV (2502.00299): whole runs of tokens stay or go, and layers may share a choice."""

from typing import Literal

from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe
from kvthrift.score import WindowAttention
from kvthrift.select import ChunkUnit


@published("chunkkv", title="ChunkKV", paper="2502.00299")
def chunkkv(
    chunk: int = 10,
    window: int = 8,
    reuse: int = 1,
    pooled: Literal["mean", "sum"] = "mean",
    per_head: bool = False,
    fill: bool = False,
    group: Literal["mean", "max", "sum"] = "mean",
) -> Recipe:
    """Keeps whole chunks by window attention, so that kept text stays readable to the model.

    Up to ``chunk - 1`` entries fewer than asked stay, unless ``fill``. One choice per layer by default, as index
    reuse suggests; ``per_head`` chooses for each KV head.

    Args:
        chunk: entries of a chunk.
        window: newest queries that are asked, and entries that stay.
        reuse: layers in a row that share the first one's choice (1: none do; the paper's setting is 2).
        pooled: how entries make a chunk's score; a sum handicaps a short last chunk, a mean favours it.
        per_head: each KV head chooses its own chunks.
        fill: take up the rest of the budget with the best entries of the next chunk.
        group: how the query heads of a KV head are joined.
    """
    return Recipe(
        "chunkkv",
        scorer=WindowAttention(window=window, queries="sum", pool="none", group=group),
        unit=ChunkUnit(chunk, pooled, per_head, fill),
        protect=Protect(recent=window),
        reuse=reuse,
    )
