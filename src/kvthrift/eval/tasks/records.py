"""Long documents with questions, in the form of LongBench's JSON lines: a record, a prompt around it, the middle cut.

Knows no data set: subclasses of :class:`Recorded` name a file, a prompt and a scorer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal

from kvthrift.eval.sample import Sample, Task, Tokenizer, Turn
from kvthrift.eval.tasks.fit import Room, middle_cut, too_short


@dataclass(frozen=True)
class Record:
    """One question about one document.

    Attributes:
        id: unique in its data set.
        context: the document.
        question: empty where the prompt says all.
        answers: any of them is right.
        meta: what scorers and reports need (classes, choices, language).
    """

    id: str
    context: str = field(repr=False)
    question: str
    answers: tuple[str, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """What is put around a document, and how its answers are scored.

    Attributes:
        before: the prompt in front of the document.
        ask: the prompt behind it; "{question}" stands for the record's.
        prefix: start of the answer.
        scorer: a name of the scorers.
        new_tokens: an answer's cap.
        chat: whether the prompt goes into the chat template.
        first_line: whether only the answer's first line counts.
    """

    before: str = ""
    ask: str = "{question}"
    prefix: str = ""
    scorer: str = "qa_f1"
    new_tokens: int = 64
    chat: bool = True
    first_line: bool = False


@dataclass(frozen=True)
class Recorded(Task):
    """A task that asks about documents as they are.

    Attributes:
        overlong: what becomes of documents that do not fit: "cut" takes the middle out (as LongBench does: the prompt's
            first and last half stay), "skip" passes them over.
    """

    form: ClassVar[Form] = Form()

    overlong: Literal["cut", "skip"] = "cut"

    def records(self, data: Path | None) -> Iterable[Record]:
        """The data set."""
        raise NotImplementedError

    def shape(self, record: Record) -> Form:
        """The form of a record."""
        return self.form

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        room = Room(tokenizer, length)
        records = list(self.records(data))
        Random(f"{seed}/{self.name}").shuffle(records)
        made, small = 0, None
        for record in records:
            if made == count:
                return
            sample = self._fitted(record, room)
            if sample is None:
                small = small or self._sample(record, "")
                continue
            yield sample
            made += 1
        if small is not None and not made:
            raise too_short(room, small)

    def _fitted(self, record: Record, room: Room) -> Sample | None:
        """The record's sample, cut where need be; None where it is passed over."""
        ids = room.tokenizer.encode(record.context)
        kept = room.left(self._sample(record, ""))
        whole = self._sample(record, record.context)
        if len(ids) <= kept and room.left(whole) >= 0:
            return whole
        return None if self.overlong == "skip" or kept <= 0 else self._cut(record, room, ids, min(kept, len(ids)))

    def _cut(self, record: Record, room: Room, ids: list[int], kept: int) -> Sample | None:
        """A sample with ``kept`` tokens of its document, or few less: it is the whole prompt that loses its middle."""
        form = self.shape(record)
        start, ask = (
            room.tokens(form.before),
            room.tokens(form.ask.replace("{question}", record.question) + form.prefix),
        )
        while kept > 0:
            head = min(max((start + kept + ask) // 2 - start, 0), kept)
            text = middle_cut(ids, room, head=head, tail=kept - head)
            sample = self._sample(record, text, cut=len(ids) - kept)
            if room.left(sample) >= 0:
                return sample
            kept -= 1
        return None

    def _sample(self, record: Record, text: str, **meta: Any) -> Sample:
        form = self.shape(record)
        ask = form.ask.replace("{question}", record.question)
        first = {"first_line": True} if form.first_line else {}
        return Sample(
            id=record.id,
            task=self.name,
            context=form.before + text,
            turns=(Turn(ask, record.answers, form.prefix, form.new_tokens),),
            scorer=form.scorer,
            chat=form.chat,
            meta={**record.meta, **first, **meta},
        )


def longbench_record(row: dict[str, Any], number: int) -> Record:
    """A row with LongBench's fields: input, context, answers, length, dataset, language, all_classes, _id."""
    meta = {key: row[key] for key in ("dataset", "language") if row.get(key)}
    if row.get("all_classes"):
        meta["classes"] = tuple(row["all_classes"])
    if row.get("length") is not None:
        meta["words"] = row["length"]
    answers = tuple(map(str, row["answers"]))
    return Record(str(row.get("_id", number)), row["context"], row.get("input", ""), answers, meta)
