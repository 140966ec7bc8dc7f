"""Selection: scores and counts in, which entries stay out; and what is kept or dropped together.

Knows nothing of where counts come from or how entries are stored.
"""

from kvthrift.select.refine import OutputAware, Refiner
from kvthrift.select.segment import SegmentBlocks
from kvthrift.select.unit import ChunkUnit, TokenUnit, Unit

__all__ = ["ChunkUnit", "OutputAware", "Refiner", "SegmentBlocks", "TokenUnit", "Unit"]
