"""A study's folder made up by hand: a few trials, one of which failed and one of which is the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tomli_w

from kvthrift import method
from kvthrift.allocate import BudgetLayers

BASE = method("snapkv", budget=48, window=8)
NASTY = "<script>document.title = 'taken'</script>"
BUDGETS = (60, 52, 44, 36)
SETTINGS: dict[str, Any] = {
    "format": 1, "recipe": BASE.plain(), "objective": "agreement", "quality": "agreement", "floor": 0.99,
    "engine": "cma", "trials": 17, "lambda": 0.3, "gamma": 0.2, "seed": 0,
    "grid": {"tasks": ["toy.word"], "samples": 3, "length": 160, "model": ""},
}  # fmt: skip
TRIALS = ((0.5, 4000.0), (0.4, 3000.0), (None, None), (0.75, 4000.0), (0.7, 5000.0), (float("nan"), 4000.0))


def write_study(folder: Path, count: int = len(TRIALS), **changes: Any) -> Path:
    """A folder as a search leaves it after so many trials; trial 3 is the best."""
    folder.mkdir(parents=True)
    (folder / "study.toml").write_text(tomli_w.dumps({**SETTINGS, **changes}), encoding="utf-8")
    rows = [_row(number, *TRIALS[number]) for number in range(count)]
    (folder / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if count > 3:
        (folder / "best.toml").write_text(_recipe(3).with_options(name="snapkv-tuned").to_toml(), encoding="utf-8")
    return folder


def _recipe(number: int) -> Any:
    entries = BUDGETS if number == 3 else (48 + number, 48, 48, 48 - number)
    return BASE.with_options(layers=BudgetLayers(entries))


def _row(number: int, quality: float | None, size: float | None) -> dict[str, Any]:
    known = quality if quality is not None and quality == quality else None
    measured = {
        "score": 0.25, "agreement": known, "bytes": size, "full_bytes": 16000.0, "entries": 100.0,
        "full_entries": 400.0, "most_bytes": size,
    }  # fmt: skip
    return {
        "number": number, "values": {}, "recipe": _recipe(number).plain(), "prompts": [], "seconds": 1.5,
        "measured": None if quality is None else measured, "error": f"no room for {NASTY}" if quality is None else "",
    }  # fmt: skip
