"""Head importance: heads that look at the answer are told from those that do not, whatever interrupts a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvthrift import CalibrationError, OptionError
from kvthrift.calibrate import Artefact, Meta, load
from kvthrift.calibrate.heads import (
    Observation,
    Observe,
    Subject,
    calibrate_heads,
    combine,
    head_scores,
    importance,
    measure,
)
from kvthrift.calibrate.needles import NeedleTest, NeedleTests
from kvthrift.data import demo_text

SUBJECT = Subject("abc", "llama", layers=3, kv_heads=2, query_heads=4)
PLANTED = (1, 1, 0)  # layer, KV head, query head of the group
TEST = NeedleTest(prompt=(9, 9, 5, 6, 7, 9, 9, 9), answer=(5, 6, 7), span=(2, 5))


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def needles(length: int = 900, seed: int = 0) -> NeedleTests:
    return NeedleTests(letters, demo_text(), length=length, seed=seed)


def one_hot(*places: int, total: int = 10) -> Tensor:
    """Rows ``[1, 1, W, T]`` that look at one place each."""
    return torch.eye(total)[list(places)][None, None]


def span_of(ids: tuple[int, ...], width: int) -> int:
    """Where the answer begins in the prompt: what stands behind the question stands once more in the text."""
    text = "".join(map(chr, ids))
    asked = text.rpartition("\nAnswer: ")[2]
    asked = asked[: asked.index(" is") + 3]
    return text.index(asked) + len(asked)


def planted(mass: float = 1.0, found: Callable[[int], bool] = lambda step: True) -> Observe:
    """A model whose heads look all over the text, but for one that looks at the very token that comes next."""

    def observe(ids: tuple[int, ...], window: int) -> Observation:
        begin = span_of(ids, window)
        said = tuple(ids[begin + step] if found(step) else 0 for step in range(window))
        rng = torch.Generator().manual_seed(len(ids))
        rows = torch.rand(SUBJECT.layers, 2, 2, window, len(ids), generator=rng)
        rows /= rows.sum(-1, keepdim=True)
        look = torch.eye(len(ids))[begin : begin + window]
        at = PLANTED
        rows[at] = (1 - mass) * rows[at] + mass * look
        return Observation(said, ((number, rows[number]) for number in range(SUBJECT.layers)))

    return observe


def test_scores_of_a_row_are_what_the_papers_say() -> None:
    every = torch.ones(3, dtype=torch.bool)
    for places, retrieval, mass in (
        ((2, 3, 4), 1.0, 1 / 3),  # each step at the token that comes next
        ((4, 2, 3), 0.0, 1 / 3),  # inside the answer, at the wrong token
        ((0, 7, 9), 0.0, 0.0),  # elsewhere
        ((2, 7, 9), 1 / 3, 1 / 9),
    ):
        found = head_scores(one_hot(*places), TEST, every)
        assert [float(x) for x in found] == pytest.approx([retrieval, mass])


def test_the_same_token_elsewhere_is_not_the_answer() -> None:
    test = replace(TEST, prompt=(5, 6, 7, 9, 9, 5, 6, 7), span=(5, 8))
    found = head_scores(one_hot(0, 1, 2), test, torch.ones(3, dtype=torch.bool))
    assert [float(x) for x in found] == [0.0, 0.0]


def test_only_the_strongest_entries_give_mass() -> None:
    row = torch.tensor([0.3, 0.3, 0.2, 0.1, 0.02, 0.08, 0.0, 0.0, 0.0, 0.0])
    mass = head_scores(row.expand(1, 1, 3, 10), TEST, torch.ones(3, dtype=torch.bool))[1]
    assert float(mass) == pytest.approx(0.2 / 3)  # of the three strongest, one is inside


def test_steps_at_which_the_model_erred_do_not_count() -> None:
    rows = one_hot(2, 0, 0)
    found = head_scores(rows, TEST, torch.tensor([True, False, False]))
    assert [float(x) for x in found] == pytest.approx([1.0, 1 / 3])


@pytest.mark.parametrize("mass", [1.0, 0.2])
def test_a_planted_head_is_the_most_important(tmp_path: Path, mass: float) -> None:
    found = calibrate_heads(planted(mass), needles(), SUBJECT, tmp_path / "out", samples=6)
    table = found.tensors["importance"]
    layer, head, query = PLANTED
    assert divmod(int(table.argmax()), 2) == (layer, head)
    assert float(table.sum()) == pytest.approx(1.0)
    assert divmod(int(found.tensors["retrieval"].argmax()), 4) == (layer, 2 * head + query)
    assert float(found.tensors["retrieval"].max()) == 1.0
    if mass == 1.0:
        assert float(table[layer, head]) > 0.9


def test_the_file_says_what_it_is_of(tmp_path: Path) -> None:
    made = calibrate_heads(
        planted(found=lambda step: step > 0), needles(seed=3), SUBJECT, tmp_path / "out", samples=2,
        provenance={"text": "alice"},
    )  # fmt: skip
    found = load(tmp_path / "out", kind="head_importance")
    assert found.meta == made.meta
    steps = sum(len(needles(seed=3)[number].answer) for number in range(2))
    assert found.meta == Meta(
        "head_importance", "headkv", "abc", "llama", 3, 2,
        {"length": 900, "seed": 3, "text": "alice", "samples": 2, "steps": steps, "counted": steps - 2},
    )  # fmt: skip
    assert {name: tuple(t.shape) for name, t in found.tensors.items()} == {
        "importance": (3, 2), "retrieval": (3, 4), "mass": (3, 4),
    }  # fmt: skip
    assert len(importance(found)) == 3


class Killed(Exception):
    """Stands for SIGKILL between two tests."""


def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_file(tmp_path: Path) -> None:
    calls: list[int] = []

    def counting(ids: tuple[int, ...], window: int) -> Observation:
        if len(calls) in (2, 4):
            calls.append(-1)
            raise Killed
        calls.append(window)
        return planted(0.3)(ids, window)

    for _ in range(2):
        with pytest.raises(Killed):
            calibrate_heads(counting, needles(), SUBJECT, tmp_path / "halting", samples=5)
        assert not (tmp_path / "halting").exists()
    calibrate_heads(counting, needles(), SUBJECT, tmp_path / "halting", samples=5)
    calibrate_heads(planted(0.3), needles(), SUBJECT, tmp_path / "straight", samples=5)
    assert (tmp_path / "halting").read_bytes() == (tmp_path / "straight").read_bytes()
    assert len([window for window in calls if window > 0]) == 5  # no test was taken twice
    assert sorted(path.name for path in tmp_path.iterdir()) == ["halting", "straight"]


def test_what_another_run_left_is_not_mixed_in(tmp_path: Path) -> None:
    def broken(ids: tuple[int, ...], window: int) -> Observation:
        raise Killed

    with pytest.raises(Killed):
        calibrate_heads(broken, needles(seed=1), SUBJECT, tmp_path / "out")
    with pytest.raises(CalibrationError, match="seed 1 instead of 0"):
        calibrate_heads(planted(), needles(), SUBJECT, tmp_path / "out")
    calibrate_heads(planted(), needles(), SUBJECT, tmp_path / "out", samples=2, force=True)
    calibrate_heads(planted(), needles(), SUBJECT, tmp_path / "straight", samples=2)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "straight").read_bytes()


def test_an_existing_file_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")

    def never(ids: tuple[int, ...], window: int) -> Observation:
        raise AssertionError("measured")

    with pytest.raises(CalibrationError, match="exists"):
        calibrate_heads(never, needles(), SUBJECT, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_model_that_finds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no token of the answer in any of 3 needle tests"):
        calibrate_heads(planted(found=lambda step: False), needles(), SUBJECT, tmp_path / "out", samples=3)
    assert not (tmp_path / "out").exists()


def test_tests_without_a_find_do_not_dilute_the_rest() -> None:
    good = measure(planted(), needles()[0], SUBJECT)
    bad = measure(planted(found=lambda step: False), needles()[1], SUBJECT)
    assert bad["mass"] is None
    alone, both = combine([good], SUBJECT), combine([good, bad], SUBJECT)
    assert all(torch.equal(alone[name], both[name]) for name in alone)


def test_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="samples=0"):
        calibrate_heads(planted(), needles(), SUBJECT, tmp_path / "out", samples=0)


def test_progress_goes_from_nothing_to_all(tmp_path: Path) -> None:
    told: list[float] = []
    calibrate_heads(
        planted(), needles(), SUBJECT, tmp_path / "out", samples=4, progress=lambda _, part: told.append(part)
    )
    assert told == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"importance": torch.ones(2, 2)},
        {"importance": torch.ones(3, 2, 1)},
        {"importance": torch.tensor([[1.0, 1.0], [1.0, float("nan")], [1.0, 1.0]])},
        {"importance": torch.tensor([[1.0, 1.0], [1.0, float("inf")], [1.0, 1.0]])},
        {"importance": torch.tensor([[1.0, 1.0], [1.0, -0.1], [1.0, 1.0]])},
    ],
)
def test_a_table_that_is_none_is_refused(tensors: dict[str, Tensor]) -> None:
    meta = Meta("head_importance", "headkv", "abc", "llama", 3, 2, {})
    with pytest.raises(CalibrationError, match="3 x 2 heads"):
        importance(Artefact(meta, tensors))
