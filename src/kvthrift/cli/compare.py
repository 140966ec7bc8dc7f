"""The same prompt through two caches, one full and one compressed, measured by the same code.

Knows models and caches; nothing of terminals.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvthrift.cli.progress import Bars
from kvthrift.cli.prompt import Prompt
from kvthrift.errors import ContextError
from kvthrift.integrations.transformers.cache import Cache
from kvthrift.integrations.transformers.decode import greedy
from kvthrift.integrations.transformers.prefill import prefill
from kvthrift.recipe import Recipe
from kvthrift.runtime import CacheReport

WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Task:
    """What both caches are given.

    ``split``: tokens that are read, and compressed, before the rest; 0 reads the prompt in one pass.
    ``chunk``: tokens read at a time of those, or None.
    """

    prompt: Prompt
    split: int
    chunk: int | None
    page: int
    max_new_tokens: int

    @classmethod
    def plan(cls, prompt: Prompt, *, hide: bool, chunk: int | None, page: int, max_new_tokens: int) -> Task:
        """With the question hidden all that is before it comes first; in chunks, all but the last token."""
        split = prompt.before_question if hide else 0 if chunk is None else prompt.length - 1
        return cls(prompt, split, chunk, page, max_new_tokens)

    @property
    def passes(self) -> int:
        """Forward passes up to the first new token."""
        return 1 + (0 if not self.split else 1 if self.chunk is None else -(-self.split // self.chunk))


@dataclass(frozen=True)
class Arm:
    """One cache's part of a comparison.

    Attributes:
        answer: the decoded text.
        tokens: its ids.
        prefill_seconds: reading the whole prompt, compression included, up to the first new token.
        tokens_per_second: of the median decode step; None when there was no second token.
        prefilled, finished: the cache's report before the first decode step and after the last.
    """

    answer: str
    tokens: tuple[int, ...]
    prefill_seconds: float
    tokens_per_second: float | None
    prefilled: CacheReport
    finished: CacheReport

    def plain(self) -> dict[str, Any]:
        """This arm as plain data."""
        return asdict(self) | {
            "compression_seconds": self.prefilled.compression_seconds,
            "peak_bytes": self.prefilled.peak_bytes,
            "prefilled": self.prefilled.plain(),
            "finished": self.finished.plain(),
        }


@dataclass(frozen=True)
class Agreement:
    """How far two answers agree.

    Attributes:
        tokens: of the longer answer.
        prefix: leading tokens in common.
        share: positions with the same token, as a share of ``tokens``.
    """

    tokens: int
    prefix: int
    share: float

    @classmethod
    def of(cls, a: tuple[int, ...], b: tuple[int, ...]) -> Agreement:
        """Compare two answers position by position."""
        longer = max(len(a), len(b), 1)
        same = [x == y for x, y in zip(a, b, strict=False)]
        prefix = same.index(False) if False in same else len(same)
        return cls(longer, prefix, sum(same) / longer)


@dataclass(frozen=True)
class Comparison:
    """Both arms, and how far their answers agree."""

    full: Arm
    compressed: Arm

    @property
    def agreement(self) -> Agreement:
        """How far the two answers agree."""
        return Agreement.of(self.full.tokens, self.compressed.tokens)

    def plain(self) -> dict[str, Any]:
        """This comparison as plain data: what was held before (full) and after (compressed), and both arms."""
        before, after = self.full.prefilled, self.compressed.prefilled
        return {
            "entries_before": before.entries,
            "entries_after": after.entries,
            "bytes_before": before.bytes,
            "bytes_after": after.bytes,
            "agreement": asdict(self.agreement),
            "full": self.full.plain(),
            "compressed": self.compressed.plain(),
        }


def check_window(prompt: Prompt, recipe: Recipe) -> None:
    """Refuse a text that is shorter than the queries the recipe looks at.

    Raises:
        ContextError: with both numbers.
    """
    window = recipe.needs.window
    if recipe.compresses and prompt.context_tokens < window:
        raise ContextError(
            f"the context has {prompt.context_tokens} tokens, fewer than the window of {window} newest queries that "
            f"{recipe.name} looks at, so there is nothing to choose from. Give a longer text or a smaller window."
        )


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    recipe: Recipe,
    bars: Bars,
    label: str,
) -> Arm:
    """Read the prompt and answer it, under one recipe.

    Raises:
        BudgetError: the budget is too small for this model or prompt.
        UnsupportedModelError: the model cannot be compressed, or the recipe needs what it cannot tell.
    """
    ids = task.prompt.ids.to(model.device)
    reports: list[CacheReport] = []
    ticks: list[Callable[[], None]] = []
    with ExitStack() as bar:
        bar.enter_context(bars.reading(f"Reading, {label}", model, task.passes))
        began = perf_counter()
        cache = _read(model, tokenizer, ids[:, : task.split], task, recipe)
        if not task.split:
            cache.tell(ids, tokenizer=tokenizer)
        seconds = perf_counter() - began

        def on_token(_: int) -> None:
            if not reports:
                reports.append(cache.report())
                bar.close()
                ticks.append(bar.enter_context(bars.decoding(f"Decoding, {label}", task.max_new_tokens)))
            ticks[0]()

        decoded = greedy(model, ids[:, task.split :], cache, task.max_new_tokens, on_token)
    return Arm(
        answer=str(tokenizer.decode(list(decoded.tokens), skip_special_tokens=True)).strip(),
        tokens=decoded.tokens,
        prefill_seconds=seconds + decoded.prefill_seconds,
        tokens_per_second=decoded.tokens_per_second,
        prefilled=reports[0],
        finished=cache.report(),
    )


def warm_up(model: PreTrainedModel, prompt: Prompt) -> None:
    """A short pass and two steps, so that the first arm does not pay for what is set up once."""
    greedy(model, prompt.ids[:, :WARM_UP_TOKENS].to(model.device), Cache(model.config, "full"), 3)


def _read(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor, task: Task, recipe: Recipe) -> Cache:
    if not task.split:
        return Cache(model.config, recipe, page=task.page)
    return prefill(model, ids, recipe, chunk=task.chunk, page=task.page, tokenizer=tokenizer)
