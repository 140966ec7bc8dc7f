"""Task-KV (2501.15113): heads far from the layer's common meaning keep the whole text, chosen for each prompt."""

from kvthrift.allocate import SemanticHeads
from kvthrift.methods.registry import published
from kvthrift.recipe import Recipe
from kvthrift.score import EndsFirst, WindowAttention


@published("task_kv", title="Task-KV", paper="2501.15113")
def task_kv(
    beta: float = 0.3,
    last: float = 1.0,
    tokens: int = 256,
    window: int = 32,
    sinks: int = 16,
    recent: int = 256,
    kernel: int = 7,
) -> Recipe:
    """Keeps everything in a few heads, and sinks, recent tokens and some in between in the others.

    Meant for budgets of 40% of the prompt and more. Below what whole heads need there are fewer of them, and below
    sinks and recent tokens those are all that stays. No code is public: distances are Euclidean between unnormalised
    vectors, one head nearest to the mean counts among the whole ones, only the ranking of tokens is pooled, and KV
    heads are classified by the mean over their query heads. Defaults of ``beta`` and ``last`` are those of Mistral-7B;
    0.25 and 4 those of a model of 32 KV heads.

    Args:
        beta: share of heads that are whole in the lowest layer.
        last: heads that are whole in the top layer.
        tokens: tokens of highest attention that make a head's semantic vector.
        window: newest queries that are asked.
        sinks: first tokens that the other heads keep.
        recent: newest entries that the other heads keep.
        kernel: neighbours that share a score (odd), by their mean.
    """
    return Recipe(
        "task_kv",
        scorer=EndsFirst(WindowAttention(window, pool="avg", kernel=kernel), sinks, recent),
        heads=SemanticHeads(beta, last, tokens, window, sinks + recent),
    )
