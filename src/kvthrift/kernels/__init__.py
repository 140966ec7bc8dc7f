"""The arithmetic: attention that returns (output, log-sum-exp), its merge, and scores without stored attention.

``naive`` and ``naive_scores`` hold plain torch twins of everything; the others dispatch to the fastest correct one for
a device. Knows nothing of recipes, pages or models.
"""

from kvthrift.kernels.attention import attend
from kvthrift.kernels.best import best
from kvthrift.kernels.expected import gaussian_logits, query_moments, query_turns
from kvthrift.kernels.merge import merge
from kvthrift.kernels.observe import (
    column_sums,
    entry_attention,
    power_sums,
    received_attention,
    window_attention,
    window_sums,
)
from kvthrift.kernels.paged import Paged, paged_append, paged_attend, unfit
from kvthrift.kernels.pages import PageBounds, best_pages, page_bounds, page_scores, update_bounds
from kvthrift.kernels.plan import ReadPlan, plan_read

__all__ = [
    "PageBounds",
    "Paged",
    "ReadPlan",
    "attend",
    "best",
    "best_pages",
    "column_sums",
    "entry_attention",
    "gaussian_logits",
    "merge",
    "page_bounds",
    "page_scores",
    "paged_append",
    "paged_attend",
    "plan_read",
    "power_sums",
    "query_moments",
    "query_turns",
    "received_attention",
    "unfit",
    "update_bounds",
    "window_attention",
    "window_sums",
]
