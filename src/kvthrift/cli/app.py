"""The ``kvthrift`` command: its verbs, and what it does without one.

A verb is a function in a module of the same name. Adding one touches its file and the list below.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

import kvthrift
from kvthrift.cli.guard import guarded

VERBS = ("run", "inspect", "methods", "calibrate", "eval", "tune", "report", "serve")

app = typer.Typer(
    name="kvthrift",
    help="Shrinks the KV cache of language models, and really frees the memory.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

for _verb in VERBS:
    _module = import_module(f"kvthrift.cli.{_verb}")
    app.command(context_settings=getattr(_module, "CONTEXT", None))(guarded(getattr(_module, _verb)))


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        typer.echo(f"kvthrift {kvthrift.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
