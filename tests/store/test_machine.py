"""The store against a plain list: any sequence of operations on any number of forks leaves the same entries.

Every entry has a serial number from which its key, value and planes follow, so the reference keeps only
``(serial, position, mark)``; what a store holds must match exactly, in values and in the books it keeps.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from kvthrift.codec import Float8, Integer2, Integer4, Integer8
from kvthrift.core import LayerShape
from kvthrift.kernels.codes import Format
from kvthrift.store import LayerStore

FORMS = tuple(kind.format for kind in (Integer8, Integer4, Integer2, Float8))
DIMS = {None: (3, 2)}  # of keys and values, by format; 16 where numbers are in few bits
MOST_SEQUENCES, MOST_ENTRIES, MOST_STORES = 3, 400, 4
Entry = tuple[int, int, float]  # serial, position, mark


@dataclass
class Sequence:
    """What one sequence should hold: entries by head, and how many tokens it has seen."""

    heads: list[list[Entry]]
    seen: int = 0

    def copy(self) -> Sequence:
        return Sequence([list(head) for head in self.heads], self.seen)


@dataclass
class Pair:
    """A store and what it should hold."""

    store: LayerStore
    sequences: list[Sequence]
    planes: tuple[str, ...] = field(default=())

    @property
    def lengths(self) -> np.ndarray:
        return np.array([[len(head) for head in s.heads] for s in self.sequences], dtype=np.int64)


def keys(serials: Tensor, form: Format | None) -> Tensor:
    """Numbers that a format of few bits writes exactly whatever page they come to: the least or the largest."""
    if form is not None:
        return 2 * form.reach * (serials[..., None] >> torch.arange(16) & 1)
    return serials[..., None].float() + torch.tensor([0.0, 0.25, 0.5])


def values(serials: Tensor, form: Format | None) -> Tensor:
    if form is not None:
        return 2 * form.reach * (serials[..., None] >> torch.arange(15, -1, -1) & 1)
    return -serials[..., None].float() - torch.tensor([0.0, 0.5])


class StoreMachine(RuleBasedStateMachine):
    pairs: list[Pair]

    forms: tuple[Format | None, ...] = (None,)

    @initialize(
        page=st.sampled_from((4, 64)),
        heads=st.integers(1, 3),
        batch=st.integers(1, 2),
        planes=st.sampled_from(((), ("bias",), ("bias", "columns"))),
        form=st.integers(0, 3),
    )
    def start(self, page: int, heads: int, batch: int, planes: tuple[str, ...], form: int) -> None:
        chosen = self.forms[form % len(self.forms)]
        shape = LayerShape(heads, 2 * heads, *DIMS.get(chosen, (16, 16)))
        store = LayerStore(shape, batch, torch.float32, torch.device("cpu"), page=page, planes=planes, form=chosen)
        self.page, self.heads, self.serial = page, heads, 1
        self.pairs = [Pair(store, [Sequence([[] for _ in range(heads)]) for _ in range(batch)], planes)]

    def pick(self, which: int) -> Pair:
        return self.pairs[which % len(self.pairs)]

    # -- operations ----------------------------------------------------------------------------------------------

    @rule(which=st.integers(0, 3))
    def append_one(self, which: int) -> None:
        self._append(self.pick(which), 1, None)

    @rule(which=st.integers(0, 3), count=st.sampled_from((2, 3, 5, 9, 63, 64, 65, 150)), marked=st.booleans())
    def append_many(self, which: int, count: int, marked: bool) -> None:
        self._append(self.pick(which), count, None, marked=marked)

    @rule(which=st.integers(0, 3), count=st.integers(1, 12), data=st.data())
    def append_padded(self, which: int, count: int, data: st.DataObject) -> None:
        pair = self.pick(which)
        counts = data.draw(st.lists(st.integers(0, count), min_size=len(pair.sequences), max_size=len(pair.sequences)))
        self._append(pair, count, np.array(counts, dtype=np.int64))

    def _append(self, pair: Pair, count: int, counts: np.ndarray | None, *, marked: bool = False) -> None:
        if pair.lengths.max(initial=0) + count > MOST_ENTRIES:
            return
        batch = len(pair.sequences)
        size = batch * self.heads * count
        serials = torch.arange(self.serial, self.serial + size).view(batch, self.heads, count)
        self.serial += size
        starts = torch.tensor([s.seen for s in pair.sequences])
        positions = starts[:, None] + torch.arange(count)
        marks = (serials % 7).float() if marked else torch.zeros(serials.shape)
        planes = dict.fromkeys(pair.planes, marks) if marked else None
        k, v = keys(serials, pair.store.form), values(serials, pair.store.form)
        if counts is not None:  # what stands behind the real ones must not matter
            hidden = torch.arange(count) >= torch.from_numpy(counts)[:, None, None]
            k, v = k.masked_fill(hidden[..., None], 1e9), v.masked_fill(hidden[..., None], 1e9)
        pair.store.append(k, v, positions, counts=counts, planes=planes)
        for b, sequence in enumerate(pair.sequences):
            real = count if counts is None else int(counts[b])
            for h, head in enumerate(sequence.heads):
                head += [(int(serials[b, h, i]), sequence.seen + i, float(marks[b, h, i])) for i in range(real)]
            sequence.seen += real

    @rule(
        which=st.integers(0, 3),
        seed=st.integers(0, 2**16),
        share=st.sampled_from((0.0, 0.1, 0.5, 1.0)),
        drop=st.booleans(),
        late=st.booleans(),
    )
    def replace(self, which: int, seed: int, share: float, drop: bool, late: bool) -> None:
        pair = self.pick(which)
        if drop:
            pair.planes = pair.planes[:1]
        draw = np.random.default_rng(seed)
        for sequence in pair.sequences:
            for h, head in enumerate(sequence.heads):
                ragged = draw.choice((share, draw.random()))
                sequence.heads[h] = [entry for entry in head if draw.random() < ragged]
        flat = [entry for sequence in pair.sequences for head in sequence.heads for entry in head]
        serials = torch.tensor([entry[0] for entry in flat], dtype=torch.long)
        marks = torch.tensor([entry[2] for entry in flat])
        pair.store.replace(
            keys(serials, pair.store.form),
            values(serials, pair.store.form),
            torch.tensor([entry[1] for entry in flat], dtype=torch.long),
            torch.from_numpy(pair.lengths) if late else pair.lengths,
            planes={name: marks.clone() for name in pair.planes},
            form=pair.store.form,
        )

    @rule(which=st.integers(0, 3), data=st.data())
    def rewind(self, which: int, data: st.DataObject) -> None:
        pair = self.pick(which)
        limits = [
            data.draw(st.integers(max(0, s.seen - back), s.seen))
            for s, back in ((s, data.draw(st.sampled_from((3, 70, MOST_ENTRIES)))) for s in pair.sequences)
        ]
        pair.store.rewind(torch.tensor(limits))
        for sequence, limit in zip(pair.sequences, limits, strict=True):
            sequence.heads = [[e for e in head if e[1] < limit] for head in sequence.heads]
            sequence.seen = limit

    @rule(which=st.integers(0, 3), rows=st.lists(st.integers(0, 5), min_size=1, max_size=MOST_SEQUENCES))
    def select(self, which: int, rows: list[int]) -> None:
        pair = self.pick(which)
        chosen = [row % len(pair.sequences) for row in rows]
        pair.store.select(np.array(chosen, dtype=np.int64))
        pair.sequences = [pair.sequences[row].copy() for row in chosen]

    @precondition(lambda self: all(pair.planes for pair in self.pairs))
    @rule(which=st.integers(0, 3), mark=st.integers(1, 5))
    def write_plane(self, which: int, mark: int) -> None:
        """The same number for all planes and entries: one mark an entry is all that the reference keeps."""
        pair = self.pick(which)
        if not pair.store.longest:
            return
        for name in pair.planes:
            pair.store.write(name, torch.full(pair.store.valid().shape, float(mark)))
        for sequence in pair.sequences:
            sequence.heads = [[(s, p, float(mark)) for s, p, _ in head] for head in sequence.heads]

    @precondition(lambda self: len(self.pairs) < MOST_STORES)
    @rule(which=st.integers(0, 3))
    def fork(self, which: int) -> None:
        pair = self.pick(which)
        self.pairs.append(Pair(pair.store.fork(), [s.copy() for s in pair.sequences], pair.planes))

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(which=st.integers(0, 3))
    def drop(self, which: int) -> None:
        self.pairs.pop(which % len(self.pairs))
        gc.collect(0)

    # -- what always holds ---------------------------------------------------------------------------------------

    @invariant()
    def contents_are_exact(self) -> None:
        for pair in getattr(self, "pairs", []):
            check_contents(pair)

    @invariant()
    def books_balance(self) -> None:
        pools: dict[int, list[LayerStore]] = defaultdict(list)
        for pair in getattr(self, "pairs", []):
            pools[id(pair.store.pool)].append(pair.store)
        for first, *others in pools.values():
            first.check_integrity(*others)

    @invariant()
    def bytes_are_those_of_live_tensors(self) -> None:
        for pair in getattr(self, "pairs", []):
            pool = pair.store.pool
            found = [*vars(pair.store).values(), *vars(pool).values(), *pool.planes.values(), *pool.marks.values()]
            found += [] if pair.store.tail is None else vars(pair.store.tail).values()
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in found if isinstance(t, Tensor)}
            assert pair.store.bytes == sum(s.nbytes() for s in storages.values())


def check_contents(pair: Pair) -> None:
    store, lengths = pair.store, pair.lengths
    np.testing.assert_array_equal(store.lengths, lengths)
    assert store.batch == len(pair.sequences)
    assert store.longest == lengths.max(initial=0)
    assert store.entries == lengths.sum()
    view, positions = store.read(), store.positions()
    shape = (len(pair.sequences), lengths.shape[1], store.longest)
    dims = DIMS.get(store.form, (16, 16))
    assert view.keys.shape == (*shape, dims[0])
    assert view.values.shape == (*shape, dims[1])
    assert view.keys.isfinite().all()
    assert view.values.isfinite().all()
    table = torch.zeros(*shape, 3, dtype=torch.float64)  # serial, position, mark
    real = torch.zeros(shape, dtype=torch.bool)
    for b, sequence in enumerate(pair.sequences):
        for h, head in enumerate(sequence.heads):
            if head:
                table[b, h, : len(head)] = torch.tensor(head, dtype=torch.float64)
                real[b, h, : len(head)] = True
    serials, places, marks = table.unbind(-1)
    assert torch.equal(store.valid(), real)
    assert torch.equal(view.keys[real], keys(serials.long(), store.form)[real])
    assert torch.equal(view.values[real], values(serials.long(), store.form)[real])
    assert torch.equal(positions[real], places.long()[real])
    for name in pair.planes:
        assert torch.equal(store.plane(name)[real], marks.float()[real])
    check_bias(pair, view.bias, real, marks.float())


def check_bias(pair: Pair, bias: Tensor | None, real: Tensor, marks: Tensor) -> None:
    if bias is None:
        assert real.all()
        assert "bias" not in pair.planes
        return
    assert (bias[~real] == float("-inf")).all()
    expected = marks if "bias" in pair.planes else torch.zeros_like(marks)
    assert torch.equal(bias[real], expected[real])


class CodedStoreMachine(StoreMachine):
    forms = FORMS


TestStore = StoreMachine.TestCase
TestCodedStore = CodedStoreMachine.TestCase
TestStore.settings = TestCodedStore.settings = settings(
    max_examples=80,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
