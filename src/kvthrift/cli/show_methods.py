"""Methods as tables for people, readable from 80 columns on."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvthrift.budget import Budget
from kvthrift.cli.card import Card

PAPERS = "https://arxiv.org/abs/"
EXAMPLE_BUDGET = "25%"
LARGE_BUDGET = "8192"  # where the whole prompt stays, which is more than any share of it


def show_cards(console: Console, cards: list[Card]) -> None:
    """Print one row a method."""
    table = _table("method", "what it does", "arXiv, and needs")
    table.columns[2].max_width = 20
    for card in cards:
        needs = card.needs if card.recipe is not None else "a calibration"
        what = Text.assemble(card.method.title, (f"\n{_plain(card.method.summary)}", "dim"))
        table.add_row(card.method.name, what, Text.assemble(card.method.paper, (f"\n{needs}", "dim")))
    console.print(table)
    console.print(Text("kvthrift methods NAME explains one.", style="dim"))


def show_card(console: Console, card: Card) -> None:
    """Print all there is to say of one method."""
    method = card.method
    paper = f"  {PAPERS}{method.paper}" if method.paper else ""
    console.print(Text.assemble((method.title, "bold"), (paper, "dim")))
    for paragraph in method.text.split("\n\n"):
        console.print(Text(f"\n{_plain(paragraph)}"))
    if card.options:
        console.print(_options(card))
    console.print(_parts(card))
    console.print(Text(_example(card), style="dim"))


def _options(card: Card) -> Table:
    table = _table("option", "default", "type", "meaning")
    for option in card.options:
        default = "" if option.default is None else str(option.default)
        table.add_row(option.name, Text(default), Text(option.type), Text(_plain(option.help)))
    return table


def _parts(card: Card) -> Table:
    table = _table("part", "by default")
    recipe = card.recipe
    if recipe is not None and recipe.name != "full":
        recipe = recipe.with_options(budget=Budget.parse(_budget(card)))
    for question, answer in recipe.table() if recipe is not None else [("needs", card.needs)]:
        table.add_row(question, Text(answer))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, style="bold" if not number else "", no_wrap=not number)
    return table


def _example(card: Card) -> str:
    words = ["kvthrift run --method", card.method.name]
    if card.method.name != "full":
        words += ["--budget", _budget(card)]
    own = next((x for x in card.method.options if isinstance(x.default, int) and x.default), None)
    return " ".join([*words, *(["--option", f"{own.name}={own.default}"] if own else [])])


def _budget(card: Card) -> str:
    return LARGE_BUDGET if card.recipe is not None and card.recipe.needs.prompt else EXAMPLE_BUDGET


def _plain(text: str) -> str:
    """Prose of a docstring in one line, without its code marks."""
    return " ".join(text.replace("``", "").split())
