"""A run that is killed again and again gives the table of one that is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.eval.killed import GRID, KILLS, TASKS
from tests.eval.toys import run

from kvthrift.eval.folder import read_run
from kvthrift.eval.formats import FORMATS
from kvthrift.eval.record import key_of
from kvthrift.eval.table import tables

HOME = Path(__file__).parents[2]
PASSING = ("sessions", "run", "prefill_seconds", "question_seconds", "compression_seconds", "step_seconds")


def lasting(path: Path) -> Any:
    """A run's tables without seconds and circumstances."""
    found = read_run(path)
    return _without(json.loads(FORMATS["json"]([(found, tables(found))])))


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items() if key not in PASSING}
    return [_without(item) for item in value] if isinstance(value, list) else value


def test_kills_change_no_table(tmp_path: Path) -> None:
    run(tmp_path / "whole", GRID, *TASKS)
    killed = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": f"{HOME / 'src'}:{HOME}", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.eval.killed", str(killed)],
        cwd=HOME, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = [int(line) for line in done.stdout.split()]
    assert len(counts) == KILLS
    assert counts == sorted(counts)  # never a lost row
    assert 0 < counts[-1] < 40
    rows = read_run(killed).rows
    assert len(rows) == len({key_of(row) for row in rows}) == 40
    assert len(read_run(killed).sessions) > 3
    assert lasting(killed) == lasting(tmp_path / "whole")
