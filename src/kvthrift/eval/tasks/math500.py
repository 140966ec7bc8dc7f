"""MATH-500: competition problems with a chain of thought, scored on the last boxed expression."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from kvthrift.eval.sample import Sample, Task, Tokenizer, Turn
from kvthrift.eval.tasks import local
from kvthrift.eval.tasks.fit import Room, at_least, filled


@dataclass(frozen=True)
class Math500(Task):
    """A problem without examples: the answer is what is long here.

    Attributes:
        answer_tokens: cap of an answer; 0 for all that the length leaves. Reasoning models get 16,384 to 32,768.
    """

    name = "math500.cot"
    group = "math500"
    summary = "competition mathematics, the last boxed expression counts"

    answer_tokens: int = 1024

    def __post_init__(self) -> None:
        at_least(self, 0, answer_tokens=self.answer_tokens)

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        path = local.find(data, "math500/math500.jsonl", get="MATH-500's test set as JSON lines")
        rows = list(local.rows(path))
        Random(f"{seed}/{self.name}").shuffle(rows)
        room = Room(tokenizer, length)

        def make(number: int, units: int) -> Sample:
            if self.answer_tokens:
                return self._sample(rows[number], self.answer_tokens)
            return self._sample(rows[number], max(room.left(self._sample(rows[number], 0)), 1))

        yield from filled(make, room, count=count, most=1, items=len(rows))

    def _sample(self, row: local.Row, new_tokens: int) -> Sample:
        ask = "\n\nThink step by step, and put the final answer in \\boxed{}.\n"
        turn = Turn(ask, (str(row["answer"]),), "", new_tokens)
        meta = {key: row[key] for key in ("subject", "level") if key in row}
        context = f"Solve this problem.\n\n{row['problem']}"
        return Sample(row["unique_id"], self.name, context, (turn,), "boxed", meta=meta)


TASKS = (Math500,)
