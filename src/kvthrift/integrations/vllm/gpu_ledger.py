"""What a group of layers knows of each request, step by step: what was given back, and queries that will be asked for.

Nothing is moved while a step runs, since a step may be the replay of a CUDA graph. What a step made superfluous is seen
to before the next one. Knows no vLLM class.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvthrift.errors import CacheStateError
from kvthrift.integrations.vllm.books import Book
from kvthrift.integrations.vllm.gpu_queries import Queries
from kvthrift.integrations.vllm.plan import Plan, Policy, plan


@dataclass
class Entry:
    """One request on all layers of a group.

    Attributes:
        prompt: tokens of its prompt.
        since: tokens that were in the cache when it was first met, whose queries nobody saw.
        slot: its own number while it is served.
        books: of each layer.
        seen: tokens in the cache behind the newest step.
        full, dropped: blocks that kept tokens stand for, and leading blocks that were given back.
        widest: blocks of its longest head.
        moved: tokens there were in the cache when it was last seen to.
    """

    prompt: int
    since: int
    slot: int
    books: list[Book]
    seen: int = 0
    full: int = 0
    dropped: int = 0
    widest: int = 0
    moved: int = 0

    def longest(self, length: int, block: int) -> int:
        """Entries of its longest head when there are ``length`` tokens."""
        return length + (self.widest - self.full) * block


@dataclass(frozen=True)
class Note:
    """Queries to be remembered: of the tokens ``first .. last - 1`` of a step, the newest ``keep``."""

    entry: Entry
    first: int
    last: int
    keep: int


@dataclass
class Turn:
    """What a step's forward passes are to remember.

    Attributes:
        notes: of requests with several tokens.
        rows, tokens: rows with one token, and which token of the step that is.
    """

    notes: list[Note] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class Ledger:
    """All requests of a group of layers.

    Args:
        policy: of the layers.
        layers: their indices in the model.
        block: tokens a block.
        slots: the most requests at a time.
        window: queries that the scorer asks for.
        queries: where graphs leave them; None where nothing asks for any.
    """

    def __init__(
        self, policy: Policy, layers: Sequence[int], *, block: int, slots: int, window: int, queries: Queries | None
    ) -> None:
        self.policy, self.layers, self.block, self.window = policy, tuple(layers), block, window
        self._queries, self._open, self._slots = queries, dict[str, Entry](), slots
        self._free = list(range(slots - 1, -1, -1))
        self._pending: list[tuple[Entry, int, int]] = []  # entry, row, position of a token whose query lies in ``last``

    def __len__(self) -> int:
        return len(self._open)

    @property
    def names(self) -> tuple[str, ...]:
        """The requests there are entries of."""
        return tuple(self._open)

    def get(self, request: str) -> Entry | None:
        """What is known of a request."""
        return self._open.get(request)

    def close(self, alive: Collection[str]) -> None:
        """Forget every request that is not among ``alive``."""
        for name in [name for name in self._open if name not in alive]:
            self._free.append(self._open.pop(name).slot)

    def at(self, request: str, prompt: int, done: int) -> tuple[Entry, bool]:
        """The entry of a request of which ``done`` tokens are in the cache, and whether it is a new one.

        Raises:
            CacheStateError: its prompt has grown, on which what may be dropped depends; or nobody left.
        """
        entry = self._open.get(request)
        if entry is not None and entry.prompt != prompt:
            raise CacheStateError(
                f"the prompt of request {request} grew from {entry.prompt} to {prompt} tokens while it was served; "
                "what kvthrift gives back follows from a prompt's length. Send the whole prompt at once."
            )
        if entry is not None and entry.seen == done:
            return entry, False
        if entry is None and not self._free:
            raise CacheStateError(f"there are more than {self._slots} requests at a time, the server's own limit.")
        slot = self._free.pop() if entry is None else entry.slot
        entry = self._open[request] = Entry(prompt, done, slot, [Book(prompt, done) for _ in self.layers], done)
        return entry, True

    def due(self, entry: Entry) -> Plan | None:
        """What is to become of a request's blocks before its next step; None if nothing."""
        found = plan(entry.prompt, entry.seen, self.block, self.policy)
        return found if found.dropped > entry.dropped else None

    def moved(self, entry: Entry, found: Plan, widest: int) -> None:
        """Note that it became that of them."""
        entry.full, entry.dropped, entry.widest, entry.moved = found.full, found.dropped, widest, entry.seen

    def catch_up(self) -> None:
        """Take the queries of single tokens from where the last step left them."""
        pending, self._pending = self._pending, []
        if self._queries is None or not pending:
            return
        answers = [(e, row, at) for e, row, at in pending if self._queries.ring is not None and at >= e.prompt]
        if answers:
            entries, rows, positions = zip(*answers, strict=True)
            self._queries.turn(self.layers, rows, [entry.slot for entry in entries], positions)
        for entry, row, at in pending:
            if self._queries.ring is None or at < entry.prompt:
                for layer, book in zip(self.layers, entry.books, strict=True):
                    book.see(self._queries.last[layer, row : row + 1], self.window)
                    book.seen = at + 1

    def settle(self, entry: Entry) -> None:
        """What was read is over: the queries go to the ring, if an answer is compressed, or away."""
        if entry.seen < entry.prompt or not entry.books[0].queries:
            return
        ring = self._queries is not None and self._queries.ring is not None
        for layer, book in zip(self.layers, entry.books, strict=True):
            if ring:
                newest = torch.cat(book.queries)[-self.window :]
                self._queries.fill(layer, entry.slot, book.seen, newest)  # type: ignore[union-attr]
            book.queries.clear()

    def follow(self, turn: Turn, entry: Entry, row: int, first: int, length: int) -> None:
        """Note that a step takes a request to ``length`` tokens, the first of them token ``first`` of the step."""
        done, entry.seen = entry.seen, length
        if not self.window or (done >= entry.prompt and self.policy.every is None):
            return
        if length - done == 1:
            turn.rows.append(row)
            turn.tokens.append(first)
            self._pending.append((entry, row, done))
            return
        found = plan(entry.prompt, length, self.block, self.policy)
        behind = length - found.at if found.dropped > entry.dropped else 0
        turn.notes.append(Note(entry, first, first + length - done, self.window + behind))

    def queries(self, entry: Entry, number: int, at: int) -> Tensor | None:
        """Queries ``[n, HG, D]`` of the last tokens before ``at`` on a layer of the group; None without a window.

        Raises:
            CacheStateError: they were not seen.
        """
        if not self.window:
            return None
        book, low, parts = entry.books[number], max(at - self.window, entry.since), []
        there = sum(len(piece) for piece in book.queries)
        start = book.seen - there if there else at
        if low < start and self._queries is not None and self._queries.ring is not None and at > entry.prompt:
            parts.append(self._queries.between(self.layers[number], entry.slot, low, min(start, at)))
        if there and at > start:
            parts.append(torch.cat(book.queries)[max(low - start, 0) : at - start])
        if not parts or (there and book.seen < at):
            raise CacheStateError(
                f"the queries of a request's tokens before token {at} were not seen on layer {self.layers[number]}, so "
                "that kvthrift cannot tell what to keep. Start without CUDA graphs (--enforce-eager)."
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)
