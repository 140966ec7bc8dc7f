"""The ``kvthrift`` command before the library: what it says of itself as a whole takes neither torch nor transformers.

Importing :mod:`kvthrift` brings both, for it makes itself known to them. So the list of verbs and the version are read
off its sources here, and everything else is handed on to :mod:`kvthrift.cli`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

VERBS = ("run", "inspect", "methods", "calibrate", "eval", "tune", "report", "serve")
_OF_ALL = ("--help", "--version")


def main() -> None:
    """Entry point of the ``kvthrift`` command."""
    if set(sys.argv[1:]) <= set(_OF_ALL):
        outline()()
    else:
        from kvthrift.cli import main as whole

        whole()


def command(version: str) -> typer.Typer:
    """The command without its verbs."""
    app = typer.Typer(
        name="kvthrift",
        help="Shrinks the KV cache of language models, and really frees the memory.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )

    @app.callback(invoke_without_command=True)
    def _root(
        context: typer.Context,
        asked: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    ) -> None:
        if asked:
            typer.echo(f"kvthrift {version}")
        elif context.invoked_subcommand is None:
            typer.echo(context.get_help())

    return app


def outline() -> typer.Typer:
    """The command with verbs that have a name and a docstring, and do nothing."""
    folder = Path(__file__).parents[1] / "kvthrift"
    app = command(_version(folder))
    for verb in VERBS:
        app.command(name=verb)(_stub(folder, verb))
    return app


def _stub(folder: Path, verb: str) -> Callable[[], None]:
    def stub() -> None:
        raise AssertionError(f"{verb} is done by kvthrift.cli")

    source = _parsed(folder / "cli" / f"{verb}.py")
    found = (node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == verb)
    stub.__doc__ = ast.get_docstring(next(found))
    return stub


def _version(folder: Path) -> str:
    for node in _parsed(folder / "__init__.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    raise AssertionError("kvthrift has no version")


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))
