"""``kvthrift methods``: the methods there are, or one explained. Built from their code, so it cannot drift."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from kvthrift.cli import options as o
from kvthrift.cli.card import Card
from kvthrift.cli.show_methods import show_card, show_cards
from kvthrift.errors import UnknownNameError
from kvthrift.methods import methods as all_methods

Name = Annotated[str | None, typer.Argument(help="A method to explain.", show_default=False)]


def methods(name: Name = None, as_json: o.AsJson = False, debug: o.Debug = False) -> None:
    """List the methods there are, or explain one: options, paper, parts and needs."""
    known = all_methods()
    if name is not None and name not in known:
        raise UnknownNameError("method", name, known)
    cards = [Card.of(method) for method in known.values() if name in (None, method.name)]
    if as_json:
        found: Any = [card.plain() for card in cards] if name is None else cards[0].plain()
        typer.echo(json.dumps(found, indent=2))
    elif name is None:
        show_cards(Console(), cards)
    else:
        show_card(Console(), cards[0])
