"""Runs one engine in this process, so that its block pool can be watched, and prints what was seen as JSON.

python tests/vllm/engine.py '{"kvthrift": {...}, "requests": 4, ...}'
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # scheduler and worker in one process
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from tests.vllm.texts import prompts
from vllm import LLM, SamplingParams

from kvthrift.integrations.transformers.embedded import embedded_path

BLOCK = 32


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """One engine, one or more rounds of the same requests."""
    extra = {"kvthrift": asked["kvthrift"]} if "kvthrift" in asked else {}
    more = {"num_gpu_blocks_override": asked["blocks"]} if "blocks" in asked else {}
    llm = LLM(
        str(embedded_path()),
        max_model_len=2048,
        max_num_seqs=16,
        gpu_memory_utilization=0.3,
        enforce_eager=True,
        block_size=BLOCK,
        enable_prefix_caching=asked.get("prefix", False),
        max_num_batched_tokens=asked.get("batched", 2048),
        additional_config=extra,
        seed=0,
        **more,
    )
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    texts = prompts(asked.get("requests", 2))
    sampling = SamplingParams(temperature=0, max_tokens=asked.get("tokens", 10), ignore_eos=True, logprobs=1)
    rounds = []
    for number in range(asked.get("rounds", 1)):
        for index, (text, _) in enumerate(texts):
            engine.add_request(f"{number}-{index}", {"prompt": text}, sampling)
        done: dict[str, Any] = {}
        seen, preempted = [], 0
        while engine.has_unfinished_requests():
            done |= {out.request_id: out for out in engine.step() if out.finished}
            decoding = [r for r in scheduler.running if r.num_computed_tokens > r.num_prompt_tokens]
            preempted = max([preempted, *(r.num_preemptions for r in scheduler.requests.values())])
            used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
            seen.append({"used": used, "running": len(scheduler.running), "decoding": len(decoding)})
        answers = [done[f"{number}-{index}"] for index in range(len(texts))]
        rounds.append(
            {
                "steps": seen,
                "preempted": preempted,
                "left": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
                "right": [key in out.outputs[0].text for (_, key), out in zip(texts, answers, strict=True)],
                "prompt": [len(out.prompt_token_ids) for out in answers],
                "cached": [out.num_cached_tokens for out in answers],
                "ids": [list(out.prompt_token_ids) for out in answers],
                "tokens": [list(out.outputs[0].token_ids) for out in answers],
                "logprobs": [
                    [
                        float(step[token].logprob)
                        for step, token in zip(out.outputs[0].logprobs, out.outputs[0].token_ids, strict=True)
                    ]
                    for out in answers
                ],
            }
        )
    return {"rounds": rounds}


if __name__ == "__main__":
    found = json.dumps(run(json.loads(sys.argv[1])))
    print(f"\nFOUND {found}")
