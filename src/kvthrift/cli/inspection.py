"""One prompt under several recipes: what each cache holds right after compression, and what is answered from it.

Knows models and caches; nothing of terminals or pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvthrift.cli.compare import Agreement, Task
from kvthrift.cli.place import Place
from kvthrift.cli.progress import Bars
from kvthrift.eval.decode import Decoder, answer, ends_of, feed, read
from kvthrift.eval.metrics.cost import Held
from kvthrift.eval.pieces import pieces
from kvthrift.eval.probe import Layout, held, layout
from kvthrift.eval.snapshot import Snapshot
from kvthrift.integrations.transformers.cache import Cache
from kvthrift.integrations.transformers.prefill import prefill
from kvthrift.methods import method
from kvthrift.recipe import Recipe

FULL = "full cache"


@dataclass(frozen=True)
class Seen:
    """One cache.

    Attributes:
        recipe: what it was compressed with.
        held: entries and bytes right after compression.
        layout: which tokens it held then.
        tokens: ids of what was answered from it.
        answer: the same as text.
    """

    recipe: Recipe
    held: Held
    layout: Layout
    tokens: tuple[int, ...]
    answer: str

    @property
    def name(self) -> str:
        """Method and budget."""
        if not self.recipe.compresses:
            return FULL
        return f"{self.recipe.name}@{self.recipe.budget}" if self.recipe.budget else self.recipe.name

    @property
    def entries(self) -> int:
        """Entries held in all layers, those that the recipe leaves whole included."""
        return int(self.layout.kept.sum())


@dataclass(frozen=True)
class Inspection:
    """The full cache and the others on one prompt.

    Attributes:
        tokens: the text of each of the T tokens that were read, and compressed.
        hidden: whether the question was not among them.
        place: the text that is looked for among them; None if there is none to look for.
    """

    tokens: tuple[str, ...]
    hidden: bool
    full: Seen
    arms: tuple[Seen, ...]
    place: Place | None

    def agreement(self, arm: Seen) -> Agreement:
        """How far an answer agrees with the full cache's."""
        return Agreement.of(self.full.tokens, arm.tokens)

    def snapshots(self, text: str, question: str) -> list[Snapshot]:
        """One for each compressed cache, under names of the text and of the question."""
        return [
            Snapshot(
                task=text,
                sample=question,
                question="hidden" if self.hidden else "visible",
                arm=arm.name,
                budget=str(arm.recipe.budget or "all"),
                method=arm.recipe.name,
                tokens=self.tokens,
                answer_spans=self.place.spans if self.place else (),
                layers=arm.layout.layers,
                heads=arm.layout.kept.shape[1],
                lengths=arm.layout.lengths,
                kept=arm.layout.kept,
                answer=arm.answer,
                full_answer=self.full.answer,
            )
            for arm in self.arms
        ]

    def plain(self) -> dict[str, Any]:
        """As plain data."""
        place = self.place
        return {
            "tokens": list(self.tokens),
            "find": None if place is None else {"text": place.text, "given": place.given, "spans": place.spans},
            "full": {"answer": self.full.answer, "tokens": self.full.tokens, **_sizes(self.full)},
            "arms": [self._arm(arm) for arm in self.arms],
        }

    def _arm(self, arm: Seen) -> dict[str, Any]:
        found = None if self.place is None else self.place.held(arm.layout)
        agreement = self.agreement(arm)
        return {
            "arm": arm.name,
            "recipe": arm.recipe.plain(),
            **_sizes(arm),
            "layers": arm.layout.layers,
            "lengths": arm.layout.lengths,
            "kept_share": [round(float(share), 4) for share in arm.layout.kept.mean(axis=(0, 1))],
            "find": None if found is None else {"whole": found.whole.tolist(), "part": found.part.tolist()},
            "answer": arm.answer,
            "tokens": arm.tokens,
            "agreement": {"tokens": agreement.tokens, "prefix": agreement.prefix, "share": agreement.share},
        }


def _sizes(arm: Seen) -> dict[str, Any]:
    names = ("entries", "full_entries", "bytes", "metadata_bytes", "full_bytes")
    return {name: getattr(arm.held, name) for name in names}


def inspect_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    recipes: Sequence[Recipe],
    bars: Bars,
    question: str,
    find: str | None,
) -> Inspection:
    """Read a prompt, compress it under each recipe, and answer from each.

    In one piece it is read once for all, which keeps the same as if each had read it; in chunks each reads by itself.

    Args:
        question: whose words tell nothing of where the answer stands.
        find: a text to look for; None looks for the full cache's answer.

    Raises:
        ContextError: the text to look for does not stand in what is read.
        BudgetError: the budget is too small for this model or prompt.
        UnsupportedModelError: the model cannot be compressed, or a recipe needs what it cannot tell.
    """
    ids = task.prompt.ids[0].tolist()
    stop = task.split or len(ids)
    tokens = pieces(tokenizer, ids[:stop])
    place = None if find is None else Place.given_by(find, tokens)
    arms: list[Seen] = []
    for recipe, cache, logits in _caches(model, tokenizer, task, stop, recipes, bars):
        size, where = held(cache), layout(cache, stop)
        first = logits if stop == len(ids) else feed(model, cache, ids[stop:])
        assert first is not None
        name = recipe.name if recipe.compresses else FULL
        with bars.decoding(f"Decoding, {name}", task.max_new_tokens) as tick:
            decoder = _Told(model, cache, [first], keeps=False, tick=tick)
            found = answer(decoder, task.max_new_tokens, ends_of(model, tokenizer)).tokens
        text = str(tokenizer.decode(list(found), skip_special_tokens=True)).strip()
        arms.append(Seen(recipe, size, where, found, text))
        del cache, decoder
    *others, full = arms
    if find is None:
        place = Place.of_answer(full.answer, question, tokens[: task.prompt.before_question])
    return Inspection(tokens, stop <= task.prompt.before_question, full, tuple(others), place)


@dataclass
class _Told(Decoder):
    """A decoder that tells of each step."""

    tick: Callable[[], None] = lambda: None

    def step(self, token: int) -> None:
        super().step(token)
        self.tick()


def _caches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    stop: int,
    recipes: Sequence[Recipe],
    bars: Bars,
) -> Iterator[tuple[Recipe, Cache, Tensor | None]]:
    """A cache compressed under each recipe, and the full one last; with the logits ``[V]`` behind what was read."""
    full = method("full")
    if task.chunk is None:
        with bars.reading("Reading", model, 1):
            ids = task.prompt.ids[0, :stop].tolist()
            shared = read(model, ids, full, page=task.page, observe=recipes, tokenizer=tokenizer)
        for recipe in (*recipes, full):
            yield recipe, shared.cache.compressed(recipe), shared.logits
        return
    for recipe in (*recipes, full):
        with bars.reading(f"Reading, {recipe.name}", model, task.passes - 1):
            given = task.prompt.ids[:, :stop].to(model.device)
            cache = prefill(model, given, recipe, chunk=task.chunk, page=task.page, tokenizer=tokenizer)
        yield recipe, cache, None
