"""Knorm (2406.11430): keys with small norms stay."""

from kvthrift.methods.registry import published
from kvthrift.part import require
from kvthrift.recipe import Protect, Recipe
from kvthrift.score import KeyNorm


@published("knorm", title="Knorm (L2 norm)", paper="2406.11430")
def knorm(whole_layers: int = 0, recent: int = 0) -> Recipe:
    """Keeps the keys with the smallest L2 norm; needs no queries.

    Args:
        whole_layers: first layers that are left whole (2 in one published runner).
        recent: newest entries that stay.
    """
    require(whole_layers >= 0, f"whole_layers={whole_layers} must be 0 or more.")
    return Recipe("knorm", scorer=KeyNorm(), protect=Protect(recent=recent), skip=tuple(range(whole_layers)))
