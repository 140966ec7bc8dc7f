"""KeyDiff (2504.15364): keys that point away from the mean direction stay."""

from kvthrift.methods.registry import published
from kvthrift.recipe import Protect, Recipe, Trigger
from kvthrift.score import KeyDifference


@published("keydiff", title="KeyDiff", paper="2504.15364")
def keydiff(recent: int = 0, decode: bool = False) -> Recipe:
    """Keeps the keys least like the average key direction; needs no queries.

    The paper goes block by block (128 tokens): prefill in chunks of 128 for that, and ``decode`` goes on in blocks.

    Args:
        recent: newest entries that stay.
        decode: rescore and cut after every 128 decoded tokens too.
    """
    return Recipe(
        "keydiff",
        scorer=KeyDifference(),
        protect=Protect(recent=recent),
        trigger=Trigger(every=128 if decode else None),
    )
