"""Allocators: how the room is shared out over layers, and over the heads of a layer.

Two questions, two kinds of part, combined freely. Knows nothing of how scores are made or entries chosen.
"""

from kvthrift.allocate.base import HeadAllocator, LayerAllocator, UniformHeads, UniformLayers
from kvthrift.allocate.deleted import DeletedHeads
from kvthrift.allocate.groups import GroupHeads
from kvthrift.allocate.heads import AdaptiveHeads, TableHeads
from kvthrift.allocate.joint import AgreedLayers, CompositeLayers, PoolLayers
from kvthrift.allocate.layers import EntropyLayers, PreferenceLayers, PyramidLayers
from kvthrift.allocate.listed import BudgetLayers
from kvthrift.allocate.pages import PageLayers
from kvthrift.allocate.semantic import SemanticHeads
from kvthrift.allocate.share import share_out
from kvthrift.allocate.stop import LossStop
from kvthrift.allocate.table import TableLayers
from kvthrift.allocate.threshold import ThresholdHeads, ThresholdLayers
from kvthrift.allocate.whole import WholeHeads

__all__ = [
    "AdaptiveHeads",
    "AgreedLayers",
    "BudgetLayers",
    "CompositeLayers",
    "DeletedHeads",
    "EntropyLayers",
    "GroupHeads",
    "HeadAllocator",
    "LayerAllocator",
    "LossStop",
    "PageLayers",
    "PoolLayers",
    "PreferenceLayers",
    "PyramidLayers",
    "SemanticHeads",
    "TableHeads",
    "TableLayers",
    "ThresholdHeads",
    "ThresholdLayers",
    "UniformHeads",
    "UniformLayers",
    "WholeHeads",
    "share_out",
]
