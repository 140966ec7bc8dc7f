"""The records every layer of kvthrift passes around.

Dimensions: ``B`` sequences, ``L`` layers, ``H`` KV heads, ``G`` query heads per KV head, ``T`` entries, ``W`` window
queries, ``Dk`` and ``Dv`` key and value head dims. Knows nothing of how any record is made or used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvthrift.errors import MissingSignalError


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one attention layer: KV heads, query heads, key and value head dims."""

    kv_heads: int
    query_heads: int
    key_dim: int
    value_dim: int

    @property
    def group(self) -> int:
        """Query heads per KV head (``G``)."""
        return self.query_heads // self.kv_heads


@dataclass(frozen=True)
class SecondPass:
    """A second look at a context that was read whole: it is fed again behind itself, and what that attends to is kept.

    Attributes:
        chunk: context tokens that are repeated at a time, each time behind the whole context; 0 repeats all at once.
        among: what a repeated token's softmax runs over: the first ``sinks`` tokens, the ``"chunk"`` it repeats and the
            repeated tokens up to itself, or ``"all"`` that was read and them.
        queries, group: how attention is joined over the tokens that are fed, then over a KV head's query heads.
        sinks: leading tokens that are not repeated and score 0.
        instructed: whether words stand before each chunk that ask for it to be repeated.
        first, later, reply: token ids of those words for the first chunk, for later ones, and between words and chunk.
            All empty: words of the integration's own, where it has a tokenizer; else none.
        overlap: tokens before a later chunk that its words quote.
        sees: what repeated tokens attend to: ``"all"`` that was read, or the first ``sinks`` tokens and the
            ``"chunk"`` they repeat, which makes the pass linear in the context (``among="chunk"`` only).
        relative: multiply attention by the norm of the entry's projected value over that of the query's hidden state.
        probe: token ids that are fed in place of the context, all at once; () feeds the context.
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


Products = Literal["exact", "int8"]


@dataclass(frozen=True)
class Powers:
    """Powers of attention that entries receive, added up over queries and the group, decode steps included.

    Attributes:
        power: 2 for squares, 1 for the attention itself.
        window: newest queries of each pass over several tokens that count; 0 for all.
        buffer: a query does not count for entries fewer positions before it than this.
        kernel: neighbours that share a maximum, pass by pass; 1 for none. Decode steps add theirs as they are.
        products: of queries and keys, ``"exact"`` or rounded to ``"int8"`` first; decode steps add theirs exactly.
    """

    power: int = 2
    window: int = 8
    buffer: int = 0
    kernel: int = 7
    products: Products = "exact"

    @property
    def plane(self) -> str:
        """What the plane that keeps it is called."""
        rounded = "" if self.products == "exact" else f" {self.products}"
        return f"power {self.power} {self.window} {self.buffer} {self.kernel}{rounded}"


@dataclass(frozen=True)
class Signals:
    """What a part needs to see. The runtime gathers each once, and nothing undeclared.

    ``window``: how many of the last queries; ``moments``: mean and covariance of pre-RoPE
    queries from position ``moments_after`` on; ``columns``:
    attention received by each entry from all queries so far; ``output_weight``: the output projection;
    ``powers``: the same of their powers; ``rope``: the rotary embedding; ``second_pass``: what a context fed again
    behind itself attends to; ``segments``: which part of the text, cut at punctuation, each token belongs to;
    ``stand_ins``: that outputs of other heads take the place of those of heads that are given up; ``prompt``: how many
    tokens were read before the first was decoded, all of which are then to stay.
    """

    window: int = 0
    moments: bool = False
    moments_after: int = 0
    columns: bool = False
    output_weight: bool = False
    rope: bool = False
    second_pass: tuple[SecondPass, ...] = ()
    segments: bool = False
    powers: tuple[Powers, ...] = ()
    stand_ins: bool = False
    prompt: bool = False

    def __or__(self, other: Signals) -> Signals:
        return Signals(
            max(self.window, other.window),
            self.moments or other.moments,
            max(self.moments_after, other.moments_after),
            self.columns or other.columns,
            self.output_weight or other.output_weight,
            self.rope or other.rope,
            tuple(dict.fromkeys((*self.second_pass, *other.second_pass))),
            self.segments or other.segments,
            tuple(dict.fromkeys((*self.powers, *other.powers))),
            self.stand_ins or other.stand_ins,
            self.prompt or other.prompt,
        )

    def __str__(self) -> str:
        names = [f"last {self.window} queries" if self.window > 1 else "last query"] if self.window else []
        names += [
            label
            for wanted, label in (
                (self.moments, "query mean and covariance"),
                (self.columns, "attention column sums"),
                (self.output_weight, "output projection"),
                (self.rope, "rotary embedding"),
                (bool(self.second_pass), "a second pass over the context"),
                (self.segments, "segments of the text"),
                (bool(self.powers), "sums of attention powers"),
                (self.stand_ins, "outputs of other heads"),
                (self.prompt, "the prompt's length"),
            )
            if wanted
        ]
        return ", ".join(names) or "keys and values only"


@dataclass(frozen=True)
class Rope:
    """A static rotary embedding in the half-split convention, on the first ``2 * len(inv_freq)`` dims of a head."""

    inv_freq: Tensor
    attention_scaling: float = 1.0

    def angles(self, positions: Tensor) -> Tensor:
        """Angles ``[..., R/2]`` in radians for integer ``positions [...]``, in float32."""
        return positions[..., None].float() * self.inv_freq.to(positions.device)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``x [..., D]`` by ``positions [...]`` (negative un-rotates); magnitudes are untouched."""
        half = self.inv_freq.numel()
        angles = self.angles(positions)
        cos, sin = angles.cos(), angles.sin()
        first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
        return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


@dataclass(frozen=True)
class ModuleFacts:
    """What only the model's own attention module can tell, asked for when a part declares it."""

    output_weight: Callable[[], Tensor]
    rope: Callable[[], Rope]


def no_facts(what: str) -> ModuleFacts:
    """Facts of a module that can tell nothing: each question raises with ``what`` as the reason."""

    def refuse() -> Tensor:
        raise MissingSignalError(what)

    return ModuleFacts(output_weight=refuse, rope=refuse)  # type: ignore[arg-type]


@dataclass
class QueryMoments:
    """Running sums over pre-RoPE queries: ``count [B]``, ``total [B, HG, D]``, ``outer [B, HG, D, D]`` (float32)."""

    count: Tensor
    total: Tensor
    outer: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean query ``[B, HG, D]``."""
        return self.total / self.count.clamp(min=1)[:, None, None]

    @property
    def covariance(self) -> Tensor:
        """Covariance ``[B, HG, D, D]``, divided by the count."""
        mean = self.mean
        return self.outer / self.count.clamp(min=1)[:, None, None, None] - mean[..., :, None] * mean[..., None, :]


@dataclass
class LayerView:
    """What the parts of a recipe see of one layer when it is compressed.

    Entries are left-aligned and in position order: entry ``i`` of head ``(b, h)`` is real when ``i < lengths[b, h]``.

    Attributes:
        layer, layers: index of this layer among the compressed ones, and their number.
        numbers: the model's own numbers of the compressed layers; empty if they are ``0 .. layers - 1``.
        keys, values: ``[B, H, T, Dk]`` as cached (post-RoPE), ``[B, H, T, Dv]``.
        positions: ``[B, H, T]`` int64, true token positions.
        lengths: ``[B, H]`` int64.
        seen: ``[B]`` int64, tokens of each sequence so far.
        known_seen, known_lengths: the same as ``seen`` and ``lengths``, where the host need not ask for them.
        shared: what was computed for all layers of a pass whose views differ in queries, keys and values only.
        scale: the softmax scale of the layer.
        group: query heads per KV head.
        queries, query_positions: ``[B, HG, W, Dk]`` post-RoPE, ``[B, W]`` int64 (-1 where there is none).
        bias: ``[B, H, T]`` float32 log mass that folded entries carry on their logits, if any do.
        moments, columns, output_weight, rope: further signals; ``columns [B, H, T]`` float32, ``output_weight
            [HG, Dv, hidden]``.
        second_pass: ``[B, H, T]`` float32 for each second pass that was made.
        powers: ``[B, H, T]`` float32 for each sum of attention powers.
        segments: ``[B, P]`` number of the segment at every true position; the last column stands for all text behind.
        prompt: ``[B]`` int64, tokens that were read before the first was decoded.
    """

    layer: int
    layers: int
    keys: Tensor
    values: Tensor
    positions: Tensor
    lengths: Tensor
    seen: Tensor
    scale: float
    group: int = 1
    queries: Tensor | None = None
    query_positions: Tensor | None = None
    moments: QueryMoments | None = None
    columns: Tensor | None = None
    output_weight: Tensor | None = None
    rope: Rope | None = None
    numbers: tuple[int, ...] = ()
    bias: Tensor | None = None
    second_pass: dict[SecondPass, Tensor] = field(default_factory=dict)
    powers: dict[Powers, Tensor] = field(default_factory=dict)
    segments: Tensor | None = None
    prompt: Tensor | None = None
    known_seen: tuple[int, ...] = ()
    known_lengths: NDArray[np.int64] | None = None
    shared: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False)
    _valid: Tensor | None = field(default=None, repr=False)

    @property
    def valid(self) -> Tensor:
        """``[B, H, T]`` bool: which entries are real."""
        if self._valid is None:
            self._valid = self.once("valid", lambda: self._steps < self.lengths[..., None])
        return self._valid

    @property
    def full(self) -> bool:
        """Whether the host knows that every entry is real."""
        return self.known_lengths is not None and bool((self.known_lengths == self.keys.shape[2]).all())

    @property
    def _steps(self) -> Tensor:
        return torch.arange(self.keys.shape[2], device=self.keys.device)

    def once(self, name: Any, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gives, made for the first layer that asks; it must look at sizes, places and lengths only."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]

    @property
    def tokens(self) -> tuple[int, ...]:
        """``seen`` on the host."""
        return self.known_seen or tuple(self.seen.tolist())

    @property
    def counted(self) -> NDArray[np.int64]:
        """``lengths`` on the host."""
        known = self.known_lengths
        return self.lengths.cpu().numpy().astype(np.int64) if known is None else known

    @property
    def segment_of(self) -> Tensor:
        """``[B, H, T]`` int64: the segment that each entry's token belongs to; where there is none, anything."""
        return self.segment_at(self.positions.flatten(1)).view(self.positions.shape)

    def segment_at(self, positions: Tensor) -> Tensor:
        """The same for true positions ``[B, N]``."""
        if self.segments is None:
            raise ValueError("the runtime was not told the segments that were declared")
        return self.segments.long().gather(1, positions.clamp(0, self.segments.shape[1] - 1))

    def tail(self, count: int) -> Tensor:
        """``[B, H, T]`` bool: the last ``count`` real entries of each head."""
        return self.once(("tail", count), lambda: self.valid & (self._steps >= self.lengths[..., None] - count))


@dataclass(frozen=True)
class AttentionOutput:
    """Attention over one set of entries: ``out [B, HG, Q, Dv]`` and, if asked for, ``lse [B, HG, Q]`` (float32)."""

    out: Tensor
    lse: Tensor | None = None
