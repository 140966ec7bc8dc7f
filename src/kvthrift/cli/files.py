"""Reading texts and writing results without ever leaving half a file. Knows nothing of what is in them."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from kvthrift.errors import ContextError, RecipeError


def read_text(name: str) -> str:
    """The text of a file, or of stdin for ``-``.

    Raises:
        ContextError: there is no such file, or it is not UTF-8 text.
    """
    where = "stdin" if name == "-" else f"file {name!r}"
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ContextError(
            f"context {where} cannot be read ({error.strerror}), so there is nothing to ask about. Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise ContextError(
            f"context {where} is not UTF-8 text (byte {error.start}), so it cannot be tokenized. Convert it first."
        ) from error


def check_target(path: Path, *, force: bool) -> None:
    """Refuse, before any work is done, a place that :func:`write_whole` could not or should not write to.

    Raises:
        RecipeError: the file is there already, or its folder is not.
    """
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "lies in a folder that does not exist"
        raise RecipeError(f"{str(path)!r} {what}, so nothing can be saved there. Give a file in an existing folder.")
    if path.exists() and not force:
        raise RecipeError(f"{str(path)!r} is there already and was left as it is. Give another name, or --force.")


def write_whole(path: Path, text: str, *, force: bool) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        RecipeError: as :func:`check_target`, or the disk refuses.
    """
    check_target(path, force=force)
    try:
        _write(path, text)
    except OSError as error:
        raise RecipeError(
            f"{str(path)!r} cannot be written ({error.strerror}); nothing was left there. Give another place."
        ) from error


def _write(path: Path, text: str) -> None:
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
