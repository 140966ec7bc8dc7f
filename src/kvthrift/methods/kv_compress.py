"""KV-Compress (2410.00161): squared attention, heads of all layers competing, room given back in whole pages."""

from typing import Literal

from kvthrift.allocate import PageLayers
from kvthrift.calibrate import load_named
from kvthrift.calibrate.bins import KIND, biases
from kvthrift.methods.registry import published
from kvthrift.part import require
from kvthrift.recipe import Protect, Recipe, Trigger
from kvthrift.score import AttentionPower, PositionBias, Scorer


@published("kv_compress", title="KV-Compress", paper="2410.00161")
def kv_compress(
    window: int = 8,
    page: int = 16,
    full: bool = False,
    squared: bool = True,
    kernel: int = 7,
    rounding: Literal["down", "up"] = "down",
    continual: bool = False,
    even: Literal["none", "layers", "heads"] = "none",
    bias: str = "",
    bias_weight: float = 0.0,
    ranked: int = 5_000_000,
    average: bool = False,
    sinks: int = 0,
    protected: int = 0,
    buffer: int | None = None,
    limit: int = 0,
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
        continual: add every decode step's attention, and compress at each (``every`` sets another interval).
        even: free as many pages in every layer, or in every head.
        bias: a file of biases to add to the sums, by head and bin of positions (see kvthrift.calibrate.bins); none by
            default.
        bias_weight: what these are multiplied by; 0 in the paper's main runs.
        ranked: entries that are sorted at a time (5M in its server, which leaves further sequences for a later
            iteration; here they take turns at once, and the choice is the same).
        average: divide sums by the queries that counted; with ``full`` only, for over a window it changes no order.
        sinks: first entries that stay; none in the paper's runs.
        protected: newest entries that stay, if not those said above (its server protects 64 to 100); 0 for those.
        buffer: queries, decoded ones too, do not count for entries fewer positions before them; as published (none, and
            10 with ``full``) if left out.
        limit: compress while decoding whenever the sequences of a cache have so many new tokens together, its server's
            limit of new tokens; 0 for no limit. Every decode step's attention is added, as with ``continual``.
    """
    require(bool(bias) or not bias_weight, f"bias_weight={bias_weight} weighs a table that was not given. Give bias.")
    require(limit >= 0, f"limit={limit} must be 0 (none) or more tokens.")
    require(not (continual and limit), f"limit={limit} never matters with continual=True. Use one of the two.")
    gap = buffer if buffer is not None else 10 if full else 0
    asked = (0, gap, 1) if full else (window, gap, kernel)
    scorer: Scorer = AttentionPower(squared, *asked, average)
    if bias:
        how = "Write a table of the kind that kvthrift.calibrate.bins describes, and give that file."
        table = load_named(bias, method="kv_compress", kind=KIND, remedy=how)
        scorer = PositionBias(scorer, *biases(table), bias_weight, table.meta.model)
    return Recipe(
        "kv_compress",
        scorer=scorer,
        layers=PageLayers(page, rounding, even=even, ranked=ranked),
        protect=Protect(sinks, protected or (32 if full else window)),
        trigger=Trigger(every=limit or (1 if continual else None), together=limit > 0),
    )
