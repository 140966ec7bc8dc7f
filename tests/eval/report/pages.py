"""Runs and snapshots made up by hand, with texts that would be markup, and the pages of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from tests.eval.toys import grid

from kvthrift.eval.arm import Arm, arms
from kvthrift.eval.folder import Run, RunFolder
from kvthrift.eval.report import html
from kvthrift.eval.rows import Row
from kvthrift.eval.snapshot import Snapshot, SnapshotFile
from kvthrift.eval.table import tables

GRID = grid(methods=["snapkv", "h2o"], budgets=["48", "96"], tasks=["toy.word", "toy.other"])
ARMS = arms(GRID)
DEPTHS = (0.0, 0.5, 1.0)
SAMPLES = 6
NASTY = "<script>document.title = 'taken'</script><b>bold</b> & </script>"
SESSION = {
    "started": "2026-11-22T08:00:00+00:00", "weights": "x", "commit": "1234567", "kvthrift": "0.1.0", "torch": "2",
    "transformers": "5", "python": "3.11", "dtype": "bfloat16", "device": "H200",
    "command": "kvthrift eval --tasks toy.word,toy.other --out '<runs>'",
}  # fmt: skip


def row(arm: Arm, task: str, sample: int, question: str) -> Row:
    """A row whose numbers depend on all it is of, so that no two arms or tasks look alike."""
    size = {"48": 300, "96": 600}.get(arm.budget, 1500) + 7 * ARMS.index(arm)
    hard = 3 if task == "toy.other" else 2
    right = arm.name == "full" or (sample * 7 + ARMS.index(arm) * 5) % (hard + (question == "hidden")) == 0
    wrong = [] if arm.name == "full" else [1 + ARMS.index(arm) % 3, 5]
    alone = sample == 0
    return {
        "task": task, "sample": f"{sample:03d}", "question": question, "arm": arm.name, "session": 0, "note": "",
        "prompt": f"{sample:08x}", "score": float(right), "entries": size // 10, "full_entries": 150, "bytes": size,
        "metadata_bytes": 32, "full_bytes": 1480, "read_bytes": size - 32, "peak_bytes": 2 * size if alone else None,
        "alone": alone, "meta": {"length": GRID.length, "depth": DEPTHS[sample % len(DEPTHS)]},
        "seconds": {"prefill": 1.0, "question": 0.1, "compression": 0.2, "decode": 0.5, "step": size / 1e5},
        "agreement": [{"steps": 6, "mismatches": wrong, "kl": [0.1] * 6, "top5": 0.5, "cut": True}],
        "physics": None, "error": None,
    }  # fmt: skip


def failed(one: Row) -> Row:
    error = {"reason": "out of memory", "message": f"no room for {NASTY}"}
    return {**one, "score": 0.0, "error": error, "agreement": None}


def rows(*questions: str) -> Iterator[Row]:
    for question in questions:
        for task in GRID.tasks:
            for sample in range(SAMPLES):
                for arm in ARMS:
                    made = row(arm, task, sample, question)
                    yield failed(made) if (arm.name, sample) == ("h2o@48", 5) else made


def run(path: Path, *questions: str, **changes: Any) -> Run:
    """A finished run; asked with the question visible and hidden by default."""
    made = replace(GRID, question="both", **changes)
    return Run(path, made, ARMS, (SESSION,), tuple(rows(*(questions or ("hidden", "visible")))))


def write(path: Path) -> Path:
    """A run's folder, as ``kvthrift eval`` would leave it."""
    with RunFolder.open(path, GRID, ARMS, SESSION) as folder:
        for one in rows("visible"):
            folder.rows.append(one)
    return path


def page(*runs: Run) -> str:
    return html([(one, tables(one)) for one in runs])


def snapshot(arm: str, sample: str = "000", question: str = "visible") -> Snapshot:
    """40 tokens read by 3 layers of 2 heads: 8 are kept by all, the last 8 by none, some by one head."""
    kept = np.zeros((3, 2, 40), dtype=bool)
    kept[:, :, :8] = True
    kept[1, 0, 8:32] = True
    kept[2, :, 20:24] = arm.startswith("h2o")
    words = ["one ", "two ", "three\n", NASTY]
    return Snapshot(
        "toy.word", sample, question, arm, arm.partition("@")[2] or "all", arm.partition("@")[0],
        tuple(words[number % 4] for number in range(40)), ((20, 23),), (0, 2, 5), 2,
        tuple(tuple(int(count) for count in layer.sum(axis=1)) for layer in kept), kept, f"own {NASTY}", "full",
    )  # fmt: skip


def keep(folder: Path, *snapshots: Snapshot) -> Path:
    """A folder that holds those snapshots."""
    folder.mkdir(parents=True, exist_ok=True)
    file = SnapshotFile.open(folder)
    for one in snapshots:
        file.add(one)
    file.close()
    return folder


class Reader(HTMLParser):
    """What a browser without scripts would see: tables as texts, addresses, and what was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.levels: list[int] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "action", "data")]
        if tag in ("h1", "h2", "h3", "h4"):
            self.levels.append(int(tag[1]))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][-1][-1] += data.strip()
