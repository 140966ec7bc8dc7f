"""LongEval (LongChat): the number of one line among hundreds, the first topic of a long talk.

The published files are used as they are where they fit. Lines are cut around the one asked for so that its depth stays,
topics from the back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

from kvthrift.eval.sample import Sample, Task, Tokenizer, Turn
from kvthrift.eval.tasks import local
from kvthrift.eval.tasks.fit import Room, filled

_GET = "LongEval's test cases (DachengLi1/LongChat, longeval/evaluation)"
_LINE = re.compile(r"^line (.+): REGISTER_CONTENT is <(\d+)>$", re.MULTILINE)
_LINE_FILES = {200: 4_900, 300: 7_200, 400: 9_600, 680: 16_200}  # lines -> tokens, about


class Lines(Task):
    """The register content of one line. The answer is started, so that its first number counts (LongEval: the last)."""

    name = "longeval.lines"
    group = "longeval"
    summary = "the number of one named line among as many as fit"

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        size = next((lines for lines, tokens in _LINE_FILES.items() if tokens >= length), max(_LINE_FILES))
        path = local.find(data, f"longchat/lines/{size}_lines.jsonl", get=_GET)
        rows = list(enumerate(local.rows(path)))
        Random(f"{seed}/{self.name}").shuffle(rows)
        parsed = [_parse(row) for _, row in rows]
        most = min((len(lines) for _, lines, _ in parsed), default=1)

        def make(number: int, units: int) -> Sample:
            head, lines, place = parsed[number]
            before = round(place / (len(lines) - 1) * (units - 1))
            return self._sample(f"{size}-{rows[number][0]}", head, lines[place - before :][:units], before, length)

        yield from filled(make, Room(tokenizer, length), count=count, least=2, most=most, items=len(rows))

    def _sample(self, name: str, head: str, lines: list[tuple[str, str]], place: int, length: int) -> Sample:
        key, value = lines[place]
        record = "\n".join(f"line {line}: REGISTER_CONTENT is <{number}>" for line, number in lines)
        ask = f"\n\nThe record is over. What is the <REGISTER_CONTENT> in line {key}? Answer with the number.\n"
        turn = Turn(ask, (value,), f"The <REGISTER_CONTENT> in line {key} is <", 12)
        meta = {"depth": place / (len(lines) - 1), "lines": len(lines), "length": length}
        return Sample(name, self.name, f"{head}{record}", (turn,), "first_number", meta=meta)


def _parse(row: local.Row) -> tuple[str, list[tuple[str, str]], int]:
    """What stands before the lines, the lines, and the place of the one asked for."""
    found = list(_LINE.finditer(row["prompt"]))
    lines = [(match[1], match[2]) for match in found]
    key = row["random_idx"][0]
    return row["prompt"][: found[0].start()], lines, [line for line, _ in lines].index(key)


class Topics(Task):
    """The first topic of a talk about five or ten."""

    name = "longeval.topics"
    group = "longeval"
    summary = "the first of the topics that a long talk went through"

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        size = 5 if length < 6_000 else 10
        path = local.find(data, f"longchat/topics/{size}_topics.jsonl", get=_GET)
        rows = list(enumerate(local.rows(path)))
        Random(f"{seed}/{self.name}").shuffle(rows)

        def make(number: int, units: int) -> Sample:
            line, row = rows[number]
            return self._sample(f"{size}-{line}", row, units, length)

        room = Room(tokenizer, length)
        yield from filled(make, room, count=count, most=size, items=len(rows))

    def _sample(self, name: str, row: local.Row, units: int, length: int) -> Sample:
        talk = row["prompt"][: row["prompt"].rindex("Now the record ends.")]
        head, *topics = re.split(r"(?=USER: I would like to discuss the topic of )", talk)
        ask = "\n\nThe record is over. What is the first topic that we discussed? Answer with the topic only.\n"
        turn = Turn(ask, (row["topics"][0],), "The first topic is", 24)
        meta = {"topics": units, "length": length}
        return Sample(name, self.name, head + "".join(topics[:units]), (turn,), "subspan", meta=meta)


TASKS = (Lines, Topics)
