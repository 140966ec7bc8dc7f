"""Texts and calibrations that are shipped with the package. Knows nothing of models or tokens."""

from importlib.resources import files
from importlib.resources.abc import Traversable


def demo_text() -> str:
    """Alice's Adventures in Wonderland by Lewis Carroll (public domain): 148 kB, about 39000 tokens."""
    return files(__name__).joinpath("alice.txt").read_text(encoding="utf-8")


def calibrations(method: str) -> dict[str, Traversable]:
    """The calibrations shipped for a method: name of the model -> file."""
    prefix, suffix = f"{method}-", ".safetensors"
    found = [item for item in files(__name__).iterdir() if item.name.startswith(prefix)]
    return {item.name[len(prefix) : -len(suffix)]: item for item in found if item.name.endswith(suffix)}
