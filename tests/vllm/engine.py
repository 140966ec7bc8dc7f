"""Runs one engine in this process, so that its block pool can be watched, and prints what was seen as JSON.

python tests/vllm/engine.py '{"kvthrift": {...}, "rounds": [{"requests": 4, ...}, ...], ...}'

On a GPU it shares the device with others: its cache is small, and CUDA graphs are captured only if asked for ("graphs":
"full" or "both", which compiles too).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # scheduler and worker in one process
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

import torch
from tests.vllm.texts import prompts
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from kvthrift.integrations.transformers.embedded import embedded_path

BLOCK = 32
ROUND = {
    "requests": 2,  # prompts
    "fill": 60,  # length of each, in sentences
    "tokens": 10,  # of each answer
    "n": 1,  # answers of each
    "abort": None,  # [[request, "prompt" or "answer"]]: ended from outside while it is read or answered
    "regex": None,  # what answers must look like
    "choice": None,
    "lora": None,  # a folder
}


class Run:
    """An engine, its pool, and what was seen."""

    def __init__(self, asked: dict[str, Any]) -> None:
        if asked.get("rival"):  # another plugin, which came first
            register_backend(AttentionBackendEnum.CPU_ATTN, "tests.vllm.rival.Rival")
        extra = {"kvthrift": asked["kvthrift"]} if "kvthrift" in asked else {}
        more = {"num_gpu_blocks_override": asked["blocks"]} if "blocks" in asked else {}
        self.engine = LLM(
            asked.get("model") or str(embedded_path()),
            dtype=asked.get("dtype", "auto"),
            kv_cache_dtype=asked.get("cache", "auto"),
            max_model_len=asked.get("length", 2048),
            max_num_seqs=16,
            block_size=BLOCK,
            enable_prefix_caching=asked.get("prefix", False),
            max_num_batched_tokens=asked.get("batched", 2048),
            additional_config=extra,
            enable_lora=asked.get("lora", False),
            seed=0,
            **_device(asked),
            **more,
            **asked.get("engine", {}),
        ).llm_engine
        core = self.engine.engine_core.engine_core
        self.scheduler, self.pool = core.scheduler, core.scheduler.kv_cache_manager.block_pool
        self.record: dict[str, dict[int, list[Any]]] | None = {} if "record" in asked else None

    @property
    def used(self) -> int:
        """Blocks that are not free."""
        return int(self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks())

    def round(self, number: int, asked: dict[str, Any]) -> dict[str, Any]:
        """The same requests until all have ended."""
        texts = prompts(asked["requests"], asked["fill"])
        shape = {"regex": asked["regex"], "choice": asked["choice"]}
        shape = {name: value for name, value in shape.items() if value is not None}
        sampling = SamplingParams(
            temperature=0 if asked["n"] == 1 else 0.8,  # no seed: with one, vLLM's CPU worker fails on chunked prompts
            n=asked["n"],
            max_tokens=asked["tokens"],
            ignore_eos=not shape,
            logprobs=1,
            output_kind=RequestOutputKind.FINAL_ONLY,  # the answers to one prompt together
            structured_outputs=StructuredOutputsParams(**shape) if shape else None,
        )
        lora = None if asked["lora"] is None else LoRARequest("adapter", 1, asked["lora"])
        for index, (text, _) in enumerate(texts):
            self.engine.add_request(f"{number}-{index}", {"prompt": text}, sampling, lora_request=lora)
        left = {f"{number}-{index}": when for index, when in asked["abort"] or ()}
        done: dict[str, Any] = {}
        steps, preempted = [], 0
        while self.engine.has_unfinished_requests():
            done |= {out.request_id: out for out in self.engine.step() if out.finished}
            self._note()
            running = self.scheduler.running
            decoding = [r for r in running if r.num_computed_tokens > r.num_prompt_tokens]
            preempted = max([preempted, *(r.num_preemptions for r in self.scheduler.requests.values())])
            steps.append({"used": self.used, "running": len(running), "decoding": len(decoding)})
            for name, when in list(left.items()):
                if any(_is_at(r, name, when) for r in running):
                    self.engine.abort_request([name])
                    del left[name]
        answers = [(key, done[name]) for index, (_, key) in enumerate(texts) if (name := f"{number}-{index}") in done]
        return {
            "steps": steps,
            "preempted": preempted,
            "left": self.used,
            "unreached": sorted(left),
            "right": [key in out.outputs[0].text for key, out in answers],
            "prompt": [len(out.prompt_token_ids) for _, out in answers],
            "cached": [out.num_cached_tokens for _, out in answers],
            "ids": [list(out.prompt_token_ids) for _, out in answers],
            "texts": [[one.text for one in out.outputs] for _, out in answers],
            "tokens": [list(out.outputs[0].token_ids) for _, out in answers],
            "logprobs": [_logprobs(out.outputs[0]) for _, out in answers],
        }

    def _note(self) -> None:
        """What each layer keeps of each request, whenever that has changed."""
        if self.record is None:
            return
        for layer, name, tokens, book in self._gpu_books() if torch.cuda.is_available() else self._books():
            seen = self.record.setdefault(name, {}).setdefault(layer, [])
            if book.full and (not seen or seen[-1][1] != book.full):
                seen.append((tokens, book.full, [head.cpu().clone() for head in book.positions]))

    def _books(self) -> Iterator[tuple[int, str, int, Any]]:
        """Each layer's book of each request, and how many tokens there were when it was written."""
        for layer, module in enumerate(self.engine.vllm_config.compilation_config.static_forward_context.values()):
            for name in module.impl.books.names:
                book = module.impl.books.get(name)
                yield layer, name, book.seen, book

    def _gpu_books(self) -> Iterator[tuple[int, str, int, Any]]:
        """The same; on a GPU a group of layers has one ledger."""
        runner = self.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        for group in (one for groups in runner.attn_groups for one in groups):
            ledger = group.get_metadata_builder(0).kvthrift.ledger
            for name in ledger.names:
                entry = ledger.get(name)
                for layer, book in zip(ledger.layers, entry.books, strict=True):
                    yield layer, name, entry.moved, book


def _device(asked: dict[str, Any]) -> dict[str, Any]:
    """What an engine is told about its device."""
    if not torch.cuda.is_available():
        return {"enforce_eager": True, "gpu_memory_utilization": 0.3}
    told: dict[str, Any] = {"gpu_memory_utilization": 0.02, "kv_cache_memory_bytes": 1 << 30}
    told |= {"async_scheduling": asked.get("async", False), "tensor_parallel_size": asked.get("tp", 1)}
    told |= {"attention_backend": asked["attention"]} if "attention" in asked else {}
    sizes = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
    if asked.get("graphs") == "full":
        return {**told, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", **sizes}}
    if asked.get("graphs") == "both":
        return {**told, "compilation_config": sizes}
    return {**told, "enforce_eager": True}


def _is_at(request: Any, name: str, when: str) -> bool:
    known = request.request_id.startswith(name)
    reading = 0 < request.num_computed_tokens < request.num_prompt_tokens
    return known and (reading if when == "prompt" else request.num_output_tokens > 2)


def _logprobs(out: Any) -> list[float]:
    return [float(step[token].logprob) for step, token in zip(out.logprobs, out.token_ids, strict=True)]


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """One engine, one or more rounds."""
    rounds = asked.get("rounds", 1)
    if isinstance(rounds, int):
        rounds = [{name: asked[name] for name in ROUND if name in asked and name != "lora"}] * rounds
    engine = Run(asked)
    found = [engine.round(number, {**ROUND, **one}) for number, one in enumerate(rounds)]
    if engine.record is not None:
        torch.save(engine.record, asked["record"])
    return {"rounds": found, "layers": len(engine.scheduler.kv_cache_config.kv_cache_groups)}


if __name__ == "__main__":
    found = json.dumps(run(json.loads(sys.argv[1])))
    print(f"\nFOUND {found}")
