"""Any local file of LongBench's form: one JSON object a line with context, input and answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvthrift.errors import DataError
from kvthrift.eval.tasks import local
from kvthrift.eval.tasks.longbench import chinese, english
from kvthrift.eval.tasks.records import Form, Record, Recorded, longbench_record


@cache
def _forms() -> dict[str, Form]:
    return {task.name.removeprefix("longbench."): task.form for task in (*english.TASKS, *chinese.TASKS)}


@dataclass(frozen=True)
class LocalFile(Recorded):
    """A file of your own. Rows whose ``dataset`` is a LongBench set (or "..._e") get that set's prompt and scorer.

    Attributes:
        file: path of the file, from the data folder.
        scorer: of other rows: a name of the scorers.
        answer_tokens: cap of other rows' answers.
    """

    name = "file.longbench"
    group = "file"
    summary = "any local file of LongBench's form (option: file)"

    file: str = ""
    scorer: str = "qa_f1"
    answer_tokens: int = 64

    def records(self, data: Path | None) -> Iterator[Record]:
        if not self.file:
            raise DataError(f"task {self.name} reads a file that is not named. Give its path in option file.")
        path = local.find(data, self.file, get="a JSON-lines file with context, input and answers")
        for number, row in enumerate(local.rows(path)):
            yield longbench_record(row, number)

    def shape(self, record: Record) -> Form:
        named = _forms().get(str(record.meta.get("dataset", "")).removesuffix("_e"))
        return named or Form(ask="\n\n{question}\n", scorer=self.scorer, new_tokens=self.answer_tokens)


TASKS = (LocalFile,)
