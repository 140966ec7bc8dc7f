"""Scorers: signals, keys and values in, importance of every entry out. Larger means keep.

One idea a file. Knows nothing of budgets or of what is done with a score.
"""

from kvthrift.score.base import Scorer
from kvthrift.score.bins import PositionBias
from kvthrift.score.centres import QueryCentres
from kvthrift.score.chosen import ChosenHeads
from kvthrift.score.column import AttentionReceived
from kvthrift.score.ends import EndsFirst
from kvthrift.score.expected import ExpectedAttention
from kvthrift.score.lag import LagRelative
from kvthrift.score.network import NetworkSurrogate
from kvthrift.score.norm import KeyDifference, KeyNorm
from kvthrift.score.order import Recency, Uninformed
from kvthrift.score.power import AttentionPower
from kvthrift.score.second import SecondPassAttention
from kvthrift.score.segment import SegmentGuided
from kvthrift.score.surrogate import LinearSurrogate
from kvthrift.score.window import LastQuery, WindowAttention

__all__ = [
    "AttentionPower",
    "AttentionReceived",
    "ChosenHeads",
    "EndsFirst",
    "ExpectedAttention",
    "KeyDifference",
    "KeyNorm",
    "LagRelative",
    "LastQuery",
    "LinearSurrogate",
    "NetworkSurrogate",
    "PositionBias",
    "QueryCentres",
    "Recency",
    "Scorer",
    "SecondPassAttention",
    "SegmentGuided",
    "Uninformed",
    "WindowAttention",
]
