"""A calibration as one safetensors file: tensors keyed by (layer, head), and whose they are.

A file is written beside its place and moved there, so that a half-written one is never found; a digest over
everything in it catches damage. Knows nothing of what any kind of calibration means.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from importlib.resources import as_file
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvthrift.data import calibrations
from kvthrift.errors import CalibrationError

FORMAT = 1
_KEY = "kvthrift"  # all metadata under one key: safetensors writes several keys in no fixed order


@dataclass(frozen=True)
class Meta:
    """What a calibration is of, and how it was taken.

    Attributes:
        kind: what the tensors mean ("head_importance").
        method: the method it was made for.
        model: fingerprint of the model's config; another dtype or fine-tuned weights have the same.
        model_type: the architecture, for people.
        layers, kv_heads: sizes of the model, by the model's own count of layers.
        provenance: how many samples, how long, which seed; nothing that changes from day to day.
    """

    kind: str
    method: str
    model: str
    model_type: str
    layers: int
    kv_heads: int
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class Artefact:
    """A calibration: what it is of, and its tensors by name."""

    meta: Meta
    tensors: Mapping[str, Tensor]


def check_free(path: str | Path, *, force: bool = False) -> Path:
    """Where a new artefact may be written.

    Raises:
        CalibrationError: the file exists and ``force`` is off, or there is no such folder.
    """
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise CalibrationError(f"{target} is not a file in an existing folder, so nothing can be written there.")
    if target.exists() and not force:
        raise CalibrationError(f"{target} exists and was left as it is. Give another name, or force.")
    return target


def save(path: str | Path, tensors: Mapping[str, Tensor], meta: Meta, *, force: bool = False) -> None:
    """Write an artefact, whole or not at all.

    Args:
        path: the file.
        tensors: by name, keyed by (layer, head) inside.
        meta: what they are of.
        force: replace a file that is there.

    Raises:
        CalibrationError: the file exists, or cannot be written.
    """
    target = check_free(path, force=force)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    described = {"format": FORMAT, **asdict(meta)}
    header = json.dumps({**described, "digest": _digest(held, described)}, sort_keys=True)
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        os.close(handle)
        save_file(held, temporary, metadata={_KEY: header})
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{target} cannot be written: {error}.") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def load(path: str | Path, *, kind: str) -> Artefact:
    """Read an artefact written by :func:`save`.

    Raises:
        CalibrationError: the file is missing, damaged, of another kind or format, or not a calibration.
    """
    header, tensors = _read(Path(path))
    described = {key: value for key, value in header.items() if key != "digest"}
    if header.get("format") != FORMAT:
        raise CalibrationError(
            f"{path} has format {header.get('format')}, not {FORMAT}: it was written by another version. "
            "Calibrate again."
        )
    if header.get("digest") != _digest(tensors, described):
        raise CalibrationError(f"{path} is damaged: its digest does not fit its content. Calibrate again.")
    meta = Meta(**{f.name: header[f.name] for f in fields(Meta)})
    if meta.kind != kind:
        raise CalibrationError(f"{path} holds a calibration of kind {meta.kind!r}, but {kind!r} is needed here.")
    return Artefact(meta, tensors)


def load_named(name: str, *, method: str, kind: str, remedy: str = "") -> Artefact:
    """The artefact of that name that is shipped for a method, or the one in that file.

    ``remedy`` says how to make one where 'kvthrift calibrate' does not.

    Raises:
        CalibrationError: there is neither, or the file is not one; see :func:`load`.
    """
    shipped, made = calibrations(method), f"Make one with 'kvthrift calibrate {method}' and give that file."
    if name not in shipped and not Path(name).expanduser().exists():
        raise CalibrationError(
            f"calibration {name!r} is neither a file nor shipped for {method} (shipped: "
            f"{', '.join(sorted(shipped)) or 'none'}). {remedy or made}"
        )
    with ExitStack() as stack:
        path = stack.enter_context(as_file(shipped[name])) if name in shipped else Path(name).expanduser()
        return load(path, kind=kind)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except OSError as error:
        raise CalibrationError(f"calibration {path} cannot be read: {error.strerror or error}.") from error
    except (SafetensorError, ValueError) as error:
        raise CalibrationError(f"{path} is damaged or not a safetensors file ({error}). Calibrate again.") from error
    needed = {"digest", "format", *(f.name for f in fields(Meta))}
    if not isinstance(header, dict) or not needed <= header.keys():
        raise CalibrationError(f"{path} is a safetensors file, but not a kvthrift calibration. Give one that is.")
    return header, tensors


def _digest(tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
