"""What a search has found so far, read off its folder: as a page with plots, as Markdown, CSV or JSON.

A search may still be under way, or have been cut short: what is on the disk is shown. Measures nothing.
"""

from __future__ import annotations

import csv
import io
import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvthrift.errors import RunError
from kvthrift.eval.report.shell import fill
from kvthrift.eval.rows import read_rows
from kvthrift.recipe import Recipe
from kvthrift.tune.aim import Aim
from kvthrift.tune.study import BEST, STUDY, TRIALS, key_of

RELOAD = 5  # seconds between two looks of a browser at a page that is still written to


@dataclass(frozen=True)
class Point:
    """A recipe that was measured.

    Attributes:
        trial: its number.
        quality: what the search judges by, 0 to 1; None if it could not be measured or is not a number.
        bytes, share: held, and of the full cache's; None where nothing was measured.
        entries: held, mean over prompts.
        seconds: measuring took.
        front: whether no smaller one, and none as small, is better.
        best: whether it is the study's result so far.
        error: why there is no quality.
    """

    trial: int
    quality: float | None
    bytes: float | None
    share: float | None
    entries: float | None
    seconds: float
    front: bool
    best: bool
    error: str


@dataclass(frozen=True)
class Found:
    """A study as it is on the disk.

    Attributes:
        judges: "score" or "agreement".
        budgets: entries a head by layer of the best recipe, where it lists them.
        target: what the start recipe's budget is, as it was written.
    """

    path: Path
    settings: dict[str, Any]
    judges: str
    points: tuple[Point, ...]
    budgets: tuple[int, ...]
    target: str


def is_study(path: Path) -> bool:
    """Whether a folder is one that 'kvthrift tune' writes to."""
    return (path / STUDY).is_file()


def read_study(path: Path) -> Found:
    """What a search has found so far.

    Raises:
        RunError: the folder is no study, is damaged, or has no trials yet.
    """
    try:
        settings = tomllib.loads((path / STUDY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path / STUDY} cannot be read ({error}). Give a folder of 'kvthrift tune'.") from error
    rows = read_rows(path / TRIALS) if (path / TRIALS).exists() else []
    if not rows:
        raise RunError(f"{path} holds no trials yet, so there is nothing to show. Let the search go on.")
    aim = Aim(settings["objective"], settings["quality"], settings["floor"], settings["lambda"], settings["gamma"])
    best = Recipe.load(path / BEST) if (path / BEST).exists() else None
    front = _front(rows, aim.judges)
    points = tuple(_point(row, aim.judges, row["number"] in front, best) for row in rows)
    layers = best.plain().get("layers", {}) if best is not None else {}
    budgets = tuple(layers.get("entries", ())) if layers.get("part") == "budgets" else ()
    return Found(path, settings, aim.judges, points, budgets, str(Recipe.from_plain(settings["recipe"]).budget))


def html(found: Sequence[Found], *, live: bool = False) -> str:
    """One page of one or more searches; it needs no network.

    Args:
        live: the page is written again and again, and should be looked at again.

    Raises:
        MissingPackageError: a package that pages are made with is not installed.
    """
    studies = [_plain(one) for one in found]
    title = " and ".join(one.path.name for one in found)
    return fill("study.html", title=title, data={"studies": studies}, studies=studies, reload=RELOAD if live else 0)


def markdown(found: Sequence[Found]) -> str:
    """A table a search, best first."""
    return "\n\n".join(_markdown(one) for one in found) + "\n"


def as_csv(found: Sequence[Found]) -> str:
    """A line a trial."""
    lines = [{"study": str(one.path), "judges": one.judges, **asdict(point)} for one in found for point in one.points]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def as_json(found: Sequence[Found]) -> str:
    """Everything, with what was searched."""
    return json.dumps([_plain(one) for one in found], indent=2) + "\n"


FORMATS: dict[str, Callable[[Sequence[Found]], str]] = {
    "md": markdown,
    "html": html,
    "csv": as_csv,
    "json": as_json,
}


def _point(row: dict[str, Any], judges: str, front: bool, best: Recipe | None) -> Point:
    measured = row["measured"] or {}
    full, size, quality = measured.get("full_bytes"), measured.get("bytes"), measured.get(judges)
    return Point(
        trial=row["number"],
        quality=quality,
        bytes=size,
        share=size / full if size is not None and full else None,
        entries=measured.get("entries"),
        seconds=row["seconds"],
        front=front,
        best=best is not None and _same(Recipe.from_plain(row["recipe"]), best),
        error=row["error"] or ("" if quality is not None else f"the {judges} is not a number"),
    )


def _same(one: Recipe, best: Recipe) -> bool:
    """Whether a trial's recipe is the result, which has a name of its own and may have the budget asked for."""
    return key_of(one.with_options(name=best.name, budget=best.budget)) == key_of(best)


def _front(rows: Sequence[dict[str, Any]], judges: str) -> set[int]:
    known = [row for row in rows if row["measured"] and row["measured"].get(judges) is not None]
    out, top = set[int](), float("-inf")
    for row in sorted(known, key=lambda row: (row["measured"]["bytes"], -row["measured"][judges], row["number"])):
        if row["measured"][judges] > top:
            top = row["measured"][judges]
            out.add(row["number"])
    return out


def _plain(found: Found) -> dict[str, Any]:
    settings = found.settings
    grid = settings["grid"]
    facts = {
        "Objective": settings["objective"] + (
            f", at {settings['floor']:.0%} of the full cache's {found.judges} or more"
            if settings["objective"] == "bytes" else ""
        ),
        "Start": f"{settings['recipe']['name']}, budget {found.target}",
        "Engine": f"{settings['engine']}, {settings['trials']} recipes at most, seed {settings['seed']}",
        "Tasks": f"{', '.join(grid['tasks'])}: {grid['samples']} a task, {grid['length']} tokens each",
        "Model": grid["model"] or "smollm2 (embedded)",
    }  # fmt: skip
    points = [asdict(point) for point in found.points]
    return {
        "name": found.path.name,
        "judges": found.judges,
        "facts": facts,
        "points": points,
        "budgets": list(found.budgets),
    }


def _markdown(found: Found) -> str:
    head = (
        f"{found.path.name}: {found.settings['objective']}, start {found.settings['recipe']['name']} at {found.target}"
    )
    lines = [f"| trial | {found.judges} | bytes held | of full | seconds | |", "|---:|---:|---:|---:|---:|---|"]
    order = sorted(found.points, key=lambda p: (p.quality is None, -(p.quality or 0), p.bytes or 0, p.trial))
    for point in order:
        quality = "-" if point.quality is None else f"{point.quality:.1%}"
        size = "-" if point.bytes is None else f"{point.bytes:,.0f}"
        share = "-" if point.share is None else f"{point.share:.1%}"
        note = ", ".join(word for word, on in (("best", point.best), ("front", point.front)) if on) or point.error
        lines.append(f"| {point.trial} | {quality} | {size} | {share} | {point.seconds:.1f} | {note} |")
    return head + "\n\n" + "\n".join(lines)
