"""What a context looks at when it is read a second time: scores that know no question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvthrift.core import LayerView, SecondPass, Signals
from kvthrift.part import require
from kvthrift.score.base import Scorer


@dataclass(frozen=True)
class SecondPassAttention(Scorer, name="second_pass"):
    """Attention that an entry receives when the context is fed once more behind itself (2505.23416, 2509.05165).

    With ``relative`` it is what that attention adds to the query's hidden state, as a share of it (2601.07891).

    The first options are those of :class:`kvthrift.core.SecondPass`: how much is repeated at a time, what the softmax
    runs over, how queries and the group are joined, and the words that ask for the repetition. With ``value_norm`` the
    result is multiplied by ||v||_2; with ``across_heads`` the mean over the layer's heads is then added once.
    """

    chunk: int = 2000
    among: Literal["chunk", "all"] = "chunk"
    queries: Literal["max", "mean"] = "max"
    group: Literal["max", "mean"] = "max"
    sinks: int = 0
    instructed: bool = True
    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    reply: tuple[int, ...] = ()
    overlap: int = 8
    sees: Literal["all", "chunk"] = "all"
    relative: bool = False
    probe: tuple[int, ...] = ()
    value_norm: bool = False
    across_heads: bool = False
    is_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.chunk >= 0, f"chunk={self.chunk} must be 0 (all at once) or more tokens.")
        require(self.sinks >= 0, f"sinks={self.sinks} must be 0 or more tokens.")
        require(self.overlap >= 0, f"overlap={self.overlap} must be 0 or more tokens.")
        require(
            self.sees == "all" or self.among == "chunk",
            'sees="chunk" needs among="chunk": what is not seen has no share of the softmax.',
        )
        require(
            not self.probe or self.among == "all",
            'a probe needs among="all": it repeats no chunk that its softmax could be confined to.',
        )
        ids = (*self.first, *self.later, *self.reply, *self.probe)
        require(min(ids, default=0) >= 0, f"token ids {ids} must be 0 or more.")

    @property
    def look(self) -> SecondPass:
        """The second pass whose attention this is."""
        return SecondPass(
            self.chunk, self.among, self.queries, self.group, self.sinks, self.instructed, self.first, self.later,
            self.reply, self.overlap, self.sees, self.relative, self.probe,
        )  # fmt: skip

    @property
    def needs(self) -> Signals:
        return Signals(second_pass=(self.look,))

    def score(self, view: LayerView) -> Tensor:
        if self.look not in view.second_pass:
            raise ValueError("the runtime did not gather the second pass that was declared")
        score = view.second_pass[self.look]
        if self.value_norm:
            score = score * view.values.float().norm(dim=-1)
        if self.across_heads:
            there = view.valid.sum(dim=1, keepdim=True).clamp(min=1)
            score = score + score.masked_fill(~view.valid, 0.0).sum(dim=1, keepdim=True) / there
        return score
