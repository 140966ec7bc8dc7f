"""How answers are scored, by name: an answer, its sample and its turn -> 0 to 1.

Scores over several references are the best of them. The runner's "perplexity" is none of these: it needs likelihoods.
Knows nothing of models or tasks.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from kvthrift.eval.metrics import answers_choice, answers_code, answers_number
from kvthrift.eval.metrics.rouge import overlap_f1, rouge_1, rouge_l, rouge_l_sentences
from kvthrift.eval.metrics.text import chinese_words, cleaned, first_line, normalised
from kvthrift.eval.sample import Sample, Turn

Scorer = Callable[[str, Sample, Turn], float]
Likeness = Callable[[str, str], float]

_SHAPES = (
    r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    r"\d+",
    r"[A-Z]{2,}",
    r"[a-z]+(?:['-][a-z]+)*",
)
_GLUE = {"a", "an", "and", "are", "is", "the", "words", "word"}


def best(likeness: Likeness) -> Scorer:
    """The scorer that takes the best of the references; only the first line counts where the sample says so."""

    def score(answer: str, sample: Sample, turn: Turn) -> float:
        text = first_line(answer) if sample.meta.get("first_line") else answer
        return max((likeness(text, gold) for gold in turn.answers), default=0.0)

    return score


def ruler_all(answer: str, sample: Sample, turn: Turn) -> float:
    """Share of the references that occur in the answer (RULER: needles, variables, words)."""
    text = cleaned(answer)
    return sum(gold.lower() in text for gold in turn.answers) / len(turn.answers)


def ruler_part(answer: str, sample: Sample, turn: Turn) -> float:
    """1 if any reference occurs in the answer (RULER: questions)."""
    text = cleaned(answer)
    return float(any(gold.lower() in text for gold in turn.answers))


def exact_set(answer: str, sample: Sample, turn: Turn) -> float:
    """1 if the answer has the references and nothing else of their shape.

    Containment does not punish a model that lists everything; this does. Shapes are uuids, numbers, capitals and words;
    references of another shape have to be the whole answer, normalised.
    """
    for shape in _SHAPES:
        if all(re.fullmatch(shape, gold) for gold in turn.answers):
            found = set(re.findall(rf"(?<![\w-]){shape}(?![\w-])", answer)) - _GLUE
            return float(found == set(turn.answers))
    return float(normalised(answer) in {normalised(gold) for gold in turn.answers})


def qa_f1(answer: str, gold: str) -> float:
    """F1 of normalised words (SQuAD, LongBench)."""
    return overlap_f1(normalised(answer).split(), normalised(gold).split())


def qa_f1_zh(answer: str, gold: str) -> float:
    """F1 of Chinese words without punctuation."""
    return overlap_f1(_chinese(answer), _chinese(gold))


def rouge_l_zh(answer: str, gold: str) -> float:
    """LongBench's ROUGE-L of Chinese words."""
    return rouge_l_sentences(" ".join(chinese_words(answer)), " ".join(chinese_words(gold)))


def _chinese(text: str) -> list[str]:
    """Words in lower case, without white space and punctuation of any script."""
    parts = (re.sub(r"[\W_]", "", word.lower()) for word in chinese_words(text))
    return [part for part in parts if part]


def substring(answer: str, gold: str) -> float:
    """1 if the reference occurs in the answer, case aside."""
    return float(gold.lower() in answer.lower())


def subspan(answer: str, gold: str) -> float:
    """1 if the reference occurs in the answer, both normalised (lost in the middle)."""
    wanted = normalised(gold)
    return float(bool(wanted) and wanted in normalised(answer))


def exact(answer: str, gold: str) -> float:
    """1 if the two are the same, normalised."""
    return float(normalised(answer) == normalised(gold))


SCORERS: dict[str, Scorer] = {
    "boxed": best(answers_number.boxed),
    "choice": answers_choice.choice,
    "classification": answers_choice.classification,
    "code_block": best(answers_code.code_block),
    "code_edit": best(answers_code.code_edit),
    "count": best(answers_number.share_of_numbers),
    "exact": best(exact),
    "exact_set": exact_set,
    "first_number": best(answers_number.first_number),
    "last_number": best(answers_number.last_number),
    "numbered_answers": answers_number.numbered_answers,
    "only_label": answers_choice.only_label,
    "order": best(answers_choice.order),
    "qa_f1": best(qa_f1),
    "qa_f1_zh": best(qa_f1_zh),
    "retrieval": best(answers_number.share_of_numbers),
    "rouge_1": best(rouge_1),
    "rouge_l": best(rouge_l),
    "rouge_l_sentences": best(rouge_l_sentences),
    "rouge_l_zh": best(rouge_l_zh),
    "ruler_all": ruler_all,
    "ruler_part": ruler_part,
    "subspan": best(subspan),
    "substring": best(substring),
}
"""Scorers by name."""
