"""A text, token by token, painted by a share that each token has. Knows nothing of caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from kvthrift.cli.shade import MARKS, STYLES, coloured, level

GUTTER = 8  # columns: the number of a line's first token
ALL = 40  # lines of a text that is shown whole
ENDS = 4  # lines at its head and at its tail
PEAKS = 5  # places between them, each the one kept most of a fifth, with a line before and behind it
GAP = 3  # fewer lines than that are shown rather than left out
BACK = 20  # columns that a line may be shortened by to end between two words

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """A line as shown: characters, and the token each belongs to."""

    characters: str
    tokens: tuple[int, ...]


def painted(
    console: Console, tokens: Sequence[str], shares: Floats, marked: Sequence[tuple[int, int]], *, whole: bool
) -> Iterator[Text]:
    """The lines of a text; of a long one its head and tail, the first marked place, and what is kept most between.

    Args:
        shares: ``[T]``, from 0 to 1.
        marked: tokens to underline, as ranges ``(start, stop)``.
        whole: show all of it however long.
    """
    lines = list(_lines(tokens, console.width - GUTTER - 1))
    chosen = np.ones(len(lines), dtype=bool) if whole or len(lines) <= ALL else _chosen(lines, shares, marked)
    under = {token for start, stop in marked for token in range(start, stop)}
    for shown, start, stop in _stretches(chosen):
        if shown:
            for line in lines[start:stop]:
                yield from _painted(console, line, shares, under)
        else:
            yield _gap(shares[lines[start].tokens[0] : lines[stop - 1].tokens[-1] + 1])


def _gap(shares: Floats) -> Text:
    count = f"{len(shares):,} token{'s' if len(shares) > 1 else ''}"
    return Text(f"{'':>{GUTTER}}... {count}, held by {shares.mean():.0%} of heads on average ...", style="dim italic")


def _lines(tokens: Sequence[str], width: int) -> Iterator[Line]:
    """Broken at line breaks, and between words where a line would be too wide."""
    held: list[tuple[str, int]] = []
    wide = 0
    for number, token in enumerate(tokens):
        for character in token:
            if character == "\n":
                yield _line([*held, ("\n", number)])
                held, wide = [], 0
                continue
            shown = _printable(character)
            if wide + cell_len(shown) > width and held:
                stop = _between(held)
                yield _line(held[:stop])
                held = held[stop:]
                wide = sum(cell_len(one) for one, _ in held)
            held.append((shown, number))
            wide += cell_len(shown)
    if held:
        yield _line(held)


def _line(held: Sequence[tuple[str, int]]) -> Line:
    return Line("".join(one for one, _ in held), tuple(number for _, number in held))


def _printable(character: str) -> str:
    if character == "\t":
        return " "
    return character if character.isprintable() else "\N{REPLACEMENT CHARACTER}"


def _between(held: Sequence[tuple[str, int]]) -> int:
    """Behind the last space, if it is near the end."""
    for stop in range(len(held), max(len(held) - BACK, 1), -1):
        if held[stop - 1][0] == " ":
            return stop
    return len(held)


def _chosen(lines: Sequence[Line], shares: Floats, marked: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    out = np.zeros(len(lines), dtype=bool)
    out[:ENDS] = out[-ENDS:] = True
    for start, stop in marked[:1]:
        out |= [line.tokens[0] < stop and start <= line.tokens[-1] for line in lines]
    scores = np.array(
        [shares[list(dict.fromkeys(line.tokens))].mean() if line.characters.strip() else 0 for line in lines]
    )
    for part in np.array_split(np.arange(ENDS, len(lines) - ENDS), PEAKS):
        best = int(part[scores[part].argmax()])
        out[best - 1 : best + 2] |= scores[best] > 0
    return out


def _stretches(chosen: NDArray[np.bool_]) -> Iterator[tuple[bool, int, int]]:
    """Runs of lines that are shown, and of lines that are not."""
    edges = [0, *(np.flatnonzero(np.diff(chosen)) + 1).tolist(), len(chosen)]
    runs = [(bool(chosen[start]) or stop - start < GAP, start, stop) for start, stop in pairwise(edges) if start < stop]
    for shown, found in groupby(runs, key=lambda run: run[0]):
        whole = list(found)
        yield shown, whole[0][1], whole[-1][2]


def _painted(console: Console, line: Line, shares: Floats, under: set[int]) -> Iterator[Text]:
    """The line; without colours a second one with a mark below each character."""
    out = Text(no_wrap=True).append(f"{line.tokens[0]:>{GUTTER - 2}}  ", "dim")
    colours = coloured(console)
    marks = ""
    for character, token in zip(line.characters.removesuffix("\n"), line.tokens, strict=False):
        shade = level(float(shares[token]))
        style = STYLES[shade] + (" underline" if token in under else "")
        out.append(character, style if colours else "")
        marks += MARKS[shade] * cell_len(character)
    if colours and line.characters.endswith("\n"):
        out.append("↵", STYLES[level(float(shares[line.tokens[-1]]))])
    yield out
    if not colours and marks.strip():
        yield Text(" " * GUTTER + marks.rstrip(), no_wrap=True)
