"""One step on a GPU: what was given back before it, and what its forward passes are to do besides attention.

Persistent buffers hold what kernels read, so that a CUDA graph that was captured over them can be replayed. Knows no
vLLM class: metadata and configs are taken as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvthrift.integrations.vllm import worker
from kvthrift.integrations.vllm.cells import PLAIN, Cells, pick, shown
from kvthrift.integrations.vllm.gpu_heads import HeadStep, Store, query_places
from kvthrift.integrations.vllm.gpu_ledger import Entry, Ledger, Turn
from kvthrift.integrations.vllm.gpu_pages import Pages
from kvthrift.integrations.vllm.gpu_queries import Queries
from kvthrift.integrations.vllm.moves import compact
from kvthrift.integrations.vllm.plan import Plan, Policy
from kvthrift.integrations.vllm.runner import Rows, unfinished
from kvthrift.integrations.vllm.settings import Settings
from kvthrift.store import on_device


@dataclass(frozen=True)
class Step:
    """What a forward pass does besides attention.

    Attributes:
        numbers: of each layer in its group, by its index in the model.
        turn: queries to remember; None while a graph is captured, which remembers one of each row.
        queries: where those of single tokens go; None where no scorer asks.
        rows, tokens: ``turn``'s single ones on the device; None where there are none.
        heads: the step as sequences of one head; None where all heads are equally long.
    """

    numbers: dict[int, int]
    turn: Turn | None
    queries: Queries | None
    rows: Tensor | None = None
    tokens: Tensor | None = None
    heads: HeadStep | None = None

    def remember(self, layer: int, query: Tensor, tokens: int, scale: Tensor | None = None) -> None:
        """Keep of the queries ``[>= tokens, HG, D]`` of a layer what will be asked for.

        Args:
            layer: index in the model.
            query: of the step.
            tokens: those that are none of its padding.
            scale: what queries are multiplied by that were written in a byte; None for others.
        """
        if self.queries is None:
            return
        kind = self.queries.last.dtype
        if self.turn is None:
            self.queries.keep(layer, shown(query[:tokens], scale, kind))
            return
        for note in self.turn.notes:
            book = note.entry.books[self.numbers[layer]]
            newest = query[max(note.first, note.last - note.keep) : note.last]
            book.see(shown(newest, scale, kind), note.keep)
            book.seen = note.entry.seen
        if self.rows is not None and self.tokens is not None:
            self.queries.keep_rows(layer, self.rows, shown(pick(query, self.tokens), scale, kind))


class Steps:
    """The steps of a group of layers.

    Args:
        settings: of the server.
        policy: of these layers.
        layers: their indices in the model.
        caches: tells the cache ``[B, H, size, 2D]`` of each.
        scale: softmax scale.
        block: tokens a block.
        slots: the most requests at a time.
        length: tokens of the longest request.
        query_heads: HG.
        queries: where graphs leave them.
        cells: of layers whose caches are written in fewer bits.
    """

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        layers: Sequence[int],
        caches: Callable[[int], Tensor],
        *,
        scale: float,
        block: int,
        slots: int,
        length: int,
        query_heads: int,
        queries: Queries | None,
        device: torch.device,
        cells: Mapping[int, Cells] | None = None,
    ) -> None:
        self.settings, self.policy, self.block, self.device = settings, policy, block, device
        self._caches, self._scale, self._heads, self._slots, self._length = caches, scale, query_heads, slots, length
        window = settings.recipe.needs.window
        self.ledger = Ledger(policy, layers, block=block, slots=slots, window=window, queries=queries)
        self._queries, self._cells = queries, cells or {}
        self._numbers = {layer: number for number, layer in enumerate(layers)}
        self._pages: dict[int, Pages] = {}
        self._store: Store | None = None
        self._buffers: dict[str, Tensor] = {}
        self._last: dict[str, list[int]] = {}

    @property
    def ragged(self) -> bool:
        """Whether heads may keep unequal numbers of tokens."""
        return not self.settings.recipe.heads.uniform

    def begin(self, batch: Rows | None, starts: Sequence[int], table: Tensor) -> tuple[list[Entry], Turn]:
        """See to what the last step left, move what is to be moved, and note what this step brings.

        Args:
            batch: the requests; None for a step that nobody asked for.
            starts: where the queries of each begin, and where the last one's end.
            table: ``[R, *]`` blocks of each.
        """
        ledger, turn, entries = self.ledger, Turn(), list[Entry]()
        ledger.catch_up()
        if batch is None:
            return entries, turn
        if len(ledger) > sum(ledger.get(request) is not None for request in batch.ids):
            ledger.close(unfinished(ledger.names))
        for row, (request, prompt, done) in enumerate(zip(batch.ids, batch.prompts, batch.done, strict=True)):
            entry, new = ledger.at(request, prompt, done)
            if new and self._store is not None:
                self._store.open(entry.slot)
            found = ledger.due(entry)
            if found is not None:
                self._move(entry, found, table[row].long())
            ledger.settle(entry)
            ledger.follow(turn, entry, row, starts[row], done + starts[row + 1] - starts[row])
            entries.append(entry)
        return entries, turn

    def _move(self, entry: Entry, found: Plan, own: Tensor) -> None:
        """Move what each head keeps of a request on every layer."""
        ledger, widest = self.ledger, found.kept
        for number, (layer, book) in enumerate(zip(ledger.layers, entry.books, strict=True)):
            pages = self.pages(layer)
            queries = ledger.queries(entry, number, found.at)
            if queries is None:
                queries = pages.no_queries(self._heads)
            compact(self.settings, pages, own, found, book, queries, layer=layer, scale=self._scale)
            if self.ragged:
                widest = max(widest, self.store(pages).put(number, entry))
        if self._store is not None:
            self._store.cover(entry.slot, found.full)
        ledger.moved(entry, found, widest)

    def pages(self, layer: int) -> Pages:
        """A layer's cache, head by head."""
        cache = self._caches(layer)
        known = self._pages.get(layer)
        if known is None or not known.of_cache(cache):
            known = self._pages[layer] = Pages(cache, self._cells.get(layer, PLAIN))
        return known

    def store(self, pages: Pages) -> Store:
        """Where heads keep what they keep; made for the first pages that are seen."""
        if self._store is None:
            room = max(self.policy.blocks(self._length, self.block), -(-self.policy.mean(self._length) // self.block))
            layers = len(self.ledger.layers)
            self._store = Store(layers, self._slots, room, pages.heads, pages.size, pages.step, self.device)
        return self._store

    def of(self, turn: Turn | None, heads: HeadStep | None = None) -> Step:
        """What a forward pass does in a step."""
        if turn is None or not turn.rows or self._queries is None:
            return Step(self._numbers, turn, self._queries, heads=heads)
        rows, tokens = (on_device(np.array(each, dtype=np.int64), self.device) for each in (turn.rows, turn.tokens))
        return Step(self._numbers, turn, self._queries, rows, tokens, heads)

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """Int32 numbers that stay where they are."""
        found = self._buffers.get(name)
        if found is None:
            found = self._buffers[name] = torch.zeros(shape, dtype=torch.int32, device=self.device)
        return found

    def shift(
        self, entries: Sequence[Entry], table: Tensor, lengths: Tensor, longest: int
    ) -> tuple[Tensor, Tensor, int]:
        """Block table ``[R, width]``, lengths ``[R]`` and the longest, as kernels see them: without the dropped blocks.

        Args:
            entries: of the first rows; the others are padding.
            table, lengths: of the runner.
            longest: tokens of the longest row where there are no entries.
        """
        rows, width = table.shape
        blocks, sizes = self._buffer("blocks", self._slots, width)[:rows], self._buffer("lengths", self._slots)[:rows]
        dropped = [entry.dropped for entry in entries]
        if entries:
            longest = max(entry.seen - entry.dropped * self.block for entry in entries)
        there = min(width, -(-longest // self.block))
        if any(dropped):
            given = self._sent("dropped", dropped + [0] * (rows - len(dropped)))
            blocks[:, :there], left = worker.shifted(table, lengths, given, self.block, there)
            sizes.copy_(left)
        else:
            blocks[:, :there] = table[:, :there]
            sizes.copy_(lengths)
        return blocks, sizes, longest

    def apart(
        self, entries: Sequence[Entry], starts: Sequence[int], table: Tensor, lengths: Tensor, longest: int
    ) -> HeadStep | None:
        """The step as sequences of one head each; None where all heads are equally long and kernels need not know.

        Args:
            entries: of the first rows; the others are padding. None of them: a graph is captured.
            starts: where the queries of each row begin, and where the last one's end.
            table, lengths: of the runner.
            longest: tokens of the longest row.
        """
        there = len(entries) or len(starts) - 1
        single = starts[there] == there  # those behind are padding
        if entries and not single and not any(entry.dropped for entry in entries):
            return None
        store, (rows, width) = self.store(self.pages(self.ledger.layers[0])), table.shape
        heads = store.heads
        if single:
            begins, places = self._counting(heads)[: rows * heads + 1], None
        else:
            begins, places = (on_device(part, self.device) for part in query_places(starts, heads))
        return HeadStep(
            store,
            self._sent("slots", [entry.slot for entry in entries] + [store.nobody] * (rows - len(entries))),
            lengths,
            table,
            self._buffer("tables", self._slots * heads, width)[: rows * heads],
            self._buffer("sizes", self._slots * heads)[: rows * heads],
            begins,
            places,
            rows if single else starts[-1],
            max(last - first for first, last in pairwise(starts)),
            max([entry.longest(entry.seen, self.block) for entry in entries], default=longest),
        )

    def _sent(self, name: str, numbers: list[int]) -> Tensor:
        """Numbers of each row, at a place that stays; sent only if they are others than before."""
        buffer = self._buffer(name, self._slots)[: len(numbers)]
        if self._last.get(name) != numbers:
            self._last[name] = numbers
            buffer.copy_(on_device(np.array(numbers, dtype=np.int32), self.device))
        return buffer

    def _counting(self, heads: int) -> Tensor:
        """0, 1, 2 and so on, where each sequence has one query."""
        if "counting" not in self._buffers:
            self._buffers["counting"] = torch.arange(self._slots * heads + 1, dtype=torch.int32, device=self.device)
        return self._buffers["counting"]


def extra(metadata: Any) -> Step | None:
    """The step that belongs to metadata of vLLM's; None where kvthrift has no part in it."""
    return getattr(metadata, "kvthrift", None)
