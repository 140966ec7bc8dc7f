"""What one layer remembers of each request: its last queries, and which tokens of which head still stand.

Scheduler and worker agree on counts without it; here is what only the layer knows. Knows no vLLM class.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvthrift.errors import CacheStateError


@dataclass
class Book:
    """One request on one layer.

    Attributes:
        prompt: tokens of its prompt.
        seen: tokens in the cache.
        full: blocks that kept tokens stand for; 0 until it is compressed.
        dropped: leading blocks that were given back.
        positions: of what each head keeps of them, ascending.
        pages: where each head keeps it, in pages of one head; empty where all heads keep equally many.
        queries: newest queries ``[n, HG, D]``, piece by piece.
    """

    prompt: int
    seen: int = 0
    full: int = 0
    dropped: int = 0
    positions: list[Tensor] = field(default_factory=list)
    pages: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)

    def see(self, queries: Tensor, window: int) -> None:
        """Remember the newest ``window`` of the queries ``[n, HG, D]`` so far."""
        self.queries.append(queries[-window:].clone())
        count = sum(len(piece) for piece in self.queries)
        while count - len(self.queries[0]) >= window:
            count -= len(self.queries.pop(0))

    def before(self, at: int, window: int) -> Tensor:
        """Queries ``[n, HG, D]`` of the last ``window`` tokens before token ``at``; fewer if fewer were seen."""
        found = torch.cat(self.queries)
        end = len(found) - (self.seen - at)
        return found[max(0, end - window) : end]

    def positions_of(self, heads: int, block: int, at: int, device: torch.device | None = None) -> list[Tensor]:
        """Positions of every entry of each head when there are ``at`` tokens."""
        behind = torch.arange(self.full * block, at, device=device)
        return [torch.cat((self.positions[h], behind)) if self.positions else behind for h in range(heads)]


class Books:
    """All requests of one layer."""

    def __init__(self) -> None:
        self._open: dict[str, Book] = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def names(self) -> tuple[str, ...]:
        """The requests there are books of."""
        return tuple(self._open)

    def get(self, request: str) -> Book | None:
        """What is known of a request."""
        return self._open.get(request)

    def at(self, request: str, prompt: int, done: int) -> Book:
        """The book of a request of which ``done`` tokens are in the cache; a new one if it is read anew.

        Raises:
            CacheStateError: its prompt has grown, on which what may be dropped depends.
        """
        book = self._open.get(request)
        if book is None or book.seen != done:
            book = self._open[request] = Book(prompt, done)
        if book.prompt != prompt:
            raise CacheStateError(
                f"the prompt of request {request} grew from {book.prompt} to {prompt} tokens while it was served; what "
                "kvthrift gives back follows from a prompt's length. Send the whole prompt at once."
            )
        return book

    def close(self, alive: Collection[str]) -> None:
        """Forget every request that is not among ``alive``."""
        self._open = {name: book for name, book in self._open.items() if name in alive}
