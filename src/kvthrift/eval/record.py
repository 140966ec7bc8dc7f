"""From what an arm did on a sample to its row: a plain record that says everything a table needs.

Knows scorers by name; nothing of models or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from kvthrift.eval.arm import Arm
from kvthrift.eval.measure import Part
from kvthrift.eval.metrics.cost import combined
from kvthrift.eval.prompt import Prompt
from kvthrift.eval.rows import Row
from kvthrift.eval.sample import Sample, Turn

Score = Callable[[str, Sample, Turn], float]
Key = tuple[str, str, str, str]

LIKELIHOOD = "perplexity"  # the scorer that weighs a given answer: its score is 1 / perplexity
LONGEST_REASON = 500  # characters


def key_of(row: Mapping[str, Any]) -> Key:
    """What no two rows of a run share: task, sample, question, arm."""
    return row["task"], row["sample"], row["question"], row["arm"]


def question(visible: bool) -> str:
    """How a row says it."""
    return "visible" if visible else "hidden"


def blank_row(sample: Sample, arm: Arm, *, visible: bool, session: int) -> Row:
    """What a row of this sample and arm says before anything was measured."""
    return {
        "task": sample.task,
        "sample": sample.id,
        "question": question(visible),
        "arm": arm.name,
        "budget": arm.budget,
        "control": arm.control,
        "recipe": arm.recipe.plain(),
        "session": session,
        "meta": sample.meta,
    }


def measured_row(
    blank: Row,
    sample: Sample,
    prompt: Prompt,
    parts: Sequence[Part],
    decode: Callable[[Sequence[int]], str],
    score: Score | None,
) -> Row:
    """The row of an arm that went through.

    Args:
        blank: see :func:`blank_row`.
        parts: one for each reading.
        decode: ids -> text, special tokens left out.
        score: the sample's scorer; None where the answer was weighed.
    """
    answers = {turn: answer for part in parts for turn, answer in part.answers.items()}
    agreement = {turn: found for part in parts for turn, found in part.agreement.items()}
    texts = [decode(answers[turn].tokens) for turn in range(len(sample.turns))]
    likelihood = {turn: value for part in parts for turn, value in part.likelihood.items()}
    if score is None:
        scores = [math.exp(likelihood[turn]) for turn in range(len(sample.turns))]
    else:
        scores = [float(score(text, sample, turn)) for text, turn in zip(texts, sample.turns, strict=True)]
    return {
        **blank,
        "prompt": prompt.digest,
        "prompt_tokens": round(fmean(len(part.ids) for part in prompt.readings)),
        "context_tokens": prompt.context,
        "note": prompt.note,
        "answers": texts,
        "new_tokens": [len(answers[turn].tokens) for turn in range(len(sample.turns))],
        "score": fmean(scores),
        "scores": scores,
        "likelihood": [likelihood[turn] for turn in sorted(likelihood)] or None,
        **combined([part.cost for part in parts]),
        "agreement": [agreement[turn].plain() for turn in sorted(agreement)] or None,
        "physics": _mean([part.physics for part in parts]) or None,
        "error": None,
    }


def failed_row(blank: Row, reason: str, message: str) -> Row:
    """The row of an arm that did not go through: it counts as a score of 0."""
    return {**blank, "score": 0.0, "error": {"reason": reason, "message": message[:LONGEST_REASON]}}


def reason_of(error: BaseException) -> str:
    """In a word or two."""
    return "out of memory" if is_out_of_memory(error) else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def _mean(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of several readings; lists place by place, None where any is."""
    out: dict[str, Any] = {}
    for name in found[0]:
        values = [one[name] for one in found]
        if any(value is None for value in values):
            out[name] = None
        elif isinstance(values[0], list):
            out[name] = [fmean(place) for place in zip(*values, strict=True)]
        else:
            out[name] = round(fmean(values), 6)
    return out
