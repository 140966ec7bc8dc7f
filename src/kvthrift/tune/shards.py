"""The prompts of a study dealt out to several processes, each with its own copy of the model.

Every process reads its own prompts once and measures every recipe on them, so that a search asks the same questions in
the same order however many processes there are. Processes end with their parent. Knows nothing of search.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from threading import Thread
from typing import Any

import torch

from kvthrift.errors import RunError
from kvthrift.eval.bench import Bench
from kvthrift.eval.record import Score
from kvthrift.eval.worker import Make, end_with_parent
from kvthrift.eval.workers import cores, uninterrupted
from kvthrift.recipe import Recipe
from kvthrift.tune.probe import Asked, Found, Probes

TRIES = 2  # processes that may die on one recipe until the search ends

_own: list[Probes] = []  # of a worker: what it has read


class Shards:
    """So many processes.

    Args:
        count: processes; no more than prompts are started.
        make: what a process does first, given its number: the model and the scorers. A function of a module, or a
            partial of one.
        asked: the prompts of the study.
        corners, follows: as for :class:`kvthrift.tune.probe.Probe`.
    """

    def __init__(
        self, count: int, make: Make, asked: Sequence[Asked], corners: Sequence[Recipe], *, follows: bool
    ) -> None:
        count = min(count, len(asked))
        threads = max(1, cores() // count)
        self._begin = [
            (make, number, list(asked[number::count]), list(corners), follows, threads) for number in range(count)
        ]
        self._pools: list[ProcessPoolExecutor | None] = [None] * count
        self._pids: list[int] = [0] * count

    def full(self) -> list[Found]:
        """What the full cache does, prompt by prompt.

        Raises:
            RunError: a process cannot be started, or died.
        """
        return self._everywhere(_full)

    def measure(self, recipe: Recipe) -> list[Found]:
        """What a recipe does, prompt by prompt.

        Raises:
            KvthriftError: it cannot be honoured.
            RunError: processes died on it.
        """
        return self._everywhere(_measure, recipe)

    def close(self) -> None:
        """End all processes at once."""
        for number, pool in enumerate(self._pools):
            if pool is not None:
                self._end(number, pool)

    def _everywhere(self, work: Any, *args: Any) -> list[Found]:
        left = list(range(len(self._pools)))
        out: list[Found] = []
        for _ in range(TRIES):
            futures = {number: self._submit(number, work, *args) for number in left}
            left = []
            for number, future in futures.items():
                try:
                    out += future.result()
                except BrokenProcessPool:
                    left.append(number)
                    pool = self._pools[number]
                    if pool is not None:
                        self._end(number, pool)
            if not left:
                return out
        raise RunError(
            f"process {left[0]} died on the same work {TRIES} times, as where memory runs out. Give fewer --workers or "
            "--samples, or a smaller length; the search goes on from there."
        )

    def _submit(self, number: int, work: Any, *args: Any) -> Future[list[Found]]:
        pool = self._pools[number]
        if pool is None:
            context = mp.get_context("spawn")  # a fork of a process that uses a GPU cannot use it
            pool = ProcessPoolExecutor(1, context, _start, self._begin[number])
            self._pools[number] = pool
            with uninterrupted(), suppress(BrokenProcessPool):
                first = pool.submit(os.getpid)
                self._pids[number] = first.result()
        try:
            return pool.submit(work, *args)
        except BrokenProcessPool as error:
            failed: Future[list[Found]] = Future()
            failed.set_exception(error)
            return failed

    def _end(self, number: int, pool: ProcessPoolExecutor) -> None:
        if self._pids[number]:
            with suppress(ProcessLookupError):
                os.kill(self._pids[number], signal.SIGKILL)
        pool.shutdown(wait=True, cancel_futures=True)
        self._pools[number], self._pids[number] = None, 0


# -- inside a process --------------------------------------------------------------------------------------------


def _start(
    make: Make, number: int, asked: Sequence[Asked], corners: Sequence[Recipe], follows: bool, threads: int
) -> None:
    Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _own[:] = []
    _later[:] = [(make, number, asked, corners, follows)]


_later: list[tuple[Make, int, Sequence[Asked], Sequence[Recipe], bool]] = []


def _ready() -> Probes:
    """What this process has read; read on the first call, so that what goes wrong is told."""
    if not _own:
        make, number, asked, corners, follows = _later[0]
        bench: Bench
        scorers: Mapping[str, Score]
        bench, scorers = make(number)
        _own.append(Probes(bench, scorers, asked, corners, follows=follows))
    return _own[0]


def _full() -> list[Found]:
    try:
        return _ready().full()
    except Exception as error:  # said in a form that any process can read
        raise RunError(" ".join(f"{error}".split()) or type(error).__name__) from None


def _measure(recipe: Recipe) -> list[Found]:
    return _ready().measure(recipe)
