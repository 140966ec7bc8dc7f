"""KV-Compress (2410.00161): squared attention, heads of all layers competing, room given back in whole pages."""

from typing import Literal

from kvthrift.allocate import PageLayers
from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe, Trigger
from kvthrift.score import AttentionPower


@published("kv_compress", title="KV-Compress", paper="2410.00161")
def kv_compress(
    window: int = 8,
    page: int = 16,
    full: bool = False,
    squared: bool = True,
    kernel: int = 7,
    rounding: Literal["down", "up"] = "down",
    continual: bool = False,
) -> Recipe:
    """Keeps entries with the largest squared attention, and frees the cheapest pages of the whole model.

    All layers are compressed together once the prompt is read. Heads end on page boundaries; give the cache the same
    ``page``, or a part of its size is lost to rounding. The newest ``window`` entries stay (the paper's code protects
    one fewer, and the token to come).

    Args:
        window: newest prompt queries that are asked, and entries that stay (8 in the paper's main runs).
        page: entries of a page.
        full: ask all prompt queries, but not for entries within 10 positions before them, and pool nothing; the 32
            newest stay, then.
        squared: sum squares of attention; else attention itself.
        kernel: neighbours that share a score (odd).
        rounding: of a budget that is no multiple of a page; the paper rounds up, which exceeds it.
        continual: add every decode step's attention, and compress at each.
    """
    scorer = AttentionPower(squared, 0, 10, 1) if full else AttentionPower(squared, window, 0, kernel)
    return Recipe(
        "kv_compress",
        scorer=scorer,
        layers=PageLayers(page, rounding),
        protect=Protect(recent=32 if full else window),
        trigger=Trigger(every=1 if continual else None),
    )
