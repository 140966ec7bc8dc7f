"""Numbers about answers, caches and samples: one idea a file. Knows nothing of how any of them came about."""

from kvthrift.eval.metrics.answers import SCORERS

__all__ = ["SCORERS"]
