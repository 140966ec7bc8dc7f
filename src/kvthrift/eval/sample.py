"""The records of an evaluation: what is asked, what would be right, and where a task's samples come from.

Knows nothing of models, recipes or how answers are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol


class Tokenizer(Protocol):
    """What tasks need of a tokenizer to fit a text to a length."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text."""

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids."""


@dataclass(frozen=True)
class Turn:
    """One question of a sample: its text, the start of the answer given to the model, and what would be right."""

    question: str
    answers: tuple[str, ...]
    answer_prefix: str = ""
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Sample:
    """A context and the questions asked of it.

    Attributes:
        id: unique within its task, the same in every run with the same seed, length and tokenizer.
        task: the task's name.
        context: the text that is compressed, without the question.
        turns: one or more questions.
        scorer: how an answer is scored: a name of :data:`kvthrift.eval.metrics.SCORERS`.
        chat: whether the prompt goes into the model's chat template.
        mode: "single"; "multi_turn" (follow-ups see the gold earlier answers); "multi_request" (each question by
            itself).
        meta: whatever the report shows (needle depth, choices, source).
    """

    id: str
    task: str
    context: str
    turns: tuple[Turn, ...]
    scorer: str
    chat: bool = True
    mode: str = "single"
    meta: dict[str, Any] = field(default_factory=dict)


def shortened(sample: Sample, limit: int) -> Sample:
    """The sample with no turn that allows more than ``limit`` new tokens."""
    turns = (replace(turn, max_new_tokens=min(turn.max_new_tokens, limit)) for turn in sample.turns)
    return replace(sample, turns=tuple(turns))


@dataclass(frozen=True)
class Task:
    """Where samples of one kind come from.

    Subclasses name themselves and yield samples; they are registered by name in :mod:`kvthrift.eval.tasks`.
    """

    name: ClassVar[str] = ""
    group: ClassVar[str] = ""  # several tasks under one name ("ruler")
    summary: ClassVar[str] = ""

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        """``count`` samples whose prompt and answer together take at most ``length`` tokens.

        Args:
            tokenizer: the model's.
            length: tokens, answer and chat template included.
            count: how many.
            seed: makes them repeatable.
            data: folder of local data sets, for tasks that read one.

        Raises:
            DataError: the data set is not there (says what to get and where it goes).
            ContextError: the length is too short for the task.
        """
        raise NotImplementedError
