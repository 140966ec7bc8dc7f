"""KVzip (2505.23416) and KVzip+ (2601.07891): what it takes to say the context again, whatever will be asked of it."""

from typing import Literal

from kvthrift.allocate import PoolLayers, WholeHeads
from kvthrift.calibrate import load_named
from kvthrift.calibrate.heads import KIND, importance
from kvthrift.methods.registry import published
from kvthrift.part import require
from kvthrift.recipe import Protect, Recipe
from kvthrift.score import Recency, SecondPassAttention


@published("kvzip", title="KVzip", paper="2505.23416")
def kvzip(
    repeat: int = 2000,
    sinks: int = 4,
    budgets: Literal["pooled", "threshold", "uniform", "heads"] = "pooled",
    first: tuple[int, ...] = (),
    later: tuple[int, ...] = (),
    reply: tuple[int, ...] = (),
    overlap: int = 8,
    sees: Literal["all", "chunk"] = "all",
    plus: bool = False,
    recent: int = 0,
    calibration: str = "smollm2",
) -> Recipe:
    """Keeps what the model attends to when it repeats the context, the highest scores of the whole model.

    Needs ``kvthrift.prefill``, for a second pass over the context costs one to two times its reading; pass it the
    tokenizer, so that the repetition is asked for in words (or give their ids). An entry's score is the most attention
    that any repeated token and any query head of its group pays it, the softmax taken over the sinks, the chunk that is
    repeated and the repeated tokens. Sinks are meant to be the whole system prompt: set them to its length; the 4 of
    another implementation are the default. ``plus`` is KVzip+ (2601.07891): attention times the norm of the entry's
    projected value, over the norm of the hidden state that the layer was given for the repeated token; it holds the
    queries and hidden states of one repeated chunk, all layers'. ``budgets="heads"`` is the fast form, in which whole
    heads stay or go: one pass, plain generate, and nothing is scored but, offline, the heads; 60% and more is advised.

    Args:
        repeat: context tokens repeated at a time (the paper says 2K, its code 2000); 0 all at once.
        sinks: leading tokens that stay and are not scored.
        budgets: the exact number of highest scores of the model, those strictly above the published threshold (one
            fewer, and fewer at ties), the same number in every layer and head, or whole heads by their importance, of
            which the others keep sinks and ``recent`` (the rest of the budget, less than a head, goes to the next).
        first: token ids that ask for the first chunk; default words if these three are empty.
        later: token ids that ask for a later chunk; the end of the chunk before it follows them.
        reply: token ids between request and repetition.
        overlap: tokens of the chunk before that a later request quotes.
        sees: what the repetition attends to: the whole context, as published; or the sinks and the chunk that is
            repeated, which costs no more the longer the context is (with ``repeat=512``, less than half as much).
        plus: KVzip+'s score.
        recent: newest entries that stay; none, as published.
        calibration: for ``budgets="heads"`` only: "smollm2", shipped for the embedded model, or a file from 'kvthrift
            calibrate kvzip' (or headkv's, which no paper has).
    """
    protect, table = Protect(sinks=sinks, recent=recent), load_named(calibration, method="kvzip", kind=KIND)
    if budgets == "heads":
        require(not plus, "plus=True scores entries, but budgets=heads keeps whole heads. Use one of the two.")
        heads = WholeHeads(importance(table), sinks + recent, table.meta.model)
        return Recipe("kvzip", scorer=Recency(), heads=heads, protect=protect)
    scorer = SecondPassAttention(
        repeat, sinks=sinks, first=first, later=later, reply=reply, overlap=overlap, sees=sees, relative=plus
    )
    recipe = Recipe("kvzip", scorer=scorer, protect=protect)
    return recipe if budgets == "uniform" else recipe.with_options(layers=PoolLayers(strict=budgets == "threshold"))
