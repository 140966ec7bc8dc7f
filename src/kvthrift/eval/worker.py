"""What happens inside a worker: it loads its model, measures the jobs it is sent, and sends rows back.

Ends with its parent, however that ends, and where memory runs out it goes first. Knows nothing of files, or of other
workers.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

import torch

from kvthrift.eval.batch import Batch
from kvthrift.eval.bench import Bench
from kvthrift.eval.config import Grid
from kvthrift.eval.job import Job
from kvthrift.eval.record import Score
from kvthrift.integrations.transformers.loading import load_model

READY, SNAPSHOT, ROW, DONE, FAILED = "ready", "snapshot", "row", "done", "failed"
EXPENDABLE = "500"  # of 1000: where memory runs out, the kernel is to take a worker, not the parent

Make = Callable[[int], tuple[Bench, Mapping[str, Score]]]
"""Called in a worker with its number: the model it measures with, and the scorers."""


def load_bench(grid: Grid, number: int) -> Bench:
    """A worker's own copy of a grid's model; where a GPU is meant but not which, workers go round all of them.

    Raises:
        KvthriftError: it cannot be loaded.
    """
    count = torch.cuda.device_count()
    spread = count > 1 and grid.device in ("auto", "cuda")
    place = f"cuda:{number % count}" if spread else None if grid.device == "auto" else grid.device
    llm, tokenizer = load_model(grid.model or None, dtype=grid.dtype, device=place)
    return Bench(llm, tokenizer, grid.page, grid.agreement, grid.physics)


def work(pipe: Connection, make: Make, number: int, threads: int) -> None:
    """A worker's whole life: READY when it can begin, then for each job its ROWs and SNAPSHOTs, and DONE.

    FAILED, with the reason, is the last that is heard of it.
    """
    Thread(target=end_with_parent, daemon=True).start()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(EXPENDABLE)
    torch.set_num_threads(threads)
    with suppress(EOFError, BrokenPipeError):  # the parent has no more for it, or is gone
        try:
            bench, scorers = make(number)
            pipe.send((READY, None))
        except Exception as error:
            pipe.send((FAILED, _said(error)))
            return
        while True:
            _measure(pipe, pipe.recv(), bench, scorers)


def _measure(pipe: Connection, job: Job | Batch, bench: Bench, scorers: Mapping[str, Score]) -> None:
    try:
        for row in job.rows(bench, scorers, lambda snapshot: pipe.send((SNAPSHOT, snapshot))):
            pipe.send((ROW, row))
    except OSError:
        raise
    except Exception as error:  # a lost GPU: this process cannot go on, another may
        pipe.send((FAILED, _said(error)))
        raise EOFError from error
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # others live on the same GPU
    pipe.send((DONE, None))


def end_with_parent() -> None:
    """Wait for the parent process to end, however that happens, and end this one then; for a thread of a child."""
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
