"""The arithmetic: attention that returns (output, log-sum-exp), its merge, and scores without stored attention.

``naive`` holds a plain torch twin of everything; ``attention`` dispatches to the fastest correct implementation for a
device. Knows nothing of recipes, pages or models.
"""

from kvthrift.kernels.attention import attend
from kvthrift.kernels.merge import merge
from kvthrift.kernels.observe import column_sums, entry_attention, power_sums, received_attention, window_attention
from kvthrift.kernels.paged import Paged, ReadPlan, paged_append, paged_attend, plan_read, unfit

__all__ = [
    "Paged",
    "ReadPlan",
    "attend",
    "column_sums",
    "entry_attention",
    "merge",
    "paged_append",
    "paged_attend",
    "plan_read",
    "power_sums",
    "received_attention",
    "unfit",
    "window_attention",
]
