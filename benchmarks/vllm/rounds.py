"""One engine in this process, and what it does with a load; ``gpu.py`` starts one for each arm."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

BLOCK = 16
STEP = 16384  # tokens that one step reads
MOST = 48  # requests at a time
WHOLE = 2 * 2 * BLOCK  # bytes of a block in bfloat16, for each number of a key, head and layer


@dataclass(frozen=True)
class Load:
    """What is asked of every arm.

    Attributes:
        length, tokens: of a prompt, and of its answer.
        requests, crowd, room: at a time, in a crowd, and uncompressed ones that the crowd's pool holds.
        keep: the share of a prompt that is kept.
        long: tokens of a long prompt.
        answers: tokens at which the answers of the largest load are measured, the last of them its length.
        rounds: which rounds.
    """

    length: int
    tokens: int
    requests: int
    crowd: int
    room: int
    keep: float
    long: int
    answers: Sequence[int]
    rounds: Sequence[str]

    @property
    def budget(self) -> int:
        """Tokens a head."""
        return int(self.length * self.keep)

    def blocks(self, requests: int, length: int, tokens: int) -> int:
        """Blocks that uncompressed requests take with their answers."""
        return requests * -(-(length + tokens) // BLOCK)

    def sustained(self, pool: int, *, compressed: bool) -> int:
        """As many requests as a pool of so many blocks holds at a time, the last of them while it is read, too."""
        whole = self.blocks(1, self.length, self.answers[-1])
        if not compressed:
            return pool // whole
        kept = -(-self.budget // BLOCK) + -(-self.answers[-1] // BLOCK) + 2
        return min(MOST, max(1, (pool - self.blocks(1, self.length, BLOCK)) // kept + 1))


def engine(folder: Path, arm: dict[str, Any], load: Load, **more: Any) -> Any:
    """An engine in this process."""
    from vllm import LLM

    options, method = {**arm, **more}, arm.get("method")
    options.pop("method", None)
    if method:
        options["additional_config"] = {"kvthrift": {"method": method, "budget": load.budget}}
    if not options.get("enforce_eager"):
        options["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, *range(8, MOST + 1, 8)]}
    longest = max(
        load.length + max(load.tokens, *load.answers), load.long + load.tokens if "long" in load.rounds else 0
    )
    defaults = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": longest + BLOCK,
        "max_num_seqs": MOST,
        "max_num_batched_tokens": STEP,
        "block_size": BLOCK,
        "gpu_memory_utilization": 0.9,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    return LLM(str(folder), **{**defaults, **options}).llm_engine


@dataclass
class Line:
    """What there was behind a step.

    Attributes:
        at: seconds since the beginning.
        said: tokens of each answer so far.
        answering: requests that were answered in this step.
        used: blocks that are not free.
    """

    at: float
    said: list[int]
    answering: int
    used: int


@dataclass
class Log:
    """The steps of a round.

    Attributes:
        requests, tokens: of the round.
        lines: one a step.
        preempted: times that a request was thrown out.
    """

    requests: int
    tokens: int
    lines: list[Line] = field(default_factory=list)
    preempted: int = 0

    def read(self, marks: Sequence[int] = ()) -> dict[str, Any]:
        """Seconds and tokens; ``marks`` are lengths of answers."""
        lines, last = self.lines, self.lines[-1]
        most = max(line.answering for line in lines)
        steps = sorted(b.at - a.at for a, b in pairwise(lines) if a.answering == b.answering == most)
        first = next((line for line in lines if len(line.said) == self.requests), last)  # the last prompt is read
        return {
            "requests": self.requests,
            "seconds": last.at,
            "prompts": first.at,
            "tokens": sum(last.said),
            "per_second": sum(last.said) / last.at,
            "answering": most,
            "used": min(line.used for line in lines if line.answering == most),
            "step": steps[len(steps) // 2] if steps else None,
            "steps": len(steps),
            "decoding": self._decoding(first),
            "whole": {mark: self._whole(mark) for mark in marks},
            "preempted": self.preempted,
        }

    def _decoding(self, first: Line) -> float | None:
        """Tokens a second from when all prompts are read until the first answer is complete."""
        there = [line for line in self.lines if line.at >= first.at and max(line.said) < self.tokens]
        if len(there) < 2:
            return None
        return (sum(there[-1].said) - sum(there[0].said)) / (there[-1].at - there[0].at)

    def _whole(self, mark: int) -> float | None:
        """Tokens a second, prompts included, until the last answer has ``mark`` tokens; so many of each count."""
        at = next((line.at for line in self.lines if len(line.said) == self.requests and min(line.said) >= mark), None)
        return None if at is None else mark * self.requests / at


class Round:
    """Requests that are all there at the beginning, until all have ended."""

    def __init__(self, engine: Any, requests: int, length: int, tokens: int) -> None:
        self.engine, self.requests, self.length, self.tokens = engine, requests, length, tokens
        self.scheduler = engine.engine_core.engine_core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.withheld = self._taken()

    def run(self, name: str, marks: Sequence[int] = ()) -> dict[str, Any]:
        """Seconds and tokens."""
        import torch
        from vllm import SamplingParams

        generator = torch.Generator().manual_seed(len(name))
        sampling = SamplingParams(temperature=0, max_tokens=self.tokens, ignore_eos=True, detokenize=False)
        vocabulary = self.engine.model_config.get_vocab_size()
        for index in range(self.requests):
            ids = torch.randint(10, vocabulary - 256, (self.length,), generator=generator).tolist()
            self.engine.add_request(f"{name}-{index}", {"prompt_token_ids": ids}, sampling)
        begin, said, log, thrown = time.perf_counter(), dict[str, int](), Log(self.requests, self.tokens), {}
        while self.engine.has_unfinished_requests():
            for out in self.engine.step():
                said[out.request_id] = len(out.outputs[0].token_ids)
            thrown |= {r.request_id: r.num_preemptions for r in self.scheduler.running}
            at = time.perf_counter() - begin
            log.lines.append(Line(at, list(said.values()), self._answering(), self._taken() - self.withheld))
        log.preempted = sum(thrown.values())
        return {**log.read(marks), "left": self._taken() - self.withheld}

    def _answering(self) -> int:
        return sum(r.num_computed_tokens > r.num_prompt_tokens for r in self.scheduler.running)

    def _taken(self) -> int:
        return int(self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks())


@contextmanager
def withheld(pool: Any, room: int) -> Iterator[None]:
    """All but ``room`` of a pool's free blocks, taken away and given back."""
    extra = pool.get_num_free_blocks() - room
    blocks = pool.get_new_blocks(extra) if extra > 0 else []
    yield
    pool.free_blocks(blocks)


def block_bytes(engine: Any) -> int:
    """Bytes of a block over all layers."""
    groups = engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    return sum(len(group.layer_names) * group.kv_cache_spec.page_size_bytes for group in groups)


def whole_bytes(config: dict[str, Any]) -> int:
    """Bytes of a block over all layers in bfloat16."""
    return WHOLE * int(config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"])


def rounds(folder: Path, arm: dict[str, Any], load: Load, **more: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each round of an arm, as it ends."""
    began = time.perf_counter()
    found = engine(folder, arm, load, **more)
    pool, size = Round(found, 0, 0, 0).pool, block_bytes(found)
    yield "start", {"seconds": time.perf_counter() - began, "blocks": pool.num_gpu_blocks, "block bytes": size}
    Round(found, 2, min(load.length, 2 * STEP), 8).run("warm")
    if "equal" in load.rounds:
        yield "equal", Round(found, load.requests, load.length, load.tokens).run("equal")
    if "crowd" in load.rounds:
        with withheld(pool, load.blocks(load.room, load.length, load.tokens) + 1):
            yield "crowd", Round(found, load.crowd, load.length, load.tokens).run("crowd")
    if "long" in load.rounds:
        yield "long", Round(found, load.requests, load.long, load.tokens).run("long")
    if "most" in load.rounds:
        room = load.blocks(load.room, load.length, load.answers[-1])
        room = room * whole_bytes(json.loads((folder / "config.json").read_text())) // size  # the same bytes for all
        most = load.sustained(room, compressed="method" in arm)
        with withheld(pool, room):
            out = Round(found, most, load.length, load.answers[-1]).run("most", load.answers)
        yield "most", {**out, "room": room, "bytes": room * size}
