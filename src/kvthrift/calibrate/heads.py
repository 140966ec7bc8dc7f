"""How much every head matters for finding things: needle tests scored by where heads look.

The method is that of 2410.19258, which goes back to 2404.15574.

A test's answer is fed to the model token by token; wherever the model itself would say the next token of the
answer, each query head is asked where it looks. Two scores per query head, both means over such steps:

- ``retrieval``: does its strongest entry hold the very token that comes next, where the text has the answer?
- ``mass``: of its N strongest entries, N the answer's length, the attention on those inside the answer, by N.

The importance of a KV head is the mean ``mass`` of its query heads, normalised to sum 1 over the model. Knows
no model library: a model is a function from token ids to attention rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvthrift.calibrate.artefact import Artefact, Meta, check_free, save
from kvthrift.calibrate.needles import NeedleTest, NeedleTests
from kvthrift.calibrate.partial import Partial
from kvthrift.errors import CalibrationError, OptionError

KIND = "head_importance"
Progress = Callable[[str, float], None] | None
"""Told what is being done, in words for a person, and the fraction of it that is done (0 to 1)."""


@dataclass(frozen=True)
class Observation:
    """What a model did over the last W tokens of a text.

    Attributes:
        said: the token it would say after each of them, W ids.
        rows: by the model's own number of a layer, attention rows ``[H, G, W, T]`` float32; layers that have
            none are left out.
    """

    said: tuple[int, ...]
    rows: Iterable[tuple[int, Tensor]]


Observe = Callable[[tuple[int, ...], int], Observation]
"""Reads token ids, and reports on the last so many of them."""


@dataclass(frozen=True)
class Subject:
    """The model that is measured: its config's fingerprint, its architecture, and sizes."""

    fingerprint: str
    model_type: str
    layers: int
    kv_heads: int
    query_heads: int

    def meta(self, method: str, provenance: Mapping[str, Any]) -> Meta:
        """What an artefact of this model says of itself."""
        sizes = (self.layers, self.kv_heads)
        return Meta(KIND, method, self.fingerprint, self.model_type, *sizes, provenance)


def head_scores(rows: Tensor, test: NeedleTest, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Retrieval score and mass of the query heads of one layer in one test.

    Args:
        rows: ``[H, G, W, T]``, one row for each token of the answer, from the token before it.
        test: what was read.
        counted: ``[W]`` bool, steps at which the model found the token; at least one.

    Returns:
        Two tensors ``[H, G]`` float64, means over the counted steps.
    """
    begin, end = test.span
    size = end - begin
    found, places = rows[:, :, counted].double().topk(size, dim=-1)  # [H, G, C, N]
    inside = (places >= begin) & (places < end)
    mass = (found * inside).sum(-1) / size
    ids = torch.tensor(test.prompt + test.answer, device=rows.device)
    wanted = torch.tensor(test.answer, device=rows.device)[counted]
    first = places[..., 0]
    copied = inside[..., 0] & (ids[first] == wanted)
    return copied.double().mean(-1), mass.mean(-1)


def measure(observe: Observe, test: NeedleTest, subject: Subject) -> dict[str, Any]:
    """One test as plain data: steps, steps counted, and both scores ``[L][HG]``, None if none counted."""
    steps = len(test.answer)
    seen = observe(test.prompt + test.answer[:-1], steps)
    counted = torch.tensor([said == token for said, token in zip(seen.said, test.answer, strict=True)])
    out: dict[str, Any] = {"steps": steps, "counted": int(counted.sum()), "retrieval": None, "mass": None}
    if not out["counted"]:
        return out
    scores = torch.zeros(2, subject.layers, subject.query_heads, dtype=torch.float64)
    for number, rows in seen.rows:
        retrieval, mass = head_scores(rows, test, counted.to(rows.device))
        scores[0, number], scores[1, number] = retrieval.flatten().cpu(), mass.flatten().cpu()
    return out | {"retrieval": scores[0].tolist(), "mass": scores[1].tolist()}


def combine(results: list[dict[str, Any]], subject: Subject) -> dict[str, Tensor]:
    """The tables of an artefact, float32: ``importance [L, H]``, ``retrieval`` and ``mass [L, HG]``.

    Raises:
        CalibrationError: the model found no needle, so that there is nothing to tell heads apart by.
    """
    found = [result for result in results if result["counted"]]
    tables = {
        name: torch.tensor([result[name] for result in found], dtype=torch.float64).mean(0)
        for name in ("retrieval", "mass")
        if found
    }
    if not found or tables["mass"].sum() <= 0:
        raise CalibrationError(
            f"the model said no token of the answer in any of {len(results)} needle tests, so its heads "
            "cannot be told apart. Use a model that can answer questions, a smaller length, or more samples."
        )
    shape = (subject.layers, subject.kv_heads, subject.query_heads // subject.kv_heads)
    importance = tables["mass"].view(shape).mean(-1)
    tables["importance"] = importance / importance.sum()
    return {name: table.float() for name, table in tables.items()}


def calibrate_heads(
    observe: Observe,
    tests: NeedleTests,
    subject: Subject,
    target: str | Path,
    *,
    samples: int = 16,
    method: str = "headkv",
    force: bool = False,
    progress: Progress = None,
    provenance: Mapping[str, Any] | None = None,
) -> Artefact:
    """Measure every head of a model and write the artefact.

    Results of single tests are kept beside ``target`` until it is written; a run that was cut short goes on
    from them and ends with the same numbers. The same arguments give the same file.

    Args:
        observe: the model.
        tests: what it reads.
        subject: which model it is.
        target: the file to write.
        samples: tests to take.
        method: the method it is for.
        force: replace a file that is there, and start anew where a run with other settings was cut short.
        progress: told how far it is.
        provenance: further facts to write down.

    Raises:
        CalibrationError: the file is there, or the model finds nothing.
        OptionError: ``samples`` is below 1.
    """
    if samples < 1:
        raise OptionError(f"samples={samples} must be at least 1 needle test.")
    check_free(target, force=force)
    facts = {"length": tests.length, "seed": tests.seed, **(provenance or {})}
    with Partial.open(target, {"kind": KIND, "model": subject.fingerprint, **facts}, force=force) as partial:
        _measure_rest(observe, tests, subject, samples, partial, progress)
        results = partial.results[:samples]
        counts = {name: sum(result[name] for result in results) for name in ("steps", "counted")}
        meta = subject.meta(method, {**facts, "samples": samples, **counts})
        found = Artefact(meta, combine(results, subject))
        save(target, found.tensors, found.meta, force=force)
        partial.remove()
    return found


def _measure_rest(
    observe: Observe, tests: NeedleTests, subject: Subject, samples: int, partial: Partial, progress: Progress
) -> None:
    """Take the tests that ``partial`` has no result of."""
    tell = progress or (lambda _stage, _fraction: None)
    for number in range(len(partial.results), samples):
        tell("Measuring heads", number / samples)
        partial.add(measure(observe, tests[number], subject))
    tell("Measuring heads", 1.0)


def importance(artefact: Artefact) -> tuple[tuple[float, ...], ...]:
    """The importance ``[L][H]`` of an artefact.

    Raises:
        CalibrationError: it has none, or not one finite, non-negative number for each head.
    """
    table, meta = artefact.tensors.get("importance"), artefact.meta
    shape = (meta.layers, meta.kv_heads)
    whole = table is not None and tuple(table.shape) == shape
    if table is None or not whole or not bool((torch.isfinite(table) & (table >= 0)).all()):
        raise CalibrationError(
            f"the calibration of kind {meta.kind!r} for {meta.model_type} does not hold one importance for "
            f"each of {shape[0]} x {shape[1]} heads, so no budget can be shared out by it. Calibrate again."
        )
    return tuple(tuple(row) for row in table.double().tolist())
