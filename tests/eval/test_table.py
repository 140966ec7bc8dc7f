"""Tables from rows: pairs, failures, intervals, what is refused, and every format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.eval.toys import grid

from kvthrift.errors import RunError
from kvthrift.eval.arm import arms
from kvthrift.eval.folder import Run
from kvthrift.eval.formats import FORMATS
from kvthrift.eval.rows import Row
from kvthrift.eval.table import ALL, Line, tables

ARMS = arms(grid(methods=["snapkv"]))
SESSION = {
    "weights": "x", "commit": "1234567", "kvthrift": "0.1.0", "torch": "2", "transformers": "5", "dtype": "bfloat16",
    "device": "H200", "command": "kvthrift eval --tasks toy.word",
}  # fmt: skip


def row(
    arm: str, sample: int, score: float, *, task: str = "toy.word", question: str = "hidden", **changes: Any
) -> Row:
    """A row of an arm that went through."""
    agreement = [{"steps": 4, "mismatches": [1, 3], "kl": [0.0, 0.1, 0.2, 0.3], "top5": 0.5, "cut": True}]
    physics = {
        "removed": 0.5, "evicted_layer": 0.2, "evicted_model": 0.1, "relevant": 2, "ger_layer": 0.75, "ger_model": 0.5,
        "chance_layer": 0.25, "chance_model": 0.06, "consensus": [0.5, 1.0], "rigidity": [0.5, 0.25],
    }  # fmt: skip
    sizes = {
        "entries": 10,
        "full_entries": 20,
        "bytes": 512,
        "metadata_bytes": 32,
        "full_bytes": 1024,
        "read_bytes": 480,
    }
    alone = sample == 0
    return {
        "task": task, "sample": f"{sample:03d}", "question": question, "arm": arm, "session": 0, "note": "",
        "prompt": f"{sample:08x}", "score": score, **sizes, "peak_bytes": 2048 if alone else None, "alone": alone,
        "seconds": {"prefill": 1.0 + sample, "question": 0.1, "compression": 0.2, "decode": 0.5, "step": 0.01},
        "agreement": agreement, "physics": physics, "error": None, **changes,
    }  # fmt: skip


def rows(scores: dict[str, Sequence[float]], **changes: Any) -> list[Row]:
    return [row(arm, place, value, **changes) for arm, values in scores.items() for place, value in enumerate(values)]


SCORES = {"full": (1, 1, 0, 1), "random@48": (0, 0, 0, 0), "streamingllm@48": (0, 1, 0, 0), "snapkv@48": (1, 0, 1, 1)}


def run(found: Sequence[Row]) -> Run:
    return Run(Path("runs/x"), grid(methods=["snapkv"]), ARMS, (SESSION,), tuple(found))


def test_every_start_that_made_rows_is_named() -> None:
    other = {**SESSION, "commit": "89abcde", "device": "H100", "command": "kvthrift eval --workers 2"}
    idle = {**SESSION, "commit": "fffffff"}
    found = [*rows(SCORES)[:-1], {**rows(SCORES)[-1], "session": 2}]
    made = replace(run(found), sessions=(SESSION, idle, other))
    text = FORMATS["md"]([(made, tables(made))])
    assert "(bfloat16) on H200, H100;" in text
    assert "at commit 1234567 with" in text
    assert "at commit 89abcde with" in text
    assert "fffffff" not in text
    assert "`kvthrift eval --workers 2`" in text
    assert "1234567, 89abcde" in FORMATS["csv"]([(made, tables(made))])


def test_rows_may_come_in_any_order() -> None:
    found = [{**one, "place": [0, int(one["sample"])]} for one in rows(SCORES)]
    assert tables(run(found)) == tables(run(found[::-1]))


def test_no_seconds_beside_other_workers() -> None:
    found = lines([{**one, "workers": 2} for one in rows(SCORES)])
    assert found["full"].cells[ALL].cost["timed"] == 0
    assert found["full"].cells[ALL].cost["step_seconds"] is None


def lines(found: Sequence[Row]) -> dict[str, Line]:
    (table,) = tables(run(found))
    return {line.arm.name: line for line in table.lines}


def test_means_and_paired_differences() -> None:
    cell = lines(rows(SCORES))["snapkv@48"].cells[ALL]
    assert (cell.samples, cell.score.mean, cell.difference.mean) == (4, 75, 0)
    assert cell.score.low is not None
    assert cell.score.low < 75 < (cell.score.high or 0)
    assert cell.flips == {"right_to_wrong": 1, "wrong_to_right": 1}
    full = lines(rows(SCORES))["full"].cells[ALL]
    assert (full.difference.low, full.difference.high) == (0, 0)


def test_failures_count_as_zero() -> None:
    failed = {"score": 0.0, "error": {"reason": "out of memory", "message": "x"}}
    found = [{**one, **failed} if one["arm"] == "full" else one for one in rows(SCORES)]
    for one in found:
        if one["error"]:
            for key in ("prompt", "bytes", "alone", "agreement", "physics", "seconds"):
                del one[key]
    made = lines(found)
    assert made["full"].cells[ALL].failed == {"out of memory": 4}
    assert made["full"].cells[ALL].score.mean == 0
    assert made["full"].cells[ALL].cost["bytes"] is None
    assert made["snapkv@48"].cells[ALL].samples == 4
    assert "4 out of memory" in FORMATS["md"]([(run(found), tables(run(found)))])


def test_only_samples_that_all_arms_have_are_compared() -> None:
    found = rows(SCORES)[:-1]  # one row is to come
    (table,) = tables(run(found))
    assert table.samples == {"toy.word": 3}
    assert table.waiting == {"toy.word": 1}
    assert "1 more are not through all arms" in FORMATS["md"]([(run(found), (table,))])


def test_the_newest_row_counts() -> None:
    again = row("random@48", 0, 1.0)
    assert lines([*rows(SCORES), again])["random@48"].cells[ALL].score.mean == 25


def test_visible_and_hidden_are_apart() -> None:
    found = [*rows(SCORES), *rows(dict.fromkeys(SCORES, (0, 0)), question="visible")]
    hidden, visible = tables(run(found))
    assert (hidden.question, visible.question) == ("hidden", "visible")
    assert (hidden.samples, visible.samples) == ({"toy.word": 4}, {"toy.word": 2})
    text = FORMATS["md"]([(run(found), (hidden, visible))])
    assert text.count("(question hidden)") == text.count("(question visible)") == 4


def test_tasks_weigh_alike() -> None:
    found = [*rows(SCORES), *rows(dict.fromkeys(SCORES, (0,) * 2), task="toy.other")]
    made = lines(found)["full"]
    assert made.cells["toy.word"].score.mean == 75
    assert made.cells["toy.other"].score.mean == 0
    assert made.cells[ALL].score.mean == 37.5
    assert made.cells[ALL].samples == 6


def test_agreement_is_over_tokens() -> None:
    found = lines(rows(SCORES))["snapkv@48"].cells[ALL].agreement
    assert found is not None
    assert found["first_token"] == 1
    assert found["mismatch"] == pytest.approx(2 / 3)  # of the three steps behind the first
    assert found["top1"] == 0.5
    assert found["kl"] == pytest.approx(0.15)
    assert found["median_divergence"] == 1
    assert found["identical"] == 0
    assert found["agree_16"] is None


def test_failures_are_split_by_erasure() -> None:
    found = rows(SCORES)
    found[-1]["physics"] = {**found[-1]["physics"], "ger_layer": 0.1}
    physics = lines(found)["snapkv@48"].cells[ALL].physics
    assert physics is not None
    assert physics["alarm"]
    assert physics["failures"] == {
        "failed": 0.25, "erased": 0.75, "failed_if_erased": pytest.approx(1 / 3), "failed_if_kept": 0.0, "cases": 4
    }  # fmt: skip
    assert physics["consensus"] == 0.75


def test_seconds_are_of_arms_that_read_alone() -> None:
    cost = lines(rows(SCORES))["full"].cells[ALL].cost
    assert (cost["prefill_seconds"], cost["peak_bytes"], cost["timed"]) == (1.0, 2048, 1)
    assert cost["share"] == 0.5


def test_no_rows_are_refused() -> None:
    with pytest.raises(RunError, match="holds no rows"):
        tables(run([]))
    with pytest.raises(RunError, match="no sample that all 4 arms"):
        tables(run(rows({"full": (1, 1)})))


def test_different_prompts_are_not_compared() -> None:
    found = rows(SCORES)
    found[-1]["prompt"] = "ffffffff"
    with pytest.raises(RunError, match=r"different prompts for sample 003 of toy\.word"):
        tables(run(found))


def test_markdown_says_what_must_be_said() -> None:
    made = run([{**one, "note": "no template"} for one in rows(SCORES)])
    text = FORMATS["md"]([(made, tables(made))])
    for said in ("question hidden", "512 B", "50.0%", "1234567", "H200", "bfloat16", "no template", "(control)",
                 "toy.word 4", "kvthrift eval --tasks toy.word", "by chance", "75.0 ["):  # fmt: skip
        assert said in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith(("| ", "|---"))}
    assert len(widths) == 4  # four tables, each with rows as wide as its head


def test_many_tasks_go_without_intervals() -> None:
    found = [one for number in range(6) for one in rows(SCORES, task=f"task{number}")]
    text = FORMATS["md"]([(run(found), tables(run(found)))])
    assert "| task5 |" in text
    assert "| 75.0 |" in text


def test_csv_has_a_line_for_each_arm_and_task() -> None:
    found = [*rows(SCORES), *rows(SCORES, task="toy.other")]
    read = list(csv.DictReader(io.StringIO(FORMATS["csv"]([(run(found), tables(run(found)))]))))
    assert len(read) == 4 * 3
    assert {line["task"] for line in read} == {"all", "toy.word", "toy.other"}
    line = next(one for one in read if (one["arm"], one["task"]) == ("snapkv@48", "all"))
    assert float(line["score"]) == 75
    assert line["question"] == "hidden"
    assert line["commit"] == "1234567"
    assert float(line["bytes"]) == 512
    assert line["p_failed"] == "0.25"


def test_json_holds_everything() -> None:
    made = run(rows(SCORES))
    (found,) = json.loads(FORMATS["json"]([(made, tables(made))]))
    assert found["sessions"] == [SESSION]
    (table,) = found["tables"]
    assert [arm["arm"] for arm in table["arms"]] == [arm.name for arm in ARMS]
    assert table["arms"][-1]["tasks"]["all"]["score"]["mean"] == 75


def test_several_runs() -> None:
    made = run(rows(SCORES))
    other = replace(made, path=Path("runs/y"))
    pair = [(made, tables(made)), (other, tables(other))]
    assert {line["run"] for line in csv.DictReader(io.StringIO(FORMATS["csv"](pair)))} == {"x", "y"}
    assert len(json.loads(FORMATS["json"](pair))) == 2
    assert FORMATS["md"](pair).count("# x") == 1
