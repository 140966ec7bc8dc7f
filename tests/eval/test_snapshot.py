"""Snapshots: what caches held, checked against the caches; written whole, once, and without touching a row."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cli.conftest import byte_tokenizer
from tests.eval.toys import Toy, grid, run, toy_tokenizer
from tests.models import text, tiny

from kvthrift import Recipe, method, prefill
from kvthrift.errors import OptionError, RunError
from kvthrift.eval import round
from kvthrift.eval.decode import read
from kvthrift.eval.pieces import pieces, spans
from kvthrift.eval.probe import layout
from kvthrift.eval.record import key_of
from kvthrift.eval.recorder import Recorder
from kvthrift.eval.rows import read_rows
from kvthrift.eval.snapshot import SNAPSHOTS, Snapshot, SnapshotFile, read_snapshots

IDS = text(1, 150, seed=5)
RECIPES = [
    method("streamingllm", budget=48),
    method("snapkv", budget=48),
    method("adakv", budget=48),
    method("cake", budget=48),
    method("chunkkv", budget=48),
    method("snapkv", budget=48, merge="fold"),
    method("snapkv", budget=48, skip=(0,)),
    method("full"),
]
names = [str(recipe) for recipe in RECIPES]


def made(seed: int = 0, *, shape: tuple[int, int, int] = (3, 2, 13), **changes: object) -> Snapshot:
    """A snapshot of random bits."""
    layers, heads, tokens = shape
    kept = np.random.default_rng(seed).random(shape) < 0.4
    values = {
        "task": "toy", "sample": "000", "question": "hidden", "arm": f"snapkv@{seed}", "budget": "4",
        "method": "snapkv", "tokens": tuple(chr(97 + place % 26) for place in range(tokens)), "answer_spans": ((2, 4),),
        "layers": tuple(range(layers)), "heads": heads, "kept": kept, "answer": "é\n", "full_answer": "",
        "lengths": tuple(tuple(int(n) for n in row) for row in kept.sum(axis=-1)),
    }  # fmt: skip
    return Snapshot(**{**values, **changes})  # type: ignore[arg-type]


def same(ours: Snapshot, other: Snapshot) -> bool:
    return np.array_equal(ours.kept, other.kept) and ours.plain() == other.plain()


# -- what a cache holds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=names)
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma3"])
def test_kept_is_what_the_cache_says(recipe: Recipe, name: str) -> None:
    cache = read(tiny(name), IDS[0].tolist(), recipe, page=16).cache
    found = layout(cache, 150)
    numbers = [layer.number for layer in cache.state.layers]
    rows = {row.layer: row for row in cache.report().layers}
    assert found.layers == tuple(numbers)
    assert found.kept.shape == (len(numbers), rows[numbers[0]].heads, 150)
    assert np.array_equal(found.kept.sum(axis=-1), found.lengths)
    for number, lengths in zip(numbers, found.lengths, strict=True):
        row = rows[number]
        assert (min(lengths), max(lengths)) == (row.fewest, row.most)
        assert sum(lengths) == row.mean * row.heads
    compressed = [i for i, layer in enumerate(cache.state.layers) if not layer.whole]
    assert found.kept[compressed].sum() == cache.report().entries


def test_sinks_and_recent_are_exactly_those() -> None:
    found = layout(read(tiny("llama"), IDS[0].tolist(), method("streamingllm", budget=48), page=16).cache, 150)
    expected = np.zeros(150, dtype=bool)
    expected[:4] = expected[-44:] = True
    assert (found.kept == expected).all()


def test_heads_of_their_own_lengths_are_told_apart() -> None:
    found = layout(read(tiny("llama"), IDS[0].tolist(), method("adakv", budget=48), page=16).cache, 150)
    lengths = np.array(found.lengths)
    assert len(set(lengths.flatten().tolist())) > 1
    assert (lengths.sum(axis=1) == 2 * 48).all()  # heads, entries


def test_a_layer_left_whole_holds_all() -> None:
    found = layout(read(tiny("llama"), IDS[0].tolist(), method("snapkv", budget=48, skip=(1,)), page=16).cache, 150)
    assert found.kept[1].all()
    assert found.lengths == ((48, 48), (150, 150))


def test_layers_of_transformers_own_are_not_among_them() -> None:
    assert layout(read(tiny("gemma3"), IDS[0].tolist(), method("knorm", budget=48), page=16).cache, 150).layers == (
        1,
        3,
    )


def test_a_context_read_in_pieces() -> None:
    cache = prefill(tiny("llama"), IDS, method("snapkv", budget=48), chunk=50, page=16)
    found = layout(cache, 150)
    assert found.lengths == ((48, 48), (48, 48))
    assert found.kept[:, :, -32:].all()  # the window of the last piece


# -- the file ----------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 99), shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 40)))
def test_a_snapshot_survives_its_plain_form(seed: int, shape: tuple[int, int, int]) -> None:
    ours = made(seed, shape=shape)
    again = Snapshot.from_plain(json.loads(json.dumps(ours.plain())))
    assert same(ours, again)
    assert (again.tokens, again.lengths, again.answer_spans) == (ours.tokens, ours.lengths, ours.answer_spans)
    assert again.shares.tolist() == ours.kept.mean(axis=(0, 1)).tolist()


def test_each_is_kept_once(tmp_path: Path) -> None:
    for _ in range(2):
        file = SnapshotFile.open(tmp_path)
        file.add(made(1))
        file.add(made(1, answer="another"))
        file.add(made(2))
        file.close()
    found = read_snapshots(tmp_path)
    assert [one.arm for one in found] == ["snapkv@1", "snapkv@2"]
    assert same(found[0], made(1))


def test_a_cut_last_line_is_passed_over_and_made_again(tmp_path: Path) -> None:
    for seed in (1, 2):
        file = SnapshotFile.open(tmp_path)
        file.add(made(seed))
        file.close()
    path = tmp_path / SNAPSHOTS
    path.write_bytes(path.read_bytes()[:-30])
    assert [one.arm for one in read_snapshots(tmp_path)] == ["snapkv@1"]
    file = SnapshotFile.open(tmp_path)
    file.add(made(2))
    file.close()
    assert [same(one, made(seed)) for seed, one in enumerate(read_snapshots(tmp_path), 1)] == [True, True]


def test_no_file_is_no_snapshot(tmp_path: Path) -> None:
    assert read_snapshots(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kept": "AAAA"}, "kept is garbled"),
        ({"kept": "!"}, "kept is garbled"),
        ({"layers": [0]}, "kept has 10 bytes, but (1, 2, 13) need 4"),
        ({"heads": "two"}, "two"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_what_is_no_snapshot_is_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = tmp_path / SNAPSHOTS
    path.write_text("\n".join(json.dumps(made(1).plain() | more) for more in ({}, change)) + "\n", encoding="utf-8")
    for work in (read_snapshots, SnapshotFile.open):
        with pytest.raises(RunError, match=r"line 2 of .* is no snapshot") as caught:
            work(tmp_path)
        assert said in str(caught.value)


def test_a_missing_field_is_refused(tmp_path: Path) -> None:
    (tmp_path / SNAPSHOTS).write_text("{}\n", encoding="utf-8")
    with pytest.raises(RunError, match="is no snapshot"):
        read_snapshots(tmp_path)


# -- tokens as text ----------------------------------------------------------------------------------------------


@given(st.text(max_size=60))
def test_pieces_of_bytes_join_to_the_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text


def test_who_completes_a_character_has_it() -> None:
    tokenizer = byte_tokenizer(("a", "b"))
    assert pieces(tokenizer, tokenizer("abé\N{SLIGHTLY SMILING FACE}b")["input_ids"]) == (
        "ab", "", "é", "", "", "", "\N{SLIGHTLY SMILING FACE}", "b",
    )  # fmt: skip


def test_a_text_that_ends_inside_a_character_shows_that() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé")["input_ids"]
    assert pieces(tokenizer, ids[:-1]) == ("a", "\N{REPLACEMENT CHARACTER}")
    assert pieces(tokenizer, []) == ()


@given(st.sets(st.integers(0, 30)))
def test_spans_are_runs_of_places(places: set[int]) -> None:
    found = spans(sorted(places))
    assert {place for start, stop in found for place in range(start, stop)} == places
    assert all(before < after for (_, before), (after, _) in pairwise(found))


# -- in a run ----------------------------------------------------------------------------------------------------


def lasting(path: Path) -> list[dict[str, object]]:
    rows = read_rows(path / "rows.jsonl")
    return [{key: value for key, value in row.items() if key not in ("seconds", "session")} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the default number of snapshots, asked both ways."""
    path = tmp_path_factory.mktemp("whole")
    run(path, grid(question="both"))
    return path


def test_the_first_sample_is_kept_for_every_arm(whole: Path) -> None:
    found = read_snapshots(whole)
    rows = [row for row in read_rows(whole / "rows.jsonl") if row["sample"] == "000"]
    assert [one.key for one in found] == [key_of(row) for row in rows]
    for one, row in zip(found, rows, strict=True):
        assert (one.method, one.budget) == (row["recipe"]["name"], row["budget"])
        assert one.kept.sum() == sum(map(sum, one.lengths)) == row["entries"]
        assert one.kept.size == row["full_entries"]
        assert one.answer == row["answers"][0]
        assert len(one.tokens) == row["prompt_tokens"]
        full = next(r for r in rows if (r["arm"], r["question"]) == ("full", row["question"]))
        assert one.full_answer == full["answers"][0]


def test_tokens_are_what_was_read(whole: Path) -> None:
    (sample,) = Toy().samples(toy_tokenizer(), length=160, count=1, seed=0, data=None)
    for one in read_snapshots(whole):
        read_text = "".join(one.tokens)
        hidden = one.question == "hidden"
        assert sample.context in read_text
        assert (sample.turns[0].question.strip() in read_text) is not hidden
        ((start, stop),) = one.answer_spans
        assert "".join(one.tokens[start:stop]) == sample.turns[0].answers[0]


@pytest.mark.parametrize("count", [0, 2, 99])
def test_rows_are_the_same_with_any_number(whole: Path, tmp_path: Path, count: int) -> None:
    run(tmp_path, grid(question="both", snapshots=count))
    assert lasting(tmp_path) == lasting(whole)
    assert len(read_snapshots(tmp_path)) == min(count, 2) * 2 * 5  # samples, questions, arms
    assert (tmp_path / SNAPSHOTS).exists() is (count > 0)


@pytest.mark.parametrize("task", [Toy(mode="multi_turn", turns=3), Toy(mode="multi_request", turns=2)])
def test_of_several_questions_it_is_the_first(tmp_path: Path, task: Toy) -> None:
    rows = run(tmp_path, grid(question="both", samples=1, alone=0), task)
    for one, row in zip(read_snapshots(tmp_path), rows, strict=True):
        assert (one.key, one.answer) == (key_of(row), row["answers"][0])
        assert one.kept.shape[2] == len(one.tokens)


@pytest.mark.parametrize("rows", [0, 3, 7, 9])
@pytest.mark.parametrize("ahead", [0, 1, 0.5])
def test_a_run_that_was_cut_short_loses_and_doubles_none(whole: Path, tmp_path: Path, rows: int, ahead: float) -> None:
    """Killed behind a row, between a snapshot and its row, or while writing a snapshot."""
    copytree(whole, tmp_path, dirs_exist_ok=True)
    for name, count in (("rows.jsonl", rows), (SNAPSHOTS, rows + ahead)):
        lines = (tmp_path / name).read_bytes().splitlines(keepends=True)
        cut = lines[int(count)][:40] if count % 1 else b""
        (tmp_path / name).write_bytes(b"".join(lines[: int(count)]) + cut)
    run(tmp_path, grid(question="both"))
    assert lasting(tmp_path) == lasting(whole)
    ours, before = read_snapshots(tmp_path), read_snapshots(whole)
    assert [one.plain() for one in ours] == [one.plain() for one in before]


def test_what_failed_has_none_until_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = round.measured_row

    def fails(blank: dict[str, object], *rest: object) -> object:
        if blank["arm"] == "h2o@48":
            raise MemoryError("none left")
        return real(blank, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(round, "measured_row", fails)
    run(tmp_path, grid())
    assert "h2o@48" not in {one.arm for one in read_snapshots(tmp_path)}
    monkeypatch.setattr(round, "measured_row", real)
    run(tmp_path, grid(), retry=True)
    assert [one.arm for one in read_snapshots(tmp_path)][-1] == "h2o@48"


def test_a_snapshot_that_cannot_be_made_costs_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Snapshot:
        raise MemoryError("none left")

    monkeypatch.setattr(Recorder, "snapshot", fails)
    assert not [row for row in run(tmp_path, grid()) if row["error"]]
    assert read_snapshots(tmp_path) == []


def test_another_number_goes_on_in_the_same_folder(whole: Path, tmp_path: Path) -> None:
    copytree(whole, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:10]))
    run(tmp_path, replace(grid(question="both"), snapshots=2))
    assert lasting(tmp_path) == lasting(whole)
    assert len(read_snapshots(tmp_path)) == 20


def test_less_than_none_is_refused() -> None:
    with pytest.raises(OptionError, match="snapshots=-1 must be 0"):
        grid(snapshots=-1)
