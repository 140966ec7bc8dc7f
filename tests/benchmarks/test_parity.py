"""What benchmarks/parity makes of two choices of entries, and of answers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from kvthrift.eval.rows import RowFile

FOLDER = Path(__file__).parents[2] / "benchmarks" / "parity"


def script(name: str) -> ModuleType:
    """One of the scripts, which are no package."""
    label = f"parity_{name}"
    found = importlib.util.spec_from_file_location(label, FOLDER / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[label] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


agree, answers, cases, score = (script(name) for name in ("agree", "answers", "cases", "score"))


def choice(*heads: list[int]) -> np.ndarray:
    """``[1, H, 4]``."""
    out = np.zeros((1, len(heads), 4), dtype=bool)
    for head, places in enumerate(heads):
        out[0, head, places] = True
    return out


def test_the_same_choice_is_exact() -> None:
    found = agree.compare(choice([0, 1], [2, 3]), choice([0, 1], [2, 3]), None, "head")
    assert found.exact
    assert (found.heads, found.heads_apart, found.common, found.share) == (2, 0, 4, 1.0)


def test_entries_of_equal_score_are_near_and_others_far() -> None:
    scores = np.array([[[5.0, 1.0, 1.00001, 0.0], [5.0, 1.0, 0.5, 0.0]]], dtype=np.float32)
    found = agree.compare(choice([0, 1], [0, 1]), choice([0, 2], [0, 2]), scores, "head")
    assert (found.near, found.far, found.heads_apart, found.common) == (2, 2, 2, 2)
    assert agree.compare(choice([0, 1]), choice([0, 2]), scores[:, :1], "head").rounding


def test_a_choice_of_unlike_size_is_never_rounding() -> None:
    found = agree.compare(choice([0, 1]), choice([0]), np.ones((1, 1, 4), np.float32), "head")
    assert (found.near, found.far, found.share) == (0, 1, 0.5)


@pytest.mark.parametrize(("rivals", "near"), [("head", 0), ("layer", 2)])
def test_rivals_say_who_may_be_swapped_for_whom(rivals: str, near: int) -> None:
    """One head has an entry less, another one more, with the same score."""
    found = agree.compare(choice([0], [0, 1]), choice([0, 1], [0]), np.ones((1, 2, 4), np.float32), rivals)
    assert (found.near, found.far) == (near, 2 - near)


def test_cases_have_names_of_their_own_and_say_why_they_differ() -> None:
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert {case.method for case in cases.CASES if not case.differs} >= {
        "SnapKV", "AdaKV(SnapKV)", "Expected Attention", "KVzip", "KVCompose", "KeyDiff", "TOVA", "Knorm",
        "LagKV, whole ranks", "PyramidKV, kvpress's counts", "ChunkKV, whole chunks",
    }  # fmt: skip


def line(number: int, digest: str = "aa") -> dict[str, object]:
    """A sample as it is exported."""
    turn = {"question": "q", "answers": ["42"], "answer_prefix": "", "max_new_tokens": 8}
    sample = {
        "id": f"{number}", "task": "t", "context": "", "turns": [turn], "scorer": "ruler_all", "chat": True,
        "mode": "single", "meta": {},
    }  # fmt: skip
    return {"task": "t", "id": f"{number}", "turn": 0, "prompt": digest, "sample": sample}


def said(number: int, press: str, **more: object) -> dict[str, object]:
    """An answer to it."""
    return {"task": "t", "id": f"{number}", "turn": 0, "press": press, **more}


def test_a_failed_answer_counts_as_nothing_and_a_later_one_replaces_it() -> None:
    given = [said(0, "knorm", error="no"), said(1, "knorm", error="no"), said(1, "knorm", tokens=[42])]
    found, failed = score.theirs([line(0), line(1)], given, lambda ids: str(ids[0]))
    assert found == {"kvpress knorm": {("t", "0"): 0.0, ("t", "1"): 1.0}}
    assert failed == 1


def test_a_runs_arms_stand_beside_them_on_the_same_prompts(tmp_path: Path) -> None:
    blank = {"task": "t", "sample": "0", "question": "hidden", "budget": "10%", "score": 1.0, "prompt": "aa"}
    with RowFile.open(tmp_path / "rows.jsonl") as file:
        file.append(blank | {"arm": "snapkv@10%"})
        file.append(blank | {"arm": "snapkv@512", "budget": "512"})
        file.append(blank | {"arm": "snapkv@10%", "question": "visible"})
    assert score.ours(tmp_path, "10%", {("t", "0"): "aa"}) == {"kvthrift snapkv": {("t", "0"): 1.0}}
    with pytest.raises(SystemExit, match="another prompt"):
        score.ours(tmp_path, "10%", {("t", "0"): "bb"})


def test_the_table_compares_samples_that_all_have() -> None:
    scores = {
        "kvpress full": {("t", "0"): 1.0, ("t", "1"): 1.0, ("t", "2"): 0.0},
        "kvpress knorm": {("t", "0"): 0.0, ("t", "1"): 1.0},
    }
    text = score.table(scores, "kvpress full")
    assert "| kvpress knorm | 50.0 " in text
    assert "-50.0" in text
    assert "t 2" in text


def test_a_press_gets_its_share_where_it_is_read() -> None:
    for name, (press, options) in answers.PRESSES.items():
        assert (press == "") == (name == "full")
        assert all(not isinstance(value, tuple) or value[0].endswith("Press") for value in options.values())


def test_a_line_that_a_kill_cut_short_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "answers-0.jsonl"
    path.write_text(json.dumps(said(0, "knorm")) + "\n" + '{"task": "t', encoding="utf-8")
    assert [row["press"] for row in answers.read(path)] == ["knorm"]
    assert "cut short" in capsys.readouterr().err
