"""A cache against the plain truth: all keys and values there ever were, and a slow attention over those it holds.

Any sequence of passes (short, long, padded), crops, forks and reorderings: what a pass puts out is attention over what
was held and what is new, every entry held is the one that was read at its position, and budgets are met.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import kvthrift
from kvthrift.core import no_facts
from kvthrift.recipe import Trigger
from kvthrift.runtime import CacheState
from kvthrift.runtime.layer import LayerCache

LAYERS, HEADS, GROUP, DIM, SCALE, ROOM = 2, 2, 2, 4, 0.7, 9
TURN, EVERY = 5, 3
SMALL = {"budget": ROOM, "window": 3}
RECIPES = {
    "full": kvthrift.method("full"),
    "snapkv": kvthrift.method("snapkv", **SMALL),
    "adakv": kvthrift.method("snapkv", **SMALL).with_options(heads=kvthrift.method("adakv").heads),
    "lava": kvthrift.method("lava", **SMALL),
    "streamingllm": kvthrift.method("streamingllm", budget=ROOM),
    "tova, every": kvthrift.method("tova", budget=ROOM, every=EVERY),
    "h2o, every": kvthrift.method("h2o", budget=ROOM, recent=2, every=EVERY),
    "lagkv, every": kvthrift.method("lagkv", budget=ROOM, lag=2, every=EVERY),
}


@dataclass
class Row:
    """One sequence: which columns were real, and the keys and values ``[L, H, DIM]`` of every token."""

    columns: list[bool]
    tokens: list[tuple[Tensor, Tensor]]

    def copy(self) -> Row:
        return Row(list(self.columns), list(self.tokens))


@dataclass
class Pair:
    state: CacheState
    rows: list[Row]


def held(layer: LayerCache, row: int, head: int) -> list[int]:
    """Positions that a head holds."""
    if layer.store is None:
        return []
    count = int(layer.store.lengths[row, head])
    return layer.store.positions()[row, head, :count].tolist()


def slow_attention(
    query: Tensor, tokens: list[tuple[Tensor, Tensor]], layer: int, head: int, seen: list[int]
) -> Tensor:
    keys = torch.stack([tokens[p][0][layer, head] for p in seen])
    values = torch.stack([tokens[p][1][layer, head] for p in seen])
    return (keys @ query * SCALE).softmax(dim=0) @ values


class CacheMachine(RuleBasedStateMachine):
    pairs: list[Pair]

    @initialize(name=st.sampled_from(sorted(RECIPES)), batch=st.integers(1, 2), seed=st.integers(0, 10**6))
    def start(self, name: str, batch: int, seed: int) -> None:
        recipe = RECIPES[name]
        # With `every` a pass may cut before it attends; then only the first pass also cuts behind.
        turn = 10**6 if recipe.trigger.every else TURN
        self.recipe = replace(recipe, trigger=Trigger(every=recipe.trigger.every, min_turn=turn))
        self.random = torch.Generator().manual_seed(seed)
        state = CacheState(self.recipe, list(range(LAYERS)), set(), page=4)
        self.pairs = [Pair(state, [Row([], []) for _ in range(batch)])]

    def pick(self, which: int) -> Pair:
        return self.pairs[which % len(self.pairs)]

    @rule(which=st.integers(0, 2), length=st.sampled_from((1, 1, 1, 2, 4, 5, 12, 20)), padded=st.booleans())
    def read(self, which: int, length: int, padded: bool) -> None:
        pair = self.pick(which)
        if pair.state.columns.length + length > 60:
            return
        batch = len(pair.rows)
        real = torch.rand(batch, length, generator=self.random) < (0.7 if padded else 2.0)
        q, k, v = (
            torch.randn(LAYERS, batch, heads, length, DIM, generator=self.random)
            for heads in (HEADS * GROUP, HEADS, HEADS)
        )
        cuts = self.recipe.budget is not None and (pair.state.columns.length == 0 or length >= self.min_turn)
        cuts = cuts and not (length == 1 and bool(real.all()))
        starts = [len(row.tokens) for row in pair.rows]
        for b, row in enumerate(pair.rows):
            row.columns += real[b].tolist()
            row.tokens += [(k[:, b, :, i], v[:, b, :, i]) for i in range(length) if real[b, i]]
        mask = torch.tensor([row.columns for row in pair.rows])
        for place, layer in enumerate(pair.state.layers):
            before = [[held(layer, b, h) for h in range(HEADS)] for b in range(batch)]
            out = pair.state.attend(
                place,
                q[place],
                k[place],
                v[place],
                scale=SCALE,
                mask=None if mask.all() else mask,
                facts=no_facts("nothing to tell"),
            )
            after = [[held(layer, b, h) for h in range(HEADS)] for b in range(batch)]
            for b, row in enumerate(pair.rows):
                fresh = list(range(starts[b], len(row.tokens)))
                for h in range(HEADS):
                    assert set(after[b][h]) <= {*before[b][h], *fresh}
                    past = before[b][h] if cuts else [p for p in after[b][h] if p < starts[b]]
                    if not cuts:
                        assert after[b][h] == past + fresh
                    self.check_output(place, h, out[b], q[place, b], real[b], row, past, fresh)

    @property
    def min_turn(self) -> int:
        return self.recipe.trigger.min_turn

    def check_output(
        self, place: int, head: int, out: Tensor, q: Tensor, real: Tensor, row: Row, past: list[int], fresh: list[int]
    ) -> None:
        for number, column in enumerate(real.nonzero()[:, 0].tolist()):
            seen = past + fresh[: number + 1]
            for query in range(head * GROUP, (head + 1) * GROUP):
                wanted = slow_attention(q[query, column], row.tokens, place, head, seen)
                torch.testing.assert_close(out[query, column], wanted, atol=1e-4, rtol=1e-4)

    @rule(which=st.integers(0, 2), back=st.sampled_from((0, 1, 2, 7, 60)))
    def crop(self, which: int, back: int) -> None:
        pair = self.pick(which)
        length = max(pair.state.columns.length - back, 0)
        pair.state.crop(length)
        for row in pair.rows:
            row.columns = row.columns[:length]
            row.tokens = row.tokens[: sum(row.columns)]

    @rule(which=st.integers(0, 2), rows=st.lists(st.integers(0, 5), min_size=1, max_size=3))
    def select(self, which: int, rows: list[int]) -> None:
        pair = self.pick(which)
        if pair.state.layers[0].store is None:
            return
        chosen = [row % len(pair.rows) for row in rows]
        pair.state.select(np.array(chosen, dtype=np.int64))
        pair.rows = [pair.rows[row].copy() for row in chosen]

    @precondition(lambda self: len(self.pairs) < 3)
    @rule(which=st.integers(0, 2))
    def fork(self, which: int) -> None:
        pair = self.pick(which)
        self.pairs.append(Pair(pair.state.fork(), [row.copy() for row in pair.rows]))

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(which=st.integers(0, 2))
    def drop(self, which: int) -> None:
        self.pairs.pop(which % len(self.pairs))
        gc.collect(0)

    @invariant()
    def every_entry_is_the_one_that_was_read(self) -> None:
        for pair in getattr(self, "pairs", []):
            for number, layer in enumerate(pair.state.layers):
                if layer.store is None:
                    continue
                view = layer.store.read()
                for b, row in enumerate(pair.rows):
                    for h in range(HEADS):
                        for slot, position in enumerate(held(layer, b, h)):
                            key, value = row.tokens[position]
                            assert torch.equal(view.keys[b, h, slot], key[number, h])
                            assert torch.equal(view.values[b, h, slot], value[number, h])

    @invariant()
    def tokens_and_pages_are_counted(self) -> None:
        pairs = getattr(self, "pairs", [])
        for pair in pairs:
            np.testing.assert_array_equal(
                pair.state.columns.seen(len(pair.rows)), [len(row.tokens) for row in pair.rows]
            )
            for number, layer in enumerate(pair.state.layers):
                if layer.store is None:
                    continue
                alike = [other.state.layers[number].store for other in pairs if other is not pair]
                layer.store.check_integrity(*(s for s in alike if s is not None and s.pool is layer.store.pool))

    @invariant()
    def the_budget_is_met_while_decoding(self) -> None:
        if getattr(self, "recipe", None) is None or self.recipe.trigger.every is None:
            return
        for pair in self.pairs:
            for layer in pair.state.layers:
                if layer.store is not None:
                    assert layer.store.lengths.max(initial=0) <= ROOM + max(layer.since, EVERY)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(
    max_examples=60,
    stateful_step_count=15,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
