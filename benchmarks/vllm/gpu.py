"""What compression inside vLLM is worth on a GPU: a Llama-3.1-8B shape, prompts of 32K random tokens, long answers.

python benchmarks/vllm/gpu.py --out vllm.md                     (two GPUs: stock on one, kvthrift on the other)
python benchmarks/vllm/gpu.py --arms snapkv --gpus 0 --requests 4 --length 8192

Weights are made up (load_format="dummy"), so that answers mean nothing; steps, blocks and seconds do. Every arm is an
engine in a process of its own with a time limit, so that one that fails does not lose the others. In each:

- equal: as many requests as all arms can hold, in the whole pool: seconds a step of the answer;
- crowd: more requests than fit, in a pool of so many blocks as ``--room`` uncompressed requests take (the rest of the
  pool is withheld from the scheduler): how many answer at a time, and output tokens a second, prompts included;
- long: eight prompts of 40K tokens in a pool of two of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

BLOCK = 16
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ARMS: dict[str, dict[str, Any]] = {
    "stock": {},
    "stock fp8": {"kv_cache_dtype": "fp8"},
    "snapkv": {"method": "snapkv"},
    "adakv": {"method": "adakv"},
    "snapkv eager": {"method": "snapkv", "enforce_eager": True},
    "stock triton": {"attention_backend": "TRITON_ATTN"},
    "adakv triton": {"method": "adakv", "attention_backend": "TRITON_ATTN"},
}


@dataclass(frozen=True)
class Load:
    """What is asked of every arm.

    Attributes:
        length, tokens: of a prompt, and of its answer.
        requests, crowd, room: at a time, in a crowd, and uncompressed ones that the crowd's pool holds.
        keep: the share of a prompt that is kept.
        long: tokens of a long prompt, or 0.
    """

    length: int
    tokens: int
    requests: int
    crowd: int
    room: int
    keep: float
    long: int

    @property
    def budget(self) -> int:
        """Tokens a head."""
        return int(self.length * self.keep)

    def blocks(self, requests: int, length: int) -> int:
        """Blocks that uncompressed requests take with their answers, and one for nobody."""
        return requests * -(-(length + self.tokens) // BLOCK) + 1


def say(text: str) -> None:
    print(text, flush=True)


def engine(folder: Path, arm: dict[str, Any], load: Load) -> Any:
    """An engine in this process."""
    from vllm import LLM

    options, method = dict(arm), arm.get("method")
    options.pop("method", None)
    if method:
        options["additional_config"] = {"kvthrift": {"method": method, "budget": load.budget}}
    if not options.get("enforce_eager"):
        options["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32]}
    return LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=max(load.length, load.long) + load.tokens + BLOCK,
        max_num_seqs=32,
        max_num_batched_tokens=16384,
        block_size=BLOCK,
        gpu_memory_utilization=0.9,
        enable_prefix_caching=False,
        seed=0,
        **options,
    ).llm_engine


class Round:
    """Requests that are all there at the beginning, until all have ended."""

    def __init__(self, engine: Any, requests: int, length: int, tokens: int) -> None:
        self.engine, self.requests, self.length, self.tokens = engine, requests, length, tokens
        self.scheduler = engine.engine_core.engine_core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.withheld = self._taken()

    def run(self, name: str) -> dict[str, Any]:
        """Seconds and tokens."""
        import torch
        from vllm import SamplingParams

        generator = torch.Generator().manual_seed(len(name))
        sampling = SamplingParams(temperature=0, max_tokens=self.tokens, ignore_eos=True, detokenize=False)
        for index in range(self.requests):
            ids = torch.randint(10, 128000, (self.length,), generator=generator).tolist()
            self.engine.add_request(f"{name}-{index}", {"prompt_token_ids": ids}, sampling)
        begin, said, log = time.perf_counter(), dict[str, int](), []
        while self.engine.has_unfinished_requests():
            for out in self.engine.step():
                said[out.request_id] = len(out.outputs[0].token_ids)
            log.append((time.perf_counter() - begin, sum(said.values()), len(said), self._answering(), self._used()))
        return {**self._read(log), "left": self._used()}

    def _answering(self) -> int:
        return sum(r.num_computed_tokens > r.num_prompt_tokens for r in self.scheduler.running)

    def _taken(self) -> int:
        return int(self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks())

    def _used(self) -> int:
        return self._taken() - self.withheld

    def _read(self, log: list[tuple[float, int, int, int, int]]) -> dict[str, Any]:
        seconds, tokens, *_ = log[-1]
        first = next((line for line in log if line[2] == self.requests), log[-1])  # the last prompt is read
        most = max(line[3] for line in log)
        steps = sorted(b[0] - a[0] for a, b in pairwise(log) if a[3] == b[3] == most)
        return {
            "seconds": seconds,
            "prompts": first[0],
            "tokens": tokens,
            "per_second": tokens / seconds,
            "answering": most,
            "used": min(line[4] for line in log if line[3] == most),
            "step": steps[len(steps) // 2] if steps else None,
            "steps": len(steps),
        }


@contextmanager
def withheld(pool: Any, room: int) -> Iterator[None]:
    """All but ``room`` of a pool's free blocks, taken away and given back."""
    extra = pool.get_num_free_blocks() - room
    blocks = pool.get_new_blocks(extra) if extra > 0 else []
    yield
    pool.free_blocks(blocks)


def rounds(folder: Path, arm: dict[str, Any], load: Load) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each round of an arm, as it ends."""
    began = time.perf_counter()
    found = engine(folder, arm, load)
    pool = Round(found, 0, 0, 0).pool
    yield "start", {"seconds": time.perf_counter() - began, "blocks": pool.num_gpu_blocks}
    Round(found, 2, min(load.length, 2 * 16384), 8).run("warm")
    yield "equal", Round(found, load.requests, load.length, load.tokens).run("equal")
    with withheld(pool, load.blocks(load.room, load.length)):
        yield "crowd", Round(found, load.crowd, load.length, load.tokens).run("crowd")
    if load.long:
        with withheld(pool, load.blocks(2, load.long)):
            yield "long", Round(found, 8, load.long, min(load.tokens, 64)).run("long")


def work(folder: str, arm: str, load: Load) -> None:
    """An arm in this process: a line of JSON for each round."""
    for name, found in rounds(Path(folder), ARMS[arm], load):
        say("FOUND " + json.dumps({"arm": arm, "round": name, **found}))


def start(arm: str, gpu: str, folder: str, load: Load, seconds: int, out: list[dict[str, Any]]) -> None:
    """An arm in a process of its own; what it said by then is kept if it is too slow or fails."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    env |= {"VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    env.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    words = [sys.executable, __file__, "--work", arm, "--folder", folder, "--load", json.dumps(vars(load))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        tail: list[str] = []
        for line in process.stdout or ():
            if line.startswith("FOUND "):
                out.append(json.loads(line.removeprefix("FOUND ")))
                say(f"[gpu {gpu}] {line.rstrip()}")
            else:
                tail = [*tail[-40:], line.rstrip()]
        code = process.wait()
        timer.cancel()
    if code:
        out.append({"arm": arm, "round": "failed", "code": code})
        say(f"[gpu {gpu}] {arm} ended with {code}:\n" + "\n".join(tail))


def table(found: list[dict[str, Any]], load: Load) -> str:
    """Markdown."""
    lines = []
    titles = {
        "equal": f"{load.requests} requests of {load.length:,} tokens, the whole pool",
        "crowd": f"{load.crowd} requests, a pool of {load.blocks(load.room, load.length):,} blocks",
        "long": f"8 requests of {load.long:,} tokens, a pool of {load.blocks(2, load.long):,} blocks",
    }
    for name, title in titles.items():
        rows = [one for one in found if one["round"] == name]
        if not rows:
            continue
        lines += [f"\n**{title}**\n", "| | answer at a time | blocks they take | ms a step then | tokens/s then |"]
        lines[-1] += " output tokens/s, prompts included | seconds | of them until the last prompt was read |"
        lines += ["|---|---|---|---|---|---|---|---|"]
        for one in rows:
            step = one["step"]
            each = (f"{1000 * step:.1f}", f"{one['answering'] / step:.0f}") if step else ("", "")
            cells = [one["arm"], one["answering"], f"{one['used']:,}", *each, f"{one['per_second']:.0f}"]
            cells += [f"{one['seconds']:.1f}", f"{one['prompts']:.1f}"]
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
        if any(one["left"] for one in rows):
            lines.append(f"\nBlocks that never came back: { {one['arm']: one['left'] for one in rows} }")
    lines += [f"\n{one['arm']} ended with code {one['code']}." for one in found if one["round"] == "failed"]
    return "\n".join(lines) + "\n"


def about(load: Load) -> str:
    """What was measured on what."""
    import torch
    import vllm

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return (
        f"{torch.cuda.get_device_name()}, one an arm; vLLM {vllm.__version__}, torch {torch.__version__}, kvthrift "
        f"{commit.stdout.strip() or 'from a copy'}. Llama-3.1-8B's shape with made-up weights in bfloat16, random "
        f"prompts, greedy answers of {load.tokens} tokens, no prefix caching; {load.budget:,} tokens a head are kept. "
        "A step's time is the median over those in which most requests answer.\n"
    )


def lanes(arms: list[str], gpus: list[str]) -> list[list[str]]:
    """Which arms run one after another on each GPU: stock ones beside compressed ones."""
    if len(gpus) == 1:
        return [arms]
    ours = [arm for arm in arms if ARMS[arm].get("method")]
    return [ours, [arm for arm in arms if arm not in ours]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="snapkv,adakv,stock,stock fp8")
    parser.add_argument("--gpus", default="0,1")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--crowd", type=int, default=16)
    parser.add_argument("--room", type=int, default=3)
    parser.add_argument("--keep", type=float, default=0.125)
    parser.add_argument("--long", type=int, default=0, help="tokens of a long prompt, such as 40960")
    parser.add_argument("--seconds", type=int, default=150, help="time limit of an arm")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(asked.folder, asked.work, Load(**json.loads(asked.load)))
        return
    names = ("length", "tokens", "requests", "crowd", "room", "keep", "long")
    load = Load(**{name: getattr(asked, name) for name in names})
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA))
        gpus = asked.gpus.split(",")
        threads = []
        for gpu, arms in zip(gpus, lanes(asked.arms.split(","), gpus), strict=False):
            threads.append(
                threading.Thread(
                    target=lambda g=gpu, a=arms: [start(arm, g, folder, load, asked.seconds, found) for arm in a]
                )
            )
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    text = about(load) + table(found, load)
    say(text)
    if asked.out:
        asked.out.write_text(text)


if __name__ == "__main__":
    main()
