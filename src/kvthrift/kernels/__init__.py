"""The arithmetic: attention that returns (output, log-sum-exp), its merge, and scores without stored attention.

``naive`` and ``naive_scores`` hold plain torch twins of everything; the others dispatch to the fastest correct one for
a device. Knows nothing of recipes, pages or models.
"""

from kvthrift.kernels.attention import attend
from kvthrift.kernels.best import best
from kvthrift.kernels.expected import gaussian_logits, query_moments
from kvthrift.kernels.merge import merge
from kvthrift.kernels.observe import (
    column_sums,
    entry_attention,
    power_sums,
    received_attention,
    window_attention,
    window_sums,
)
from kvthrift.kernels.paged import Paged, ReadPlan, paged_append, paged_attend, plan_read, unfit

__all__ = [
    "Paged",
    "ReadPlan",
    "attend",
    "best",
    "column_sums",
    "entry_attention",
    "gaussian_logits",
    "merge",
    "paged_append",
    "paged_attend",
    "plan_read",
    "power_sums",
    "query_moments",
    "received_attention",
    "unfit",
    "window_attention",
    "window_sums",
]
