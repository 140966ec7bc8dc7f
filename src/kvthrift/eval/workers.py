"""Several processes that measure at once, each with its own copy of the model.

The parent hands out whole samples and gets rows back; it alone writes. A worker that dies costs the arm it died on, not
the run: that arm is tried once more on a fresh worker, and then has a row that says so. Workers end with the parent,
however it ends. Knows no task and no method.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from kvthrift.errors import RunError
from kvthrift.eval.batch import Batch
from kvthrift.eval.job import Job, Keep
from kvthrift.eval.rows import Row
from kvthrift.eval.worker import DONE, FAILED, READY, ROW, SNAPSHOT, Make, work

DIED = "worker died"
STRIKES = 2  # deaths on one arm until it is given up
PATIENCE = 20.0  # seconds that a worker may take to end by itself


@dataclass
class Crew:
    """So many workers.

    Attributes:
        make: what a worker does before its first job; must be a function of a module, or a partial of one.
    """

    count: int
    make: Make

    def rows(self, jobs: Iterator[Job | Batch], keep: Keep | None) -> Generator[Row]:
        """The rows of all jobs, as they come; close it to end the workers early.

        Args:
            jobs: taken one by one, as workers become free.
            keep: given the snapshots that jobs want.

        Raises:
            RunError: no worker can be started.
        """
        shift = _Shift(self, jobs, keep, room=self.count)
        try:
            yield from shift.rows()
        finally:
            shift.end()


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    job: Job | Batch
    ready: bool = False


@dataclass
class _Shift:
    """Workers at work. ``room``: how many there may be; one that cannot start is not replaced."""

    crew: Crew
    jobs: Iterator[Job | Batch]
    keep: Keep | None
    room: int
    started: int = 0
    reason: str = ""
    again: deque[tuple[Job | Batch, int]] = field(default_factory=deque)
    strikes: dict[Connection, int] = field(default_factory=dict)
    working: dict[Connection, _Worker] = field(default_factory=dict)
    leaving: list[BaseProcess] = field(default_factory=list)

    def rows(self) -> Iterator[Row]:
        while True:
            while len(self.working) < self.room and (found := self._next()):
                self._start(*found)
            if not self.working:
                break
            for pipe in wait(list(self.working)):
                assert isinstance(pipe, Connection)
                for row in self._hear(self.working[pipe]):
                    yield {**row, "workers": self.crew.count}
        if self.again:
            raise RunError(
                f"no worker can be started ({self.reason}), so nothing can be measured. Give fewer --workers, or none; "
                "the run goes on from there."
            )

    def end(self) -> None:
        for worker in self.working.values():
            worker.process.kill()
            worker.pipe.close()
        for process in (*self.leaving, *(worker.process for worker in self.working.values())):
            _reap(process)

    def _next(self) -> tuple[Job | Batch, int] | None:
        """A job, and how many workers died on its first arm."""
        if self.again:
            return self.again.popleft()
        job = next(self.jobs, None)
        return None if job is None else (job, 0)

    def _start(self, job: Job | Batch, strikes: int) -> None:
        context = mp.get_context("spawn")  # a fork of a process that uses a GPU cannot use it
        ours, theirs = context.Pipe()
        threads = max(1, cores() // self.crew.count)
        process = context.Process(target=work, args=(theirs, self.crew.make, self.started, threads), daemon=True)
        with uninterrupted():
            process.start()
        theirs.close()
        self.started += 1
        self.working[ours], self.strikes[ours] = _Worker(process, ours, job), strikes

    def _hear(self, worker: _Worker) -> Iterator[Row]:
        try:
            kind, content = worker.pipe.recv()
            if kind == READY:
                worker.ready = True
                worker.pipe.send(worker.job)
        except (EOFError, OSError):
            kind, content = FAILED, ""
        if kind == ROW:
            self.strikes[worker.pipe] = 0
            worker.job.heard(content)
            yield content
        elif kind == SNAPSHOT and self.keep is not None:
            self.keep(content)
        elif kind == DONE:
            self._go_on(worker)
        elif kind == FAILED:
            yield from self._lost(worker, content)

    def _go_on(self, worker: _Worker) -> None:
        found = self._next()
        if found is None:
            self._dismiss(worker)
            return
        worker.job, self.strikes[worker.pipe] = found
        with suppress(OSError):  # it died meanwhile: its pipe is at its end, which is heard next
            worker.pipe.send(worker.job)

    def _dismiss(self, worker: _Worker) -> None:
        del self.working[worker.pipe], self.strikes[worker.pipe]
        worker.pipe.close()  # at which it ends
        self.leaving.append(worker.process)

    def _lost(self, worker: _Worker, said: str) -> Iterator[Row]:
        """Try its job again, a batch sample by sample; give up the arm on which workers die, and the job if the next
        one fares no better."""
        strikes, job = self.strikes[worker.pipe] + 1, worker.job
        self._dismiss(worker)
        reason = said or _ending(worker.process)
        if not worker.ready:
            self.room, self.reason = self.room - 1, reason
            self.again.append((job, strikes - 1))
            return
        if isinstance(job, Batch):
            self.again.extend((part, 0) for part in job.parts())
            return
        given_up = job.missing[:1] if strikes == STRIKES else job.missing if strikes > STRIKES else []
        for arm in given_up:
            yield job.failed(arm, DIED, f"the process that measured it died, and so did a second one: {reason}")
        job.missing = job.missing[len(given_up) :]
        if job.missing:
            self.again.append((job, strikes))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def uninterrupted() -> Iterator[None]:
    """What is started inside never hears Ctrl-C, which is for the parent; it ends its workers by itself."""
    resource_tracker.ensure_running()  # whose own start would undo the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ending(process: BaseProcess) -> str:
    """How a process ended, in words."""
    code = _reap(process)
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"ended by {name}" + (", as where the host's memory runs out" if -code == signal.SIGKILL else "")
    return f"exit code {code}"


def _reap(process: BaseProcess) -> int | None:
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join(PATIENCE)
    return process.exitcode
