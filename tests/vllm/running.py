"""Engines in processes of their own, each run once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def start(**asked: Any) -> subprocess.CompletedProcess[str]:
    """What came of an engine, be it a failure; ``env`` are variables for its process."""
    env = {**os.environ, **asked.pop("env", {})}
    words = [sys.executable, str(HERE / "engine.py"), json.dumps(asked)]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=env)


def engine(**asked: Any) -> list[dict[str, Any]]:
    """What was seen in each round of an engine."""
    rounds: list[dict[str, Any]] = _engine(json.dumps(asked))["rounds"]
    return rounds


def groups(**asked: Any) -> int:
    """How many block tables a request had."""
    return int(_engine(json.dumps(asked))["layers"])


@cache
def _engine(asked: str) -> dict[str, Any]:
    done = start(**json.loads(asked))
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    found: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
    return found
