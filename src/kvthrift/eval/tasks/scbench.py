"""SCBench's public files (2412.10319): sessions of about five turns over one shared context.

Reads ``scbench/<set>.jsonl`` with the published fields (id, context, multi_turns: input, answer, options). Sets that
need code to be judged, or two scorers in one session, are left out. Prompts are our own; sessions that do not fit are
passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal

from kvthrift.eval.sample import Sample, Task, Tokenizer, Turn
from kvthrift.eval.tasks import local
from kvthrift.eval.tasks.fit import Room, at_least, filled


@dataclass(frozen=True)
class ScBench(Task):
    """One set.

    Attributes:
        mode: "multi_turn" or "multi_request".
        turns: of a session, at most.
    """

    group = "scbench"
    ask: ClassVar[str] = "\n\n{input}\n"
    prefix: ClassVar[str] = "Answer:"
    scorer: ClassVar[str] = "qa_f1"
    new_tokens: ClassVar[int] = 40

    mode: Literal["multi_turn", "multi_request"] = "multi_turn"
    turns: int = 5

    def __post_init__(self) -> None:
        at_least(self, 1, turns=self.turns)

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        file = f"scbench/{self.name.replace('.', '_')}.jsonl"
        rows = list(enumerate(local.rows(local.find(data, file, get=f"SCBench's {file} (microsoft/SCBench)"))))
        Random(f"{seed}/{self.name}").shuffle(rows)

        def make(number: int, units: int) -> Sample:
            line, row = rows[number]
            turns = tuple(self._turn(turn) for turn in row["multi_turns"][: self.turns])
            meta: dict[str, Any] = {"length": length}
            if self.scorer == "choice":
                meta["choices"] = tuple("ABCD")
            name = str(row.get("id", line))
            return Sample(name, self.name, row["context"], turns, self.scorer, mode=self.mode, meta=meta)

        yield from filled(make, Room(tokenizer, length), count=count, most=1, items=len(rows))

    def _turn(self, turn: local.Row) -> Turn:
        answer, ask = turn["answer"], self.ask.replace("{input}", str(turn["input"]))
        answers = tuple(map(str, answer if isinstance(answer, list) else [answer]))
        if "options" in turn:
            options = list(turn["options"])
            ask = ask.replace("{options}", "\n".join(f"{x}. {o}" for x, o in zip("ABCD", options, strict=False)))
            answers = tuple("ABCD"[options.index(answer)] if answer in options else answer for answer in answers)
        return Turn(ask, answers, self.prefix, self.new_tokens)


class KeyValue(ScBench):
    name, summary = "scbench.kv", "lookups in a JSON object"
    ask, prefix, scorer, new_tokens = "\n\nWhat is the value of key {input}?\n", "Value:", "substring", 150


class PrefixSuffix(ScBench):
    name, summary = "scbench.prefix_suffix", "strings found by their two ends"
    scorer, new_tokens = "substring", 150


class Variables(ScBench):
    name, summary = "scbench.vt", "variable tracking"
    scorer, new_tokens = "ruler_all", 30


class EnglishQA(ScBench):
    name, summary = "scbench.qa_eng", "questions about English novels"


class ChineseQA(ScBench):
    name, summary = "scbench.qa_chn", "questions about Chinese books"
    scorer = "qa_f1_zh"


class EnglishChoice(ScBench):
    name, summary = "scbench.choice_eng", "multiple choice about English novels"
    ask, scorer = "\n\n{input}\n{options}\nAnswer with the letter of the right choice.\n", "choice"


class ManyShot(ScBench):
    name, summary = "scbench.many_shot", "in-context learning from hundreds of examples"
    scorer, new_tokens = "substring", 10


class MathFind(ScBench):
    name, summary = "scbench.mf", "statistics of a long list of numbers"
    scorer, new_tokens = "first_number", 5


class Summary(ScBench):
    name, summary = "scbench.summary", "summaries of several documents in turn"
    prefix, scorer, new_tokens = "Summary:", "rouge_l", 200


TASKS = (KeyValue, PrefixSuffix, Variables, EnglishQA, ChineseQA, EnglishChoice, ManyShot, MathFind, Summary)
