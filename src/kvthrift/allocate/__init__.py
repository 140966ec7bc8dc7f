"""Allocators: how the room is shared out over layers, and over the heads of a layer.

Two questions, two kinds of part, combined freely. Knows nothing of how scores are made or entries chosen.
"""

from kvthrift.allocate.base import HeadAllocator, LayerAllocator, UniformHeads, UniformLayers
from kvthrift.allocate.heads import AdaptiveHeads, TableHeads
from kvthrift.allocate.layers import EntropyLayers, PreferenceLayers, PyramidLayers
from kvthrift.allocate.share import share_out

__all__ = [
    "AdaptiveHeads",
    "EntropyLayers",
    "HeadAllocator",
    "LayerAllocator",
    "PreferenceLayers",
    "PyramidLayers",
    "TableHeads",
    "UniformHeads",
    "UniformLayers",
    "share_out",
]
