"""Ranking heads by what they look at, and layers by what they lose (CompressKV's calibration)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvthrift import CalibrationError
from kvthrift.calibrate.needles import NeedleTest
from kvthrift.calibrate.passages import Passages
from kvthrift.calibrate.retrieval import (
    Continuation,
    LayerRows,
    join_errors,
    layer_error,
    measure_errors_once,
    measure_heads_once,
    rank_heads,
    recall,
    span_mass,
)

TEST = NeedleTest(prompt=(9, 5, 6, 5, 9, 9), answer=(5, 6, 5), span=(1, 4))


def words(ids: object) -> list[str]:
    return [str(token) for token in ids]  # type: ignore[attr-defined]


def test_a_step_counts_as_often_as_its_token_is_in_the_needle() -> None:
    rows = torch.zeros(2, 3, 9)
    rows[0, :, 1:4] = 0.2  # head 0 has 0.6 on the whole needle at every step
    rows[1, :, 0] = 1.0
    assert span_mass(rows, TEST, (5, 6, 7)).tolist() == pytest.approx([0.6 * 2 + 0.6 * 1, 0.0])
    assert span_mass(rows, TEST, (7, 8, 7)).tolist() == [0.0, 0.0]


def test_recall_counts_words_as_often_as_they_are_wanted() -> None:
    assert recall(["a", "b", "c"], ["a", "a", "b"]) == pytest.approx(2 / 3)
    assert recall([], ["a"]) == 0.0


def said(tokens: tuple[int, ...], rows: Tensor) -> Continuation:
    layer = LayerRows(1, rows, torch.zeros(1, rows.shape[-1], 2), lambda: torch.zeros(1))
    return Continuation(tokens, [layer])


def test_only_answers_with_more_than_half_of_the_words_count() -> None:
    rows = torch.full((2, 2, 8), 0.125)
    found = measure_heads_once(lambda *_: said((5, 6), rows), TEST, words, (3, 2), 50)
    assert found["found"] == 1
    mass = torch.tensor(found["mass"])
    assert mass[1].tolist() == pytest.approx([0.375 * 3] * 2)
    assert not mass[0].any()
    assert not mass[2].any()  # a layer of another kind has no rows
    missed = measure_heads_once(lambda *_: said((5, 8), rows), TEST, words, (3, 2), 50)
    assert missed == {"found": 0, "mass": None}


def test_heads_are_ranked_by_their_mean_over_answered_tests() -> None:
    results = [
        {"found": 1, "mass": [[0.1, 0.5, 0.5, 0.0]]},
        {"found": 0, "mass": None},
        {"found": 1, "mass": [[0.9, 0.3, 0.3, 0.0]]},
    ]
    ranked, scores = rank_heads(results)
    assert ranked.tolist() == [[0, 1, 2, 3]]
    assert scores[0].tolist() == pytest.approx([0.5, 0.4, 0.4, 0.0])
    with pytest.raises(CalibrationError, match="the answer in none of 1 needle tests"):
        rank_heads([{"found": 0, "mass": None}])


PROMPT, STEPS = 60, 3


def layer(seed: int = 0) -> LayerRows:
    rng = torch.Generator().manual_seed(seed)
    steps = torch.arange(PROMPT + STEPS)
    logits = 3 * torch.randn(4, 8 + STEPS, PROMPT + STEPS, generator=rng)
    rows = logits.masked_fill(steps > torch.arange(PROMPT - 8, PROMPT + STEPS)[:, None], -torch.inf).softmax(dim=-1)
    values = torch.randn(2, PROMPT + STEPS, 6, generator=rng)
    weight = torch.randn(4, 6, 10, generator=rng)
    return LayerRows(0, rows, values, lambda: weight)


def test_the_error_is_that_of_attention_without_what_goes() -> None:
    given, heads = layer(), [2, 0]
    votes = given.rows[heads, :8, : PROMPT - 8].sum(dim=1)
    pooled = torch.nn.functional.avg_pool1d(votes[None], 5, 1, 2)[0].mean(dim=0)
    kept = {*pooled.topk(24).indices.tolist(), *range(PROMPT - 8, PROMPT + STEPS)}
    total = 0.0
    for step in range(STEPS):
        outs = []
        for only in (None, kept):
            out = torch.zeros(10)
            for h in range(4):
                row = given.rows[h, 8 + step].clone()
                if only is not None:
                    row[[n for n in range(PROMPT + STEPS) if n not in only]] = 0
                    row /= row.sum()
                out += row @ given.values[h // 2] @ given.output_weight()[h]
            outs.append(out)
        full, cut = outs
        total += float((cut - full).norm() / (full.norm() + 1e-5))
    assert layer_error(given, heads, PROMPT) == pytest.approx(total, rel=1e-4)
    assert total > 0.1


def test_a_prompt_within_the_budget_loses_nothing() -> None:
    rows = torch.rand(4, 8 + 2, 34)
    rows = rows / rows.sum(dim=-1, keepdim=True)
    given = LayerRows(0, rows, torch.randn(2, 34, 6), lambda: torch.randn(4, 6, 10))
    assert layer_error(given, [0, 1], 32) == pytest.approx(0.0, abs=1e-5)


def test_errors_are_normalised_for_each_kind_of_text() -> None:
    few, many = [{"errors": [1.0, 3.0]}], [{"errors": [300.0, 100.0]}, {"errors": [300.0, 100.0]}]
    assert join_errors([few, many]).tolist() == pytest.approx([0.5, 0.5])
    assert join_errors([few, few]).tolist() == pytest.approx([0.25, 0.75])
    with pytest.raises(CalibrationError, match="cannot be told apart"):
        join_errors([[{"errors": [0.0, 0.0]}], [{"errors": [0.0, 0.0]}]])


def test_errors_of_a_text_are_by_layer() -> None:
    go_on = lambda *_: Continuation((1,) * (STEPS + 1), [layer()])  # noqa: E731
    found = measure_errors_once(go_on, tuple(range(PROMPT)), torch.arange(4).repeat(2, 1), STEPS)
    assert found["errors"] == [pytest.approx(layer_error(layer(), [0, 1, 2, 3], PROMPT)), 0.0]


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_passages_are_repeatable_and_of_their_length() -> None:
    text = "".join(chr(97 + n % 26) for n in range(500))
    first, again = (Passages(letters, text, length=80, start=(1,)) for _ in range(2))
    assert all(first[n] == again[n] and len(first[n]) == 80 and first[n][0] == 1 for n in range(5))
    assert len({first[n] for n in range(5)}) > 1
    assert first[0] != Passages(letters, text, length=80, seed=1, start=(1,))[0]


@pytest.mark.parametrize(("length", "said_"), [(63, "too short to tell anything"), (600, "too few for passages")])
def test_passages_that_cannot_be_are_refused(length: int, said_: str) -> None:
    with pytest.raises(CalibrationError, match=said_):
        Passages(letters, "a" * 500, length=length)
