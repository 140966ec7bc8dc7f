"""What RULER's tasks share: the shape of a prompt, its split in three, and how lengths are counted.

A prompt is a task statement, a context, a question, and the start of the answer. Knows no task.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar, Literal

from kvthrift.eval.sample import Sample, Task, Tokenizer, Turn
from kvthrift.eval.tasks.fit import Room

SHORTEST = 4096
"""RULER's shortest length; below it samples give up fewer units at a time, and word lists are shorter."""


@dataclass(frozen=True)
class Ruler(Task):
    """A RULER task.

    Attributes:
        variant: "official" counts the chat template's tokens into the length; "kvpress" (the leaderboard's form) does
            not, so that prompts outgrow the length by them. Both split the prompt at the last match of the question's
            first words: the task statement is part of the context that is compressed, the question is not.
    """

    group = "ruler"
    new_tokens: ClassVar[int]
    asks: ClassVar[tuple[str, ...]]  # how a question may begin
    scorer: ClassVar[str] = "ruler_all"

    variant: Literal["official", "kvpress"] = "official"

    def room(self, tokenizer: Tokenizer, length: int) -> Room:
        """What a sample must fit into."""
        return Room(tokenizer, length, markup=self.variant == "official")

    def rng(self, seed: int, number: int) -> Random:
        """The random numbers of one sample: the same however many are made."""
        return Random(f"{seed}/{self.name}/{number}")

    def sample(self, number: int, length: int, prompt: str, prefix: str, answers: list[str], **meta: Any) -> Sample:
        """A prompt split into context, question and start of the answer."""
        at = max(prompt.rfind(words) for words in self.asks)
        turn = Turn(prompt[at:], tuple(answers), prefix, self.new_tokens)
        return Sample(
            id=f"{length}-{number:04d}",
            task=self.name,
            context=prompt[:at],
            turns=(turn,),
            scorer=self.scorer,
            meta={"length": length, "variant": self.variant, **meta},
        )
