"""Workers: the table of one process, whatever happens to them or to their parent; never a hang or an omission."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from tests.eval.helped import GRID, TASKS, broken, fragile, ready
from tests.eval.test_killed import HOME, lasting
from tests.eval.toys import grid, run

from kvthrift.errors import RunError
from kvthrift.eval.folder import read_run
from kvthrift.eval.record import key_of
from kvthrift.eval.rows import read_rows
from kvthrift.eval.runner import Progress
from kvthrift.eval.workers import DIED, Crew

ROWS = 40
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def start(path: Path) -> subprocess.Popen[str]:
    """A run with two workers in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": f"{HOME / 'src'}:{HOME}", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.eval.helped", str(path)],
        cwd=HOME, env=environment, text=True, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def wait_for_rows(path: Path, wanted: int) -> None:
    deadline = time.monotonic() + 100
    while len(read_rows(path / "rows.jsonl")) < wanted:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def group_of(leader: int) -> list[int]:
    """Processes that live in a group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == leader and state != "Z":
            found.append(int(folder.name))
    return found


def gone(leader: int, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while group_of(leader) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not group_of(leader)


def test_workers_make_the_same_table_however_they_are_ended(tmp_path: Path) -> None:
    run(tmp_path / "whole", GRID, *TASKS)
    helped = tmp_path / "helped"

    killed = start(helped)
    wait_for_rows(helped, 23)  # 20 are timed, and made by the parent
    killed.kill()
    killed.communicate()
    assert gone(killed.pid)
    before = len(read_rows(helped / "rows.jsonl"))
    assert before < ROWS

    interrupted = start(helped)
    wait_for_rows(helped, before + 1)
    os.killpg(interrupted.pid, signal.SIGINT)
    _, said = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130
    assert "Traceback" not in said, said
    assert gone(interrupted.pid)

    seen: list[int] = []

    def tell(now: Progress) -> None:
        seen.append(now.done)

    rows = run(helped, GRID, *TASKS, crew=Crew(2, ready), tell=tell)
    assert len(rows) == len({key_of(row) for row in rows}) == ROWS
    assert seen == sorted(seen)
    assert seen[-1] == ROWS
    assert {row.get("workers") for row in rows if row["alone"]} == {None}
    assert {row["workers"] for row in rows if not row["alone"]} == {2}
    assert lasting(helped) == lasting(tmp_path / "whole")
    assert read_run(helped).rows[-1]["session"] == 2


def test_a_worker_that_dies_costs_no_more_than_it_must(tmp_path: Path) -> None:
    made = grid(alone=0, methods=["snapkv"])
    (tmp_path / "seen").mkdir()
    rows = run(tmp_path / "run", made, crew=Crew(1, partial(fragile, tmp_path / "seen")))
    assert len(rows) == 8
    assert not [row for row in rows if row["sample"] == "000" and row["error"]]
    failed = [row for row in rows if row["sample"] == "001"]
    assert {row["error"]["reason"] for row in failed} == {DIED}
    assert "SIGKILL" in failed[0]["error"]["message"]
    plain = run(tmp_path / "plain", made)
    assert [row["answers"] for row in plain[:4]] == [row["answers"] for row in rows if row["sample"] == "000"]


def test_workers_that_cannot_start_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="CUDA out of memory"):
        run(tmp_path, grid(alone=0), crew=Crew(2, broken))
    assert read_rows(tmp_path / "rows.jsonl") == []
