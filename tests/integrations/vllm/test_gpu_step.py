"""A made-up server on a CPU with the GPU backends' book-keeping: each head reads what it kept, and nothing else.

Blocks that were given back are NaN at once and handed out again; steps mix parts of prompts with single tokens. Steps
of single tokens are taken as a graph would: with what was made when it was captured, over buffers that stay.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kvthrift.errors import CacheStateError
from kvthrift.integrations.vllm import gpu_step
from kvthrift.integrations.vllm.books import Book
from kvthrift.integrations.vllm.cells import PLAIN, cells_of
from kvthrift.integrations.vllm.gpu_queries import Queries
from kvthrift.integrations.vllm.gpu_step import Step, Steps
from kvthrift.integrations.vllm.plan import Plan, plan
from kvthrift.integrations.vllm.runner import Rows
from kvthrift.integrations.vllm.settings import KEY, Settings, read_settings

HEADS, GROUP, DIM, SIZE, LAYERS, SLOTS, WIDTH, BLOCKS = 2, 2, 8, 4, 2, 4, 60, 150
SCALE, NAN = 0.5, float("nan")
FACTOR, NAN_BYTE = torch.tensor(0.25), 0x7F  # of numbers in fp8


def in_fp8(x: Tensor) -> Tensor:
    """The nearest numbers that are ``FACTOR`` times one of fp8's."""
    return (x / FACTOR).to(torch.float8_e4m3fn).float() * FACTOR


def paged(q: Tensor, keys: Tensor, values: Tensor, starts: list[int], tables: Tensor, sizes: list[int]) -> Tensor:
    """Attention of sequences with one or several heads over pages ``[P, size, H, D]``, bottom-right causal."""
    out, group = torch.empty_like(q), q.shape[1] // keys.shape[2]
    for row, (first, last) in enumerate(pairwise(starts)):
        if first == last:
            continue
        pages = tables[row, : -(-sizes[row] // keys.shape[1])].long()
        k, v = (part[pages].flatten(0, 1)[: sizes[row]].repeat_interleave(group, 1) for part in (keys, values))
        logits = torch.einsum("qhd,khd->hqk", q[first:last], k) * SCALE
        past = torch.arange(sizes[row]) <= torch.arange(sizes[row] - last + first, sizes[row])[:, None]
        out[first:last] = torch.einsum("hqk,khd->qhd", logits.masked_fill(~past, float("-inf")).softmax(-1), v)
    return out


@dataclass
class Request:
    """Numbers of all its tokens ``[L, n, HG + 2H, D]``, and its blocks; None where one was given back."""

    prompt: int
    numbers: Tensor
    done: int = 0
    blocks: list[int] = field(default_factory=list)
    freed: int = 0


class Server:
    """Schedules, gives back by the plan, and checks every number that attention finds."""

    def __init__(self, asked: dict[str, Any], *, graphs: bool, fp8: bool = False) -> None:
        found = read_settings(
            {KEY: {**asked, "check": True}}, layers=LAYERS, kv_heads=HEADS, entry_bytes=4 * DIM, step_tokens=16
        )
        assert found is not None
        self.settings, self.graphs, self.fp8 = found, graphs, fp8
        shape, fill, kind = (BLOCKS, HEADS, SIZE, 2 * DIM), NAN_BYTE if fp8 else NAN, torch.uint8 if fp8 else None
        self.caches = [torch.full(shape, fill, dtype=kind) for _ in range(LAYERS)]
        cells = cells_of("fp8", FACTOR, FACTOR, torch.float32) if fp8 else PLAIN
        self.free = list(range(1, BLOCKS))
        self.requests: dict[str, Request] = {}
        window = found.recipe.needs.window
        queries = None
        if window:
            slots = SLOTS if found.policy.every is not None else 0
            queries = Queries(LAYERS, SLOTS, window, HEADS * GROUP, DIM, slots=slots, dtype=torch.float32, device="cpu")
        self.steps = Steps(
            found,
            found.policy,
            range(LAYERS),
            self.caches.__getitem__,
            scale=SCALE,
            block=SIZE,
            slots=SLOTS,
            length=WIDTH * SIZE,
            query_heads=HEADS * GROUP,
            queries=queries,
            device=torch.device("cpu"),
            cells=dict.fromkeys(range(LAYERS), cells),
        )
        self.table = torch.zeros(SLOTS, WIDTH, dtype=torch.int32)  # as a runner's, it stays where it is
        self.lengths = torch.zeros(SLOTS, dtype=torch.int32)
        self.captured: dict[int, tuple[Step, Tensor, Tensor]] = {}
        self.moves = self.replays = 0

    def begin(self, name: str, prompt: int) -> None:
        numbers = torch.randn(LAYERS, WIDTH * SIZE, HEADS * (GROUP + 2), DIM)
        self.requests[name] = Request(prompt, in_fp8(numbers) if self.fp8 else numbers)

    def end(self, name: str, *, preempted: bool = False) -> None:
        request = self.requests[name]
        self.free += request.blocks[request.freed :]
        request.done, request.blocks, request.freed = 0, [], 0
        if not preempted:
            del self.requests[name]

    def _allot(self, request: Request, new: int) -> list[int]:
        """What a scheduler does before a step; the blocks that it takes back, which may be anybody's by then."""
        dropped = plan(request.prompt, request.done, SIZE, self.settings.policy).dropped
        back = request.blocks[request.freed : dropped]
        request.freed = max(request.freed, dropped)
        self.free += back
        while len(request.blocks) * SIZE < request.done + new:
            request.blocks.append(self.free.pop())
        return back

    def step(self, news: dict[str, int]) -> None:
        """One pass over ``news`` tokens of each request."""
        rows = sorted(news, key=lambda name: (news[name] != 1, news[name]))
        back = [block for name in rows for block in self._allot(self.requests[name], news[name])]
        batch = [self.requests[name] for name in rows]
        starts = [sum(news[name] for name in rows[:n]) for n in range(len(rows) + 1)]
        for row, (name, request) in enumerate(zip(rows, batch, strict=True)):
            self.table[row, : len(request.blocks)] = torch.tensor(request.blocks, dtype=torch.int32)
            self.lengths[row] = request.done + news[name]
        count, single = len(rows), starts[-1] == len(rows)
        table, lengths = self.table[:count], self.lengths[:count]
        if single and self.graphs and count not in self.captured:
            self.captured[count] = self._made([], None, list(range(count + 1)), table, lengths, WIDTH * SIZE)
        given = Rows(tuple(rows), tuple(r.prompt for r in batch), tuple(r.done for r in batch))
        before = [entry.dropped if (entry := self.steps.ledger.get(name)) else 0 for name in rows]
        entries, turn = self.steps.begin(given, starts, table)
        self.moves += sum(entry.dropped > was for entry, was in zip(entries, before, strict=True))
        for block in back:
            for cache in self.caches:
                cache[block] = NAN_BYTE if self.fp8 else NAN
        step, blocks, sizes = self._made(entries, turn, starts, table, lengths, int(lengths.max()))
        if single and self.graphs:
            step, blocks, sizes = self.captured[count]
            self.replays += 1
        for layer in range(LAYERS):
            q, want = self._written(layer, rows, news)
            got = self._attended(step, layer, q, starts, blocks, sizes)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            if self.fp8:
                step.remember(layer, (q / FACTOR).to(torch.float8_e4m3fn), starts[-1], FACTOR)
            else:
                step.remember(layer, q, starts[-1])
        for name, request in zip(rows, batch, strict=True):
            request.done += news[name]

    def _made(
        self, entries: list[Any], turn: Any, starts: list[int], table: Tensor, lengths: Tensor, longest: int
    ) -> tuple[Step, Tensor, Tensor]:
        if self.steps.ragged:
            return self.steps.of(turn, self.steps.apart(entries, starts, table, lengths, longest)), table, lengths
        blocks, sizes, _ = self.steps.shift(entries, table, lengths, longest)
        return self.steps.of(turn), blocks, sizes

    def _written(self, layer: int, rows: list[str], news: dict[str, int]) -> tuple[Tensor, Tensor]:
        """Queries of the step, whose keys and values are in the cache by now, and what attention must find."""
        asked, wanted = [], []
        for name in rows:
            request, book = self.requests[name], self.steps.ledger.get(name).books[layer]  # type: ignore[union-attr]
            new = range(request.done, request.done + news[name])
            q, k, v = request.numbers[layer].split([HEADS * GROUP, HEADS, HEADS], 1)
            for at in new:
                cell = torch.cat((k[at], v[at]), -1)
                cell = (cell / FACTOR).to(torch.float8_e4m3fn).view(torch.uint8) if self.fp8 else cell
                self.caches[layer][request.blocks[at // SIZE], :, at % SIZE] = cell
                wanted.append(self._seen(book, q[at], k, v, at))
            asked.append(q[new.start : new.stop])
        return torch.cat(asked), torch.stack(wanted)

    def _seen(self, book: Book, q: Tensor, k: Tensor, v: Tensor, at: int) -> Tensor:
        found = []
        for head in range(HEADS):
            behind = torch.arange(book.full * SIZE, at + 1)
            there = torch.cat((book.positions[head].long(), behind)) if book.positions else behind
            own = q[head * GROUP : (head + 1) * GROUP]
            found.append((own @ k[there, head].T * SCALE).softmax(-1) @ v[there, head])
        return torch.cat(found)

    def _attended(self, step: Step, layer: int, q: Tensor, starts: list[int], blocks: Tensor, sizes: Tensor) -> Tensor:
        pages, out = self.steps.pages(layer), torch.full_like(q, NAN)
        if step.heads is None:
            keys, values = (self._said(part) for part in self.caches[layer].transpose(1, 2).split(DIM, -1))
            return paged(q, keys, values, starts, blocks, sizes.tolist())
        heads = step.heads
        heads.fill(step.numbers[layer])
        asked = heads.split((q / FACTOR).to(torch.float8_e4m3fn)) if self.fp8 else heads.split(q)
        target = heads.target(asked, out)
        longest = heads.sizes.tolist()
        assert max(longest) <= heads.longest
        parts = (self._said(part) for part in (asked, pages.keys, pages.values))
        target.copy_(paged(*parts, heads.starts.tolist(), heads.tables, longest))
        heads.join(target, out)
        return out

    def _said(self, part: Tensor) -> Tensor:
        """Numbers of what is written."""
        return part.view(torch.float8_e4m3fn).float() * FACTOR if self.fp8 else part


ASKED = {
    "snapkv": {"method": "snapkv", "window": 4, "budget": 16},
    "adakv": {"method": "adakv", "budget": 40},
    "keydiff": {"method": "keydiff", "budget": 16},
    "snapkv often": {"method": "snapkv", "window": 6, "budget": 16, "every": 4},
    "adakv often": {"method": "adakv", "budget": 40, "every": 9},
    "adakv while reading": {"method": "adakv", "budget": 40, "every": 9, "chunks": True},
}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Server]:
    """The server whose requests are known; whenever something is moved, by the queries of the last tokens before."""
    servers: list[Server] = []
    stock = gpu_step.compact

    def compact(
        settings: Settings, pages: Any, own: Tensor, found: Plan, book: Book, queries: Tensor, **more: Any
    ) -> None:
        (server,), layer, window = servers, more["layer"], settings.recipe.needs.window
        ledger = server.steps.ledger
        (name,) = (one for one in ledger.names if any(book is other for other in ledger.get(one).books))  # type: ignore[union-attr]
        want = server.requests[name].numbers[layer, max(found.at - window, 0) : found.at, : HEADS * GROUP]
        assert torch.equal(queries, want if window else want[:0])
        stock(settings, pages, own, found, book, queries, **more)

    monkeypatch.setattr(gpu_step, "compact", compact)
    monkeypatch.setattr(gpu_step, "unfinished", lambda ids: {one for one in ids if one in servers[0].requests})
    return servers


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", ASKED)
def test_each_head_reads_what_it_kept(name: str, graphs: bool, fp8: bool, served: list[Server]) -> None:
    chance, server = random.Random(len(name)), Server(ASKED[name], graphs=graphs, fp8=fp8)
    served.append(server)
    free = len(server.free)
    waiting = [("a", 130), ("b", 81), ("c", 60), ("d", 119), ("e", 6)]
    for turn in range(70):
        if waiting and len(server.requests) < SLOTS and turn % 9 == 0:
            server.begin(*waiting.pop())
        if turn == 40 and "c" in server.requests:
            server.end("c", preempted=True)
        if turn == 55 and "d" in server.requests:
            server.end("d")
        news = {}
        for one, request in server.requests.items():
            left = request.prompt - request.done
            if request.done + 1 < WIDTH * SIZE and chance.random() < 0.9:
                news[one] = min(chance.choice([1, 5, 13, 16]), left) if left > 0 else 1
        if news:
            server.step(news)
    assert server.moves >= 4
    assert server.replays >= 10 or not graphs
    for one in list(server.requests):
        server.end(one)
    assert len(server.free) == free


def test_as_many_as_are_served_at_a_time_may_follow_as_many(served: list[Server]) -> None:
    server = Server(ASKED["keydiff"], graphs=False)
    served.append(server)
    for group in ("abcd", "efgh"):
        for name in group:
            server.begin(name, 5)
        server.step(dict.fromkeys(group, 5))
        for name in group:
            server.end(name)
    for name in "ijklm":
        server.begin(name, 5)
    server.step(dict.fromkeys("ijkl", 5))
    with pytest.raises(CacheStateError, match="more than 4 requests"):
        server.step({"m": 5})


def test_a_prompt_that_grows_is_refused(served: list[Server]) -> None:
    server = Server(ASKED["keydiff"], graphs=False)
    served.append(server)
    server.begin("a", 9)
    server.step({"a": 9})
    server.requests["a"].prompt = 12
    with pytest.raises(CacheStateError, match="grew from 9 to 12"):
        server.step({"a": 1})


def test_queries_that_nobody_saw_are_missed(served: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(ASKED["snapkv"], graphs=False)
    served.append(server)
    server.begin("a", 40)
    monkeypatch.setattr(Step, "remember", lambda *_: None)
    server.step({"a": 40})
    with pytest.raises(CacheStateError, match="were not seen"):
        server.step({"a": 1})
