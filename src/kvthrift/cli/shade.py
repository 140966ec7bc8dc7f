"""Shares as shades: backgrounds where a terminal has colours, characters where it has none. Knows nothing of caches."""

from __future__ import annotations

from bisect import bisect_left

from rich.console import Console
from rich.text import Text

BOUNDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # a level holds what is above the bound before it, up to its own
MARKS = " .:+*#"
STYLES = (
    "dim",
    "white on color(17)",
    "white on color(19)",
    "white on color(25)",
    "black on color(38)",
    "black on color(50)",
)
BARS = " ▁▂▃▄▅▆▇█"


def level(share: float) -> int:
    """Which of the levels, 0 (none) to 5 (more than three quarters)."""
    return min(bisect_left(BOUNDS, share), len(BOUNDS) - 1)


def bar(share: float) -> str:
    """One character whose height is the share; of anything more than nothing at least the lowest."""
    return BARS[-(-int(share * 1000) * (len(BARS) - 1) // 1000)]


def coloured(console: Console) -> bool:
    """Whether shades can be told apart by colour."""
    return console.color_system is not None and not console.no_color


def legend(console: Console) -> Text:
    """What the levels mean."""
    out = Text().append("heads that hold a token: ", "dim")
    for number, bound in enumerate(BOUNDS):
        if coloured(console):
            out.append(f" {bound:.0%} ", style=STYLES[number])
        elif number:
            out.append(f"  {MARKS[number]} to {bound:.0%}")
    return out
