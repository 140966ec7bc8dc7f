"""Comparisons and methods as tables for people, readable from 80 columns on. Measures nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvthrift.cli.compare import Agreement, Arm, Comparison
from kvthrift.cli.setting import Setting
from kvthrift.recipe import Recipe
from kvthrift.runtime.report import show_bytes


def show_comparison(console: Console, setting: Setting, recipe: Recipe, found: Comparison) -> None:
    """Print what was asked of what, both answers side by side, and the measurements."""
    console.print(setting_table(setting, [recipe]))
    console.print(_answers(found, recipe))
    console.print(_measures(found, recipe))
    console.print(_agreement(found.agreement))


def setting_table(setting: Setting, recipes: Sequence[Recipe]) -> Table:
    """What was asked of what, under which recipes, and where."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    seen = "compressed before the question was seen" if setting.question_hidden else "the question in sight"
    pieces = f", {setting.chunk} at a time" if setting.chunk else ""
    rows = {
        "question": setting.question,
        "prompt": f"{setting.prompt_tokens:,} tokens{pieces}, {seen}",
        "recipe": "\n".join(map(str, recipes)),
        "model": f"{setting.model}, {setting.dtype}",
        "machine": setting.device,
        "versions": ", ".join(f"{name} {version}" for name, version in setting.versions.items()),
    }
    for label, value in rows.items():
        table.add_row(label, Text(value))
    return table


def _answers(found: Comparison, recipe: Recipe) -> Table:
    """Both answers in columns of the same width; what follows the first difference is set off in colour."""
    full, short = printable(found.full.answer), printable(found.compressed.answer)
    same = same_start(full, short)
    table = Table(box=box.ROUNDED, expand=True, padding=(0, 1))
    for name in ("full cache", f"{recipe.name}, budget {recipe.budget or 'everything'}"):
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*(answer_text(text, same) for text in (full, short)))
    return table


def printable(text: str) -> str:
    """The text without what would move a terminal's cursor, and without line breaks inside a sentence."""
    shown = "".join(c if c == "\n" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return re.sub(r"(?<=\S)\n(?=[a-z])", " ", shown)


def same_start(a: str, b: str) -> int:
    """Leading characters in common."""
    different = (at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(different, min(len(a), len(b)))


def answer_text(text: str, same: int) -> Text:
    """An answer; what follows its first ``same`` characters is set off in colour."""
    return Text.assemble(text[:same], (text[same:], "yellow")) if text else Text("(nothing)", style="dim")


def _measures(found: Comparison, recipe: Recipe) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("")
    for name in ("full cache", recipe.name, "ratio"):
        table.add_column(Text(name), justify="right")
    for row in _rows(found.full, found.compressed):
        table.add_row(*row)
    return table


def _rows(full: Arm, short: Arm) -> list[tuple[str, str, str, str]]:
    before, after = full.prefilled, short.prefilled
    return [
        _counted("entries held after the prompt", before.entries, after.entries),
        _sized("bytes held after the prompt", before.bytes, after.bytes),
        _sized("bytes held after the answer", full.finished.bytes, short.finished.bytes),
        _sized("peak bytes in prefill", before.peak_bytes, after.peak_bytes),
        _timed("prefill", full.prefill_seconds, short.prefill_seconds),
        ("  of it compression", "-", f"{after.compression_seconds:.2f} s", ""),
        _paced("decode", full.tokens_per_second, short.tokens_per_second),
    ]


def _counted(label: str, full: int, short: int) -> tuple[str, str, str, str]:
    return label, f"{full:,}", f"{short:,}", _share(full, short)


def _sized(label: str, full: int, short: int) -> tuple[str, str, str, str]:
    return label, show_bytes(full), show_bytes(short), _share(full, short)


def _timed(label: str, full: float, short: float) -> tuple[str, str, str, str]:
    return label, f"{full:.2f} s", f"{short:.2f} s", _times(short, full)


def _paced(label: str, full: float | None, short: float | None) -> tuple[str, str, str, str]:
    if full is None or short is None:
        return label, "-", "-", ""
    return label, f"{full:.1f} tokens/s", f"{short:.1f} tokens/s", _times(short, full)


def _share(full: float, short: float) -> str:
    return f"{short / full:.1%}" if full else ""


def _times(value: float, reference: float) -> str:
    return f"{value / reference:.2f}x" if reference else ""


def _agreement(agreement: Agreement) -> Text:
    if agreement.prefix == agreement.tokens:
        return Text(f"Both answers are the same, token by token ({agreement.tokens}).")
    return Text(
        f"The answers part after {agreement.prefix} of {agreement.tokens} tokens; {agreement.share:.0%} of all "
        "positions agree."
    )
