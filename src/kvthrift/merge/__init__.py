"""Mergers: what becomes of the entries that go. Eviction is the merger that forgets them."""

from kvthrift.merge.base import Evict, Merged, Merger
from kvthrift.merge.fold import MassFold

__all__ = ["Evict", "MassFold", "Merged", "Merger"]
