"""How many entries each head of each layer holds, as a map of shaded numbers. Knows nothing of caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

from rich.console import Console, Group
from rich.text import Text

from kvthrift.cli.shade import STYLES, bar, coloured, level

GAP = 3  # columns between two maps
CORNER = "layer"


@dataclass(frozen=True)
class Budgets:
    """One cache: the model's own numbers of its layers, and ``[L][H]`` entries held."""

    name: str
    layers: Sequence[int]
    lengths: Sequence[Sequence[int]]


def heat_maps(console: Console, budgets: Sequence[Budgets]) -> Group:
    """A map for each cache, as many beside each other as there is room for, all on one scale."""
    most = max((count for one in budgets for row in one.lengths for count in row), default=0) or 1
    maps = [_Map(console, one, most).lines() for one in budgets]
    rows: list[list[list[Text]]] = []
    for one in maps:
        room = console.width - sum(_width(other) + GAP for other in rows[-1]) if rows else 0
        if _width(one) <= room:
            rows[-1].append(one)
        else:
            rows.append([one])
    return Group(*(line for number, row in enumerate(rows) for line in _beside(row, spaced=number > 0)))


@dataclass(frozen=True)
class _Map:
    console: Console
    budgets: Budgets
    most: int

    def lines(self) -> list[Text]:
        """The name, the heads, and a line for each run of layers that hold the same."""
        runs = list(_runs(self.budgets))
        digits = len(f"{self.most:,}")
        heads = len(self.budgets.lengths[0]) if self.budgets.lengths else 0
        margin = max(len(CORNER), *(len(name) for name, _ in runs)) if runs else len(CORNER)
        wide = margin + heads * (digits + 3) <= self.console.width
        out = [Text(self.budgets.name, style="bold")]
        if wide:
            numbers = "".join(f"{f'h{head}':>{digits + 2}} " for head in range(heads))
            out.append(Text(f"{CORNER:>{margin}} {numbers}", style="dim"))
        else:
            out.append(Text(f"{CORNER:>{margin}} heads 0 to {heads - 1}, and the entries each holds", style="dim"))
        for name, counts in runs:
            line = Text(f"{name:>{margin}} ", style="dim")
            cells = self._numbers(counts, digits) if wide else self._blocks(counts, margin)
            out.append(Text.assemble(line, cells))
        return out

    def _numbers(self, counts: Sequence[int], digits: int) -> Text:
        cells = []
        for count in counts:
            share = count / self.most
            if coloured(self.console):
                cells.append(Text(f" {count:>{digits},} ", STYLES[level(share)]))
            else:
                cells.append(Text(f"{bar(share)}{count:>{digits + 1},}"))
        return Text(" ").join(cells)

    def _blocks(self, counts: Sequence[int], margin: int) -> Text:
        """A column a head, or a few heads where there are too many, and in words the fewest and most."""
        said = f" {min(counts):,} to {max(counts):,}"
        room = max(self.console.width - margin - len(f" {self.most:,} to {self.most:,}") - 1, 1)
        size = -(-len(counts) // room)
        out = Text()
        for start in range(0, len(counts), size):
            share = fmean(counts[start : start + size]) / self.most
            out.append(
                " " if coloured(self.console) else bar(share), STYLES[level(share)] if coloured(self.console) else ""
            )
        return out.append(said)


def _runs(budgets: Budgets) -> Iterator[tuple[str, Sequence[int]]]:
    """Neighbouring layers that hold the same, as one."""
    for counts, found in groupby(zip(budgets.layers, budgets.lengths, strict=True), key=lambda pair: tuple(pair[1])):
        layers = [layer for layer, _ in found]
        yield (f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"), counts


def _width(lines: Sequence[Text]) -> int:
    return max(line.cell_len for line in lines)


def _beside(maps: Sequence[list[Text]], *, spaced: bool) -> Iterator[Text]:
    if spaced:
        yield Text("")
    for number in range(max(map(len, maps))):
        out = Text(no_wrap=True)
        for place, one in enumerate(maps):
            line = one[number] if number < len(one) else Text("")
            last = place == len(maps) - 1
            out.append_text(line).append(" " * (0 if last else _width(one) - line.cell_len + GAP))
        yield out
