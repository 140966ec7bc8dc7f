"""A program that starts the run of a grid again and again, and kills it each time after a while but for the last.

    python -m tests.eval.killed FOLDER

Each start is a fork of this process, killed with SIGKILL. Prints how many rows there were after each.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from random import Random

import torch
from tests.eval.toys import OtherToy, Toy, bench, grid, run

from kvthrift.eval.rows import read_rows

GRID = grid(question="both", alone=0)
TASKS = (Toy(), OtherToy(mode="multi_turn", turns=2))
KILLS = 9


def start(path: Path) -> int:
    """Run in a child process; its id."""
    child = os.fork()
    if not child:
        try:
            run(path, GRID, *TASKS)
        finally:
            os._exit(0)
    return child


def main(path: Path) -> None:
    """Kill and start again; then let it end."""
    torch.set_num_threads(1)
    bench()  # made once, for all children
    draw, file = Random(0), path / "rows.jsonl"
    for number in range(KILLS):
        child = start(path)
        wanted = len(read_rows(file)) + (draw.randrange(1, 5) if number else 0)
        deadline = time.monotonic() + 30
        while len(read_rows(file)) < wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.random() / 20)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(len(read_rows(file)))
    os.waitpid(start(path), 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
