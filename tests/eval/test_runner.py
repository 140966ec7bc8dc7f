"""The run of a grid: every arm on every sample, the same numbers however it is interrupted, failures as rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from tests.eval.toys import OtherToy, Toy, bench, grid, run, runner
from tests.models import tiny

from kvthrift.errors import ContextError, DataError, KvthriftError, RunError, UnknownNameError, UnsupportedModelError
from kvthrift.eval import measure, round
from kvthrift.eval.arm import arms
from kvthrift.eval.decode import read
from kvthrift.eval.record import key_of
from kvthrift.eval.rows import Row, read_rows
from kvthrift.eval.runner import Progress

ARMS = ["full", "random@48", "streamingllm@48", "snapkv@48", "h2o@48"]


def lasting(rows: list[Row]) -> list[Row]:
    """Rows without what differs from one start to the next."""
    return [{key: value for key, value in row.items() if key not in ("seconds", "session")} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of ``grid()``; copied, never written to."""
    path = tmp_path_factory.mktemp("whole")
    run(path, grid())
    return path


def test_every_arm_answers_every_sample(tmp_path: Path) -> None:
    seen: list[Progress] = []
    rows = run(
        tmp_path, grid(question="both"), Toy(), OtherToy(),
        tell=lambda now: seen.append(Progress(now.done, now.total, now.row)),
    )  # fmt: skip
    assert [key_of(row) for row in rows] == [
        (task, f"{sample:03d}", question, arm)
        for task in ("toy.word", "toy.other")
        for sample in range(2)
        for question in ("hidden", "visible")
        for arm in ARMS
    ]
    assert not [row for row in rows if row["error"]]
    assert (seen[0].done, seen[0].total) == (0, 40)
    assert (seen[-1].done, seen[-1].total) == (40, 40)


def test_arms_are_paired(tmp_path: Path) -> None:
    rows = run(tmp_path, grid(question="both"))
    for sample in {row["sample"] for row in rows}:
        for question in ("hidden", "visible"):
            same = [row for row in rows if (row["sample"], row["question"]) == (sample, question)]
            assert len({row["prompt"] for row in same}) == 1
            assert len({row["prompt_tokens"] for row in same}) == 1


@pytest.mark.parametrize("task", [Toy(), Toy(mode="multi_turn", turns=3), Toy(mode="multi_request", turns=2)])
def test_the_same_rows_whoever_reads(tmp_path: Path, task: Toy) -> None:
    made = grid(question="both", samples=1, methods=["adakv", "h2o", "expected_attention"], options={})
    shared = run(tmp_path / "shared", replace(made, alone=0), task)
    alone = run(tmp_path / "alone", replace(made, alone=-1), task)
    assert {row["alone"] for row in shared} == {False}
    assert {row["alone"] for row in alone} == {True}
    same = ("answers", "score", "entries", "bytes", "metadata_bytes", "read_bytes", "prompt", "recipe")
    for ours, theirs in zip(shared, alone, strict=True):
        assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
        assert ours["physics"] == theirs["physics"]
        assert ours["peak_bytes"] is None
        assert theirs["peak_bytes"] >= theirs["bytes"]
        for one_turn, other_turn in zip(ours["agreement"], theirs["agreement"], strict=True):
            assert one_turn["mismatches"] == other_turn["mismatches"]
            assert one_turn["kl"] == pytest.approx(other_turn["kl"], abs=1e-4)


def test_a_second_start_measures_nothing_again(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(round, "read", None)
    monkeypatch.setattr(measure, "read", None)
    assert run(tmp_path, grid()) == read_rows(whole / "rows.jsonl")


@pytest.mark.parametrize("left", [0, 4, 6, 9])
def test_a_run_that_was_cut_short_goes_on_to_the_same_rows(whole: Path, tmp_path: Path, left: int) -> None:
    copytree(whole, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "rows.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:left]) + lines[left][:40])
    again = run(tmp_path, grid())
    assert lasting(again) == lasting(read_rows(whole / "rows.jsonl"))
    assert {row["session"] for row in again[left:]} == {1}


def test_a_hole_in_the_middle_is_filled(whole: Path, tmp_path: Path) -> None:
    copytree(whole, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "rows.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:6] + lines[8:]))
    again, before = run(tmp_path, grid()), read_rows(whole / "rows.jsonl")
    assert sorted(map(key_of, again)) == sorted(map(key_of, before))
    assert lasting(again[-2:]) == lasting(before[6:8])


def test_the_full_cache_agrees_with_itself(tmp_path: Path) -> None:
    for row in run(tmp_path, grid(question="both"), Toy(new_tokens=9)):
        if row["arm"] == "full":
            (found,) = row["agreement"]
            assert found["mismatches"] == []
            assert max(found["kl"]) < 1e-5
            assert row["physics"]["removed"] == row["physics"]["ger_model"] == 0


def test_the_first_token_of_a_visible_question_is_free(tmp_path: Path) -> None:
    rows = run(tmp_path, grid(question="visible"))
    assert all(0 not in row["agreement"][0]["mismatches"] for row in rows)
    assert any(row["agreement"][0]["mismatches"] for row in rows)


def test_out_of_memory_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measure.Work.compressed

    def fails(self: measure.Work, arm: Any, reference: Any) -> measure.Part:
        if arm.name == "snapkv@48":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return real(self, arm, reference)

    monkeypatch.setattr(measure.Work, "compressed", fails)
    rows = run(tmp_path, grid())
    failed = [row for row in rows if row["error"]]
    assert {row["arm"] for row in failed} == {"snapkv@48"}
    assert len(failed) == 2
    assert failed[0]["error"]["reason"] == "out of memory"
    assert "20.00 GiB" in failed[0]["error"]["message"]
    assert failed[0]["score"] == 0

    monkeypatch.setattr(measure.Work, "compressed", real)
    assert run(tmp_path, grid()) == rows  # a failure is a result
    again = run(tmp_path, grid(), retry=True)
    assert len(again) == len(rows) + 2
    assert not [row for row in again[-2:] if row["error"]]


def test_no_room_for_a_shared_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:126] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(round, "read", fails)
    rows = run(tmp_path, grid(alone=0))
    assert not [row for row in rows if row["error"]]
    assert all(row["alone"] for row in rows)


def test_no_room_for_the_full_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(measure.Work, "full", fails)
    rows = run(tmp_path, grid())
    assert [row["error"]["reason"] for row in rows if row["arm"] == "full"] == ["out of memory"] * 2
    assert not [row for row in rows if row["error"] and row["arm"] != "full"]
    assert all(row["agreement"] is None for row in rows if not row["error"])


def test_a_failing_scorer_is_a_row(tmp_path: Path) -> None:
    def fails(*_: Any) -> float:
        raise ZeroDivisionError("no words")

    rows = run(tmp_path, grid(samples=1), scorers={"letters": fails})
    assert [row["error"] for row in rows] == [{"reason": "ZeroDivisionError", "message": "no words"}] * 5


def test_a_budget_too_small_for_a_sample_is_a_row(tmp_path: Path) -> None:
    rows = run(tmp_path, grid(samples=1, budgets=["5%"], methods=["knorm"], options={}))
    failed = {row["arm"]: row["error"]["reason"] for row in rows if row["error"]}
    assert failed == {"random@5%": "BudgetError"}  # it always keeps 36 entries


def test_a_sample_beyond_the_model_is_a_row(tmp_path: Path) -> None:
    rows = run(tmp_path, grid(samples=1), Toy(new_tokens=4000))
    assert [row["error"]["reason"] for row in rows] == ["ContextError"] * 5
    assert "4096" in rows[0]["error"]["message"]


def test_a_lost_gpu_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure.Work, "full", fails)
    with pytest.raises(RunError, match="the GPU is lost"):
        run(tmp_path, grid())


def test_weighed_answers(tmp_path: Path) -> None:
    made = grid(methods=["knorm"], budgets=["400", "48"], options={}, samples=2)
    rows = run(tmp_path, made, Toy(scorer="perplexity"))
    full, whole, small = ([row for row in rows if row["arm"] == arm] for arm in ("full", "knorm@400", "knorm@48"))
    for a, b, c in zip(full, whole, small, strict=True):
        assert 0 < a["score"] < 1
        assert a["score"] == b["score"] != c["score"]
        assert a["answers"] == c["answers"]
    model = tiny("llama", "sdpa")
    one_sample = next(Toy().samples(None, length=160, count=1, seed=0, data=None))
    tokenizer = bench().tokenizer
    message = [{"role": "user", "content": one_sample.context + one_sample.turns[0].question}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) + "Here:"
    before, gold = (tokenizer(part)["input_ids"] for part in (text, one_sample.turns[0].answers[0]))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([before + gold])).logits[0, len(before) - 1 : -1]
    chance = logits.log_softmax(-1).gather(-1, torch.tensor(gold)[:, None]).mean().exp()
    assert full[0]["score"] == pytest.approx(float(chance), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"length": 5000}, ContextError, "reads at most 4096"),
        ({"methods": ["knorm"], "options": {"knorm": {}}, "length": 1}, DataError, "no samples"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(changes: dict[str, Any], error: type[KvthriftError], said: str) -> None:
    class Empty(Toy):
        def samples(self, tokenizer: Any, *, length: int, **rest: Any) -> Any:
            return super().samples(tokenizer, length=length, **rest) if length > 1 else iter(())

    with pytest.raises(error, match=said):
        runner(grid(**changes), Empty()).check()


def test_scorers_and_models_are_checked() -> None:
    runner(grid()).check()
    with pytest.raises(UnknownNameError, match=r"scorer of task toy\.word"):
        runner(grid(), Toy(scorer="taste")).check()
    with pytest.raises(UnsupportedModelError):
        runner(grid(), bench=replace(bench(), model=tiny("mistral_sliding"))).check()


def test_fewer_samples_than_asked_for(tmp_path: Path) -> None:
    class Single(Toy):
        def samples(self, tokenizer: Any, *, count: int, **rest: Any) -> Any:
            return super().samples(tokenizer, count=min(count, 1), **rest)

    seen: list[tuple[int, int]] = []
    run(tmp_path, grid(), Single(), Toy(), tell=lambda now: seen.append((now.done, now.total)))
    assert seen[-1] == (15, 15)


def test_answers_do_not_depend_on_what_else_is_compared(tmp_path: Path) -> None:
    small = run(tmp_path / "small", grid(methods=["snapkv"]))
    large = run(tmp_path / "large", grid(methods=["snapkv", "lava", "h2o"]))
    found = {key_of(row): row["answers"] for row in large}
    assert {key_of(row): row["answers"] for row in small}.items() <= found.items()
    assert {arm.name for arm in arms(grid(methods=["snapkv"]))} == {row["arm"] for row in small}


def test_reading_with_many_observers_reads_the_same() -> None:
    model = tiny("llama")
    ids = list(range(1, 150))
    recipes = [arm.recipe for arm in arms(grid()) if arm.name != "full"]
    full = arms(grid())[0].recipe
    plain, watched = read(model, ids, full, page=16), read(model, ids, full, page=16, observe=recipes)
    torch.testing.assert_close(plain.logits, watched.logits)
