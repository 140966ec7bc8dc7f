"""Turns what a verb raises into one line on stderr and an exit code. Knows no verb.

0: done; 1: a defect of ours or of the machine; 2: bad input; 130: interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from kvthrift.errors import KvthriftError


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, with its errors said in a line; a traceback only where its ``debug`` argument asks for one."""

    @wraps(verb)
    def run(**options: Any) -> None:
        debug = bool(options.get("debug"))
        try:
            verb(**options)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except KvthriftError as error:
            raise _leave(2, str(error), debug) from None
        except KeyboardInterrupt:
            raise _leave(130, "interrupted.", debug) from None
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise _leave(1, f"{what} (not foreseen; run again with --debug)", debug) from None

    return run


def _leave(code: int, message: str, debug: bool) -> typer.Exit:
    console = Console(stderr=True)
    if debug:
        console.print_exception()
    console.print(Text.assemble(("error: ", "bold red"), message.replace("\n", " ")), soft_wrap=True)
    return typer.Exit(code)
