"""Which query heads find meaning, and which layers suffer most when entries go (2508.02401, as its code does it).

First needle tests rank the query heads of every layer: the model answers by itself, and at every step whose token
occurs in the needle, each head is credited with its attention on the whole needle. A token that occurs there m times
counts m times, which the code does and may not intend. Only answers with more than half of the needle's words count.

Then every layer's error: while the model goes on with a text, what the attention block gives (behind the output
projection) with all entries is compared with what it gives with few, chosen by the ranked heads. The relative
Frobenius error is summed over steps and samples, normalised over layers for each kind of text, and averaged. The texts
are needle tests and passages, never those of an evaluation. A bias of the output projection is left out.

Knows no model library: a model is a function from token ids to how it goes on and where it looks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvthrift.calibrate.artefact import Artefact
from kvthrift.calibrate.needles import NeedleTest
from kvthrift.errors import CalibrationError
from kvthrift.score.chosen import pooled_rows

KIND = "semantic_retrieval"
HEADS, WINDOW, KERNEL, BUDGET = 4, 8, 5, 32  # of the selection whose error is measured
ENOUGH = 0.5  # of the needle's words


@dataclass(frozen=True)
class LayerRows:
    """One layer while a text was continued.

    Attributes:
        number: the model's own number of the layer.
        rows: ``[HG, W + S, T]`` attention of the last W prompt tokens' queries, then of S generated tokens'.
        values: ``[H, T, Dv]``.
        output_weight: gives the output projection ``[HG, Dv, hidden]``.
    """

    number: int
    rows: Tensor
    values: Tensor
    output_weight: Callable[[], Tensor]


@dataclass(frozen=True)
class Continuation:
    """What a model said behind a text (``S + 1`` ids), and its layers' rows over text and words."""

    said: tuple[int, ...]
    layers: Iterable[LayerRows]


Continue = Callable[[tuple[int, ...], int, int], Continuation]
"""Reads token ids and goes on greedily: ids, W, most tokens to say -> what was said."""

Words = Callable[[Sequence[int]], list[str]]
"""The words of some token ids."""


def recall(said: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of ``wanted`` words that were said, each as often as it is wanted (ROUGE-1 recall)."""
    return sum((Counter(said) & Counter(wanted)).values()) / max(len(wanted), 1)


def span_mass(rows: Tensor, test: NeedleTest, said: Sequence[int]) -> Tensor:
    """Attention ``[HG]`` on the needle at the steps that say one of its tokens, float64.

    Args:
        rows: ``[HG, S, T]``, the queries that say ``said`` (S of them).
        test: what was read.
    """
    begin, end = test.span
    needle = Counter(test.prompt[begin:end])
    times = torch.tensor([needle[token] for token in said], dtype=torch.float64, device=rows.device)
    return (rows[..., begin:end].double().sum(dim=-1) * times).sum(dim=-1)


def measure_heads_once(go_on: Continue, test: NeedleTest, words: Words, sizes: tuple[int, int], most: int) -> Any:
    """One needle test as plain data: whether the answer was found, and if so the credit ``[L][HG]`` of every head."""
    seen = go_on(test.prompt, 1, most)
    if recall(words(seen.said), words(test.answer)) <= ENOUGH:
        return {"found": 0, "mass": None}
    mass = torch.zeros(sizes, dtype=torch.float64)
    for layer in seen.layers:
        mass[layer.number] = span_mass(layer.rows, test, seen.said).cpu()
    return {"found": 1, "mass": mass.tolist()}


def rank_heads(results: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Query heads of every layer by mean credit, best first, ``[L, HG]`` int64, and the credit in float32.

    Raises:
        CalibrationError: no test was answered, so that heads cannot be told apart.
    """
    found = [result["mass"] for result in results if result["found"]]
    if not found:
        raise CalibrationError(
            f"the model said the answer in none of {len(results)} needle tests, so its heads cannot be told apart. "
            "Use a model that can answer questions, a smaller length, or more samples."
        )
    scores = torch.tensor(found, dtype=torch.float64).mean(dim=0)
    return scores.argsort(dim=-1, descending=True, stable=True), scores.float()


def layer_error(layer: LayerRows, heads: Sequence[int], prompt: int, *, window: int = WINDOW) -> float:
    """Relative error of a layer's output without most of the prompt, summed over the generated tokens.

    Args:
        layer: rows of ``window`` prompt queries and of S generated tokens'.
        heads: the query heads that choose.
        prompt: tokens of the prompt; generated ones are always there.
    """
    rows, past = layer.rows.float(), max(prompt - window, 0)
    score = pooled_rows(rows[list(heads), :window, :past], "avg", KERNEL).mean(dim=0)
    kept = score.argsort(descending=True, stable=True)[: BUDGET - window]
    held = torch.zeros(rows.shape[-1], device=rows.device)
    held[kept] = 1.0
    held[past:] = 1.0
    whole = rows[:, window:]  # [HG, S, T]
    few = whole * held
    few = few / few.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    values = layer.values.float().repeat_interleave(len(rows) // len(layer.values), dim=0)  # [HG, T, Dv]
    weight = layer.output_weight().float()
    full, cut = (torch.einsum("hsv,hvo->so", r @ values, weight) for r in (whole, few))
    return float(((cut - full).norm(dim=-1) / (full.norm(dim=-1) + 1e-5)).sum())


def measure_errors_once(go_on: Continue, ids: tuple[int, ...], heads: Tensor, steps: int) -> dict[str, Any]:
    """One text as plain data: the error ``[L]`` of every layer; ``heads [L, HG]`` ranked."""
    errors = [0.0] * len(heads)
    seen = go_on(ids, WINDOW, steps)
    for layer in seen.layers:
        errors[layer.number] = layer_error(layer, heads[layer.number, :HEADS].tolist(), len(ids))
    return {"errors": errors}


def join_errors(sets: Sequence[Sequence[dict[str, Any]]]) -> Tensor:
    """Errors of samples of several kinds of text as one share ``[L]`` of every layer, float32, sum 1.

    Raises:
        CalibrationError: nothing was lost anywhere, so that layers cannot be told apart.
    """
    summed = [torch.tensor([r["errors"] for r in results], dtype=torch.float64).sum(dim=0) for results in sets]
    shares = torch.stack([errors / errors.sum().clamp(min=1e-30) for errors in summed]).mean(dim=0)
    if not bool(shares.isfinite().all()) or float(shares.sum()) <= 0:
        raise CalibrationError(
            "no layer's output changed when entries went, so layers cannot be told apart: the model stopped at once, "
            "or the texts are too short. Give longer ones."
        )
    return (shares / shares.sum()).float()


def tables(artefact: Artefact) -> tuple[tuple[tuple[int, ...], ...], tuple[float, ...]]:
    """Ranked query heads ``[L][HG]`` and layer errors ``[L]`` of an artefact.

    Raises:
        CalibrationError: it lacks one of them, or they are not what such tables can be.
    """
    heads, errors = artefact.tensors.get("heads"), artefact.tensors.get("layer_error")
    layers = artefact.meta.layers
    whole = heads is not None and errors is not None and heads.ndim == 2 and len(heads) == layers
    whole = whole and errors is not None and tuple(errors.shape) == (layers,)
    if not whole or heads is None or errors is None or heads.shape[1] % artefact.meta.kv_heads:
        raise CalibrationError(
            f"this calibration's tables of heads and layer errors are not those of {layers} layers of "
            f"{artefact.meta.kv_heads} KV heads. Calibrate again."
        )
    complete = bool((heads.sort(dim=-1).values == torch.arange(heads.shape[1])).all())
    if not complete or not bool((errors.isfinite() & (errors >= 0)).all()):
        raise CalibrationError(
            "this calibration does not list every query head of a layer once, or its errors are not finite and 0 or "
            "more. Calibrate again."
        )
    return tuple(tuple(row) for row in heads.tolist()), tuple(errors.double().tolist())
