"""L-Eval's documents and questions (2307.11088), one sample a question, in LongBench's form.

Prompts are our own. Each file of the data folder's ``LEval`` holds documents with several questions and answers each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from kvthrift.eval.tasks import local
from kvthrift.eval.tasks.records import Form, Record, Recorded

_BRIEF = "\n\nAnswer the question about the document above briefly, without explanation.\n\nQuestion: {question}\n"
_QUESTION = Form("Read the document.\n\n", _BRIEF, "Answer:", new_tokens=64)
_SUMMARY = Form("Read the document.\n\n", "\n\n{question}\n", "Summary:", "rouge_l", new_tokens=512)
_CHOICE = "\n\nAnswer the question about the story above with the letter of the right choice.\n\n{question}\n"


class LEval(Recorded):
    """One of L-Eval's tasks, named like its file."""

    group = "leval"
    form = _QUESTION

    def records(self, data: Path | None) -> Iterator[Record]:
        file = f"LEval/{self.name.removeprefix('leval.')}.jsonl"
        path = local.find(data, file, get="L-Eval's files (OpenLMLab/LEval, LEval-data)")
        for document, row in enumerate(local.rows(path)):
            asked = zip(row["instructions"], row["outputs"], strict=True)
            for place, (question, answer) in enumerate(asked):
                yield self.record(f"{document}-{place}", row["input"], question, str(answer))

    def record(self, name: str, context: str, question: str, answer: str) -> Record:
        """One question."""
        return Record(name, context, question.strip(), (answer.strip(),))


class ScientificQA(LEval):
    name = "leval.scientific_qa"
    summary = "questions about scientific papers"


class MultiDocQA(LEval):
    name = "leval.multidoc_qa"
    summary = "questions of a dialogue over several official pages"


class LegalQA(LEval):
    name = "leval.legal_contract_qa"
    summary = "clauses of contracts"
    form = Form("Read the contract.\n\n", _BRIEF, "Answer:", new_tokens=128)


class NaturalQuestion(LEval):
    name = "leval.natural_question"
    summary = "search questions about Wikipedia pages"


class Quality(LEval):
    name = "leval.quality"
    summary = "multiple choice about stories"
    form = Form("Read the story.\n\n", _CHOICE, "Answer: (", "choice", new_tokens=8)

    def record(self, name: str, context: str, question: str, answer: str) -> Record:
        letter = re.search(r"[A-D]", answer)
        gold = letter[0] if letter else answer
        return Record(name, context, question.strip(), (gold,), {"choices": ("A", "B", "C", "D")})


class SciFi(LEval):
    name = "leval.sci_fi"
    summary = "true or false in the world of a story"
    form = Form("Read the story.\n\n", "\n\n{question}\n", "Answer:", "choice", new_tokens=8)

    def record(self, name: str, context: str, question: str, answer: str) -> Record:
        truth = answer.split()[0]  # "True [fact: False]": the story's world comes first
        return Record(name, context, question.strip(), (truth,), {"choices": ("True", "False")})


class Gsm100(LEval):
    name = "leval.gsm100"
    summary = "grade school mathematics after 16 worked examples"
    form = Form("", "{question}\n", "", "last_number", new_tokens=256, chat=False)


class GovReport(LEval):
    name = "leval.gov_report_summ"
    summary = "summaries of government reports"
    form = _SUMMARY


class Meeting(LEval):
    name = "leval.meeting_summ"
    summary = "summaries of meetings that answer a question"
    form = Form("Read the transcript.\n\n", _BRIEF, "Answer:", "rouge_l", new_tokens=256)


class Patent(LEval):
    name = "leval.patent_summ"
    summary = "summaries of patents"
    form = _SUMMARY


TASKS = (
    ScientificQA,
    MultiDocQA,
    LegalQA,
    NaturalQuestion,
    Quality,
    SciFi,
    Gsm100,
    GovReport,
    Meeting,
    Patent,
)
