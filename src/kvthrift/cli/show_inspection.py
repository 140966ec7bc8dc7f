"""What caches held of one prompt, for people: from 80 columns on, with colours or without. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvthrift.cli.heat import Budgets, heat_maps
from kvthrift.cli.inspection import Inspection, Seen
from kvthrift.cli.paint import painted
from kvthrift.cli.place import Place
from kvthrift.cli.setting import Setting
from kvthrift.cli.shade import legend
from kvthrift.cli.show import answer_text, printable, same_start, setting_table
from kvthrift.runtime.report import show_bytes

BESIDE = 3  # answers that fit beside each other
PLACES = 3  # places of a text that are named


def show_inspection(console: Console, setting: Setting, found: Inspection, *, full_text: bool) -> None:
    """Print what was asked of what, what was held where, and what was answered."""
    console.print(setting_table(setting, [arm.recipe for arm in found.arms]))
    console.print(_sizes(found))
    console.print(Text("Entries held, by layer and KV head", style="bold underline"))
    console.print(heat_maps(console, [Budgets(arm.name, arm.layout.layers, arm.layout.lengths) for arm in found.arms]))
    console.print()
    console.print(legend(console))
    marked = found.place.spans if found.place else ()
    for arm in found.arms:
        console.print()
        console.print(Text(f"The text, as {arm.name} holds it", style="bold underline"))
        for line in painted(console, found.tokens, arm.layout.kept.mean(axis=(0, 1)), marked, whole=full_text):
            console.print(line)
    console.print()
    for said in place_lines(found):
        console.print(said)
    console.print(_answers(found))
    for arm in found.arms:
        console.print(agreement_line(found, arm))


def facts(found: Inspection) -> dict[str, str]:
    """Each cache's size in words, by name."""
    full = found.full
    return {
        arm.name: f"{arm.entries:,} of {full.entries:,} entries; {show_bytes(arm.held.bytes)} of "
        f"{show_bytes(full.held.bytes)} ({arm.held.bytes / full.held.bytes:.1%})"
        for arm in found.arms
    }


def _sizes(found: Inspection) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("after compression")
    for name in ("entries", "share", "bytes", "share"):
        table.add_column(name, justify="right")
    for arm in (found.full, *found.arms):
        table.add_row(
            Text(arm.name),
            f"{arm.entries:,}", f"{arm.entries / found.full.entries:.1%}",
            show_bytes(arm.held.bytes), f"{arm.held.bytes / found.full.held.bytes:.1%}",
        )  # fmt: skip
    return table


def place_lines(found: Inspection) -> list[Text]:
    """Where the text that is looked for stands, and who holds it."""
    place = found.place
    if place is None:
        return [Text("Nothing of the full cache's answer stands in the text word for word. Give --find TEXT.", "dim")]
    what = "The text" if place.given else "Of the full cache's answer,"
    return [
        Text(f"{what} {_quoted(place.text)} is at {_where(place)}."),
        *(_holders(place, arm) for arm in found.arms),
    ]


def _quoted(text: str) -> str:
    return f'"{printable(" ".join(text.split()))}"'


def _where(place: Place) -> str:
    said = [f"{start}-{stop - 1}" if stop - start > 1 else f"{start}" for start, stop in place.spans[:PLACES]]
    one = len(place.spans) == 1 and place.spans[0][1] - place.spans[0][0] == 1
    more = len(place.spans) - PLACES
    return f"token{'' if one else 's'} {', '.join(said)}" + (f" and {more} more places" if more > 0 else "")


def _holders(place: Place, arm: Seen) -> Text:
    holders, layers = place.held(arm.layout), arm.layout.layers
    whole, part, total = int(holders.whole.sum()), holders.part & ~holders.whole, holders.whole.size
    out = Text("  ").append(arm.name, "bold")
    if whole:
        out.append(f": kept by {whole} of {total} heads, in {_layers(layers, holders.whole)}")
        if part.any():
            out.append(f"; in part by {int(part.sum())} more")
    elif part.any():
        out.append(
            f": kept whole by none of {total} heads; part of it by {int(part.sum())}, in {_layers(layers, part)}"
        )
    else:
        out.append(f": no token of it kept by any of {total} heads")
    return out.append(".")


def _layers(layers: Sequence[int], heads: NDArray[np.bool_]) -> str:
    held = [number for number, row in zip(layers, heads, strict=True) if row.any()]
    if len(held) == len(layers):
        return "every layer"
    return f"layer{'s' if len(held) > 1 else ''} {', '.join(map(str, held))}"


def _answers(found: Inspection) -> Table:
    """All answers; what follows the first difference to the full cache's is set off in colour."""
    full = printable(found.full.answer)
    texts = {found.full.name: (full, len(full))}
    for arm in found.arms:
        text = printable(arm.answer)
        texts[arm.name] = (text, same_start(full, text))
    if len(found.arms) == 1:
        texts[found.full.name] = (full, texts[found.arms[0].name][1])
    shown = {name: answer_text(*pair) for name, pair in texts.items()}
    table = Table(box=box.ROUNDED, expand=True, padding=(0, 1))
    if len(shown) <= BESIDE:
        for name in shown:
            table.add_column(Text(name), ratio=1, overflow="fold")
        table.add_row(*shown.values())
        return table
    table.add_column("cache", overflow="fold")
    table.add_column("answer", ratio=1, overflow="fold")
    for name, answer in shown.items():
        table.add_row(Text(name), answer)
    return table


def agreement_line(found: Inspection, arm: Seen) -> Text:
    """Where an answer parts from the full cache's."""
    agreement = found.agreement(arm)
    if agreement.prefix == agreement.tokens:
        said = f"says the same as the full cache, token by token ({agreement.tokens})."
    else:
        said = (
            f"parts from the full cache after {agreement.prefix} of {agreement.tokens} tokens; {agreement.share:.0%} "
            "of positions agree."
        )
    return Text.assemble((arm.name, "bold"), f" {said}")
