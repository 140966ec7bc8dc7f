"""BAMBOO's documents and questions (2309.13345) in LongBench's form. Prompts are our own.

Files lie in the data folder's ``BAMBOO``; each has one question a line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from kvthrift.eval.tasks import local
from kvthrift.eval.tasks.records import Form, Record, Recorded

_CHOICE = Form(
    "Read the text.\n\n",
    "\n\nAnswer the question about the text above with the letter of the right choice.\n\n{question}\n",
    "Answer:",
    "choice",
    new_tokens=8,
)
_CLAIM = Form(
    "Read the paper.\n\n",
    '\n\nDoes the paper above support the statement? Answer "Yes" if it does, and "No" if the paper contradicts any of '
    "it or does not say so.\n\nStatement: {question}\n",
    "Answer:",
    "choice",
    new_tokens=8,
)


class Bamboo(Recorded):
    """One of BAMBOO's files."""

    group = "bamboo"
    broken: ClassVar[tuple[int, ...]] = ()  # lines that are damaged in the published file

    def records(self, data: Path | None) -> Iterator[Record]:
        file = f"BAMBOO/{self.name.removeprefix('bamboo.')}.jsonl"
        path = local.find(data, file, get="BAMBOO's files (RUCAIBox/BAMBOO, datasets)")
        for number, row in enumerate(local.rows(path, broken=self.broken)):
            yield self.record(str(number), row)

    def record(self, name: str, row: dict[str, Any]) -> Record:
        """One row."""
        raise NotImplementedError


class Choice(Bamboo):
    form = _CHOICE

    def record(self, name: str, row: dict[str, Any]) -> Record:
        options = "\n".join(row["options"])
        return Record(
            name, row["content"], f"{row['question']}\n{options}", (row["answer"],), {"choices": tuple("ABCD")}
        )


class PaperQA(Choice):
    name = "bamboo.paperqa_4k"
    summary = "multiple choice about papers"


class LongPaperQA(Choice):
    name = "bamboo.paperqa_16k"
    summary = "multiple choice about whole papers"
    broken = (26,)


class MeetingQA(Choice):
    name = "bamboo.meetingqa_4k"
    summary = "multiple choice about meetings"


class Claim(Bamboo):
    form = _CLAIM

    def record(self, name: str, row: dict[str, Any]) -> Record:
        answer = "Yes" if row["answer"] else "No"
        return Record(name, row["content"], row["hypothesis"].strip(), (answer,), {"choices": ("Yes", "No")})


class SentenceClaim(Claim):
    name = "bamboo.senhallu_4k"
    summary = "whether a paper supports a text with one changed sentence"


class AbstractClaim(Claim):
    name = "bamboo.abshallu_4k"
    summary = "whether a paper supports an abstract"


class AltQA(Bamboo):
    name = "bamboo.altqa_4k"
    summary = "questions with a number for an answer, numbers changed from what models know"
    form = Form("", "\n\n{question}\n\nAnswer with a number only.\n", "Answer:", "first_number", new_tokens=16)

    def record(self, name: str, row: dict[str, Any]) -> Record:
        document, _, question = row["content"].rpartition("Question:")
        return Record(name, document.rstrip(), f"Question: {question.strip()}", (str(row["answer"]),))


class Sort(Bamboo):
    name = "bamboo.reportsumsort_4k"
    summary = "five summaries of a report's parts, to be put in order"
    form = Form(
        "Read the report.\n\n",
        "\n\nThese five events of the report above are out of order:\n{question}\n\nPut them in the order in which the "
        "report has them. Answer with their numbers only, as in [0] > [1] > [2] > [3] > [4].\n",
        "Answer:",
        "order",
        new_tokens=32,
    )

    def record(self, name: str, row: dict[str, Any]) -> Record:
        events = "\n".join(f"[{place}] {words}" for place, words in enumerate(row["summaries"]))
        return Record(name, row["content"], events, (" ".join(map(str, row["answer"])),))


class LibraryCode(Bamboo):
    name = "bamboo.private_eval_4k"
    summary = "the next lines of code with a made-up library's documentation"
    form = Form("", "{question}", "", "code_edit", new_tokens=48, chat=False)

    def record(self, name: str, row: dict[str, Any]) -> Record:
        documentation, mark, code = row["prompt"].rpartition("# [end]\n")
        return Record(name, documentation + mark, code, tuple(row["canonical_solution"]))


class LongLibraryCode(LibraryCode):
    name = "bamboo.private_eval_16k"
    summary = "the next lines of code with much of a made-up library's documentation"


TASKS = (
    PaperQA,
    LongPaperQA,
    MeetingQA,
    SentenceClaim,
    AbstractClaim,
    AltQA,
    Sort,
    LibraryCode,
    LongLibraryCode,
)
