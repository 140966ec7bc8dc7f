"""KVzip (2505.23416): what it takes to say the context again, whatever will be asked about it."""

from typing import Literal

from kvthrift.allocate import PoolLayers
from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe
from kvthrift.score import SecondPassAttention


@published("kvzip", title="KVzip", paper="2505.23416")
def kvzip(
    repeat: int = 2000,
    sinks: int = 4,
    budgets: Literal["pooled", "threshold", "uniform"] = "pooled",
    first: tuple[int, ...] = (),
    later: tuple[int, ...] = (),
    reply: tuple[int, ...] = (),
    overlap: int = 8,
    sees: Literal["all", "chunk"] = "all",
) -> Recipe:
    """Keeps what the model attends to when it repeats the context, the highest scores of the whole model.

    Needs ``kvthrift.prefill``, for a second pass over the context costs one to two times its reading; pass it the
    tokenizer, so that the repetition is asked for in words (or give their ids). An entry's score is the most attention
    that any repeated token and any query head of its group pays it, the softmax taken over the sinks, the chunk that is
    repeated and the repeated tokens. Sinks are meant to be the whole system prompt: set them to its length; the 4 of
    another implementation are the default.

    Args:
        repeat: context tokens repeated at a time (the paper says 2K, its code 2000); 0 all at once.
        sinks: leading tokens that stay and are not scored.
        budgets: the exact number of highest scores of the model, those strictly above the published threshold (one
            fewer, and fewer at ties), or the same number in every layer and head.
        first: token ids that ask for the first chunk; default words if these three are empty.
        later: token ids that ask for a later chunk; the end of the chunk before it follows them.
        reply: token ids between request and repetition.
        overlap: tokens of the chunk before that a later request quotes.
        sees: what the repetition attends to: the whole context, as published; or the sinks and the chunk that is
            repeated, which costs no more the longer the context is (with ``repeat=512``, less than half as much).
    """
    scorer = SecondPassAttention(repeat, sinks=sinks, first=first, later=later, reply=reply, overlap=overlap, sees=sees)
    recipe = Recipe("kvzip", scorer=scorer, protect=Protect(sinks=sinks))
    return recipe if budgets == "uniform" else recipe.with_options(layers=PoolLayers(strict=budgets == "threshold"))
