"""A run of toy tasks with workers, as a program that can be killed or interrupted; and what its workers do first.

python -m tests.eval.helped FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from tests.eval.toys import SCORERS, OtherToy, Toy, bench, grid, letters, run

from kvthrift.eval.bench import Bench
from kvthrift.eval.record import Score
from kvthrift.eval.sample import Sample, Turn
from kvthrift.eval.workers import Crew

GRID = grid(question="both")
TASKS = (Toy(), OtherToy(mode="multi_turn", turns=2))


def ready(number: int) -> tuple[Bench, Mapping[str, Score]]:
    """A tiny model."""
    return bench(), SCORERS


def broken(number: int) -> tuple[Bench, Mapping[str, Score]]:
    """What a worker does whose model does not fit."""
    raise torch.OutOfMemoryError("CUDA out of memory.")


def fragile(folder: Path, number: int) -> tuple[Bench, Mapping[str, Score]]:
    """A tiny model whose process is killed by the first sample once, and by the second every time."""
    return bench(), {"letters": partial(_deadly, folder)}


def _deadly(folder: Path, text: str, sample: Sample, turn: Turn) -> float:
    seen = folder / sample.id
    if sample.id == "001" or not seen.exists():
        seen.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return letters(text, sample, turn)


def main(path: Path) -> None:
    """Run, and say so on Ctrl-C as the command line does."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in a shell's background begins without
    try:
        run(path, GRID, *TASKS, crew=Crew(2, ready))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
