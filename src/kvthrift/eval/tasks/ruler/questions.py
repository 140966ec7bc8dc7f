"""RULER's two question tasks: gold paragraphs among distractors, shuffled and numbered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

from kvthrift.eval.sample import Sample, Tokenizer
from kvthrift.eval.tasks.fit import filled
from kvthrift.eval.tasks.passages import Question, multi_hop, squad
from kvthrift.eval.tasks.ruler.base import SHORTEST, Ruler

STATEMENT = "Answer the question from the given documents. Give only the answer, and no other words."


class Questions(Ruler):
    """A question over numbered documents. Data sets with fewer questions than asked for give all they have."""

    new_tokens = 32
    asks = (f"{STATEMENT}\n\nQuestion:",)
    scorer = "ruler_part"

    def read(self, data: Path | None) -> tuple[list[Question], list[str]]:
        """The questions, and every document there is."""
        raise NotImplementedError

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        questions, pool = self.read(data)
        Random(f"{seed}/{self.name}").shuffle(questions)

        def make(number: int, units: int) -> Sample:
            question = questions[number]
            rng = Random(f"{seed}/{self.name}/{question.id}")
            return self._ask(question, gather(rng, question, pool, units), length)

        step = 10 if length >= SHORTEST else 2
        yield from filled(make, self.room(tokenizer, length), count=count, step=step, items=len(questions))

    def _ask(self, question: Question, documents: list[str], length: int) -> Sample:
        text = "\n\n".join(f"Document {place}:\n{words}" for place, words in enumerate(documents, 1))
        head = f"{STATEMENT}\n\nThese are the given documents.\n\n{text}\n\n"
        prompt = f"{head}{STATEMENT}\n\nQuestion: {question.text}"
        places = [documents.index(gold) / max(len(documents) - 1, 1) for gold in question.gold]
        meta = {"source": question.source, "documents": len(documents), "depths": places}
        made = self.sample(0, length, prompt, " Answer:", list(question.answers), **meta)
        return Sample(question.id, made.task, made.context, made.turns, made.scorer, meta=made.meta)


def gather(rng: Random, question: Question, pool: list[str], count: int) -> list[str]:
    """A question's gold documents and distractors, its own first, ``count`` in all and shuffled.

    Where the pool runs out it is repeated, gold documents excepted.
    """
    gold = list(question.gold)
    near = [words for words in question.near if words not in gold]
    own = {*gold, *near}
    far = [words for words in pool if words not in own]
    wanted = max(count - len(gold), 0)
    chosen = rng.sample(near, wanted) if wanted <= len(near) else near + _repeated(rng, far, wanted - len(near))
    chosen += gold
    rng.shuffle(chosen)
    return chosen


def _repeated(rng: Random, pool: list[str], count: int) -> list[str]:
    """``count`` of a pool, each as often as needed."""
    rounds, rest = divmod(count, len(pool))
    return pool * rounds + rng.sample(pool, rest)


class OneHop(Questions):
    name = "ruler.qa_1"
    summary = "SQuAD questions over numbered paragraphs"

    def read(self, data: Path | None) -> tuple[list[Question], list[str]]:
        return squad(data)


class TwoHops(Questions):
    name = "ruler.qa_2"
    summary = "two-hop questions over numbered paragraphs"

    def read(self, data: Path | None) -> tuple[list[Question], list[str]]:
        return multi_hop(data)


TASKS = (OneHop, TwoHops)
