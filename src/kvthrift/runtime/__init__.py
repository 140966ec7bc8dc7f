"""The life of a cache: attend, append, observe, compress, fork, rewind. Knows no model library."""

from kvthrift.runtime.layer import LayerCache
from kvthrift.runtime.report import CacheReport, LayerReport
from kvthrift.runtime.state import CacheState

__all__ = ["CacheReport", "CacheState", "LayerCache", "LayerReport"]
