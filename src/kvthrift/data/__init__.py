"""Texts and calibrations that are shipped with the package. Knows nothing of models or tokens."""

import tomllib
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any


def demo_text() -> str:
    """Alice's Adventures in Wonderland by Lewis Carroll (public domain): 148 kB, about 39000 tokens."""
    return files(__name__).joinpath("alice.txt").read_text(encoding="utf-8")


def calibrations(method: str) -> dict[str, Traversable]:
    """The calibrations shipped for a method: name of the model -> file."""
    prefix, suffix = f"{method}-", ".safetensors"
    found = [item for item in files(__name__).iterdir() if item.name.startswith(prefix)]
    return {item.name[len(prefix) : -len(suffix)]: item for item in found if item.name.endswith(suffix)}


def tuned(method: str) -> dict[str, dict[str, Any]]:
    """The tuned recipes shipped for a method, in plain form: name -> recipe."""
    prefix, suffix = f"{method}-", ".toml"
    found = [item for item in files(__name__).iterdir() if item.name.startswith(prefix) and item.name.endswith(suffix)]
    return {item.name[len(prefix) : -len(suffix)]: tomllib.loads(item.read_text(encoding="utf-8")) for item in found}
