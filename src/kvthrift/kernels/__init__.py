"""The arithmetic: attention that returns (output, log-sum-exp), its merge, and scores without stored attention.

``naive`` holds a plain torch twin of everything; ``attention`` dispatches to the fastest correct implementation for a
device. Knows nothing of recipes, pages or models.
"""

from kvthrift.kernels.attention import attend
from kvthrift.kernels.merge import merge
from kvthrift.kernels.observe import column_sums, entry_attention, window_attention

__all__ = ["attend", "column_sums", "entry_attention", "merge", "window_attention"]
