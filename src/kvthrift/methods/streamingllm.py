"""StreamingLLM (2309.17453): attention sinks and a sliding window of the newest tokens."""

from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe, Trigger
from kvthrift.score import Recency


@published("streamingllm", title="StreamingLLM", paper="2309.17453")
def streamingllm(sinks: int = 4, rerotate: bool = False, decode: bool = False) -> Recipe:
    """Keeps the first tokens and the newest ones, the same in all heads and layers.

    The paper numbers positions by place in the cache; ``rerotate`` does that (keys are turned so that no gap is
    left), otherwise kept keys stay at their true positions. ``decode`` evicts the oldest non-sink at every step as
    the paper does; turning sinks again and again in bf16 then adds rounding to them.

    Args:
        sinks: first tokens that stay.
        rerotate: close the gap in positions behind the sinks.
        decode: evict at every decoded token too.
    """
    return Recipe(
        "streamingllm",
        scorer=Recency(),
        protect=Protect(sinks=sinks),
        trigger=Trigger(every=1 if decode else None),
        rerotate=rerotate,
    )
