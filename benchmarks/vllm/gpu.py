"""What compression inside vLLM is worth on a GPU: a Llama-3.1-8B shape, prompts of 32K random tokens, long answers.

python benchmarks/vllm/gpu.py --out vllm.md                     (two GPUs, two arms at a time)
python benchmarks/vllm/gpu.py --rounds long,most --long 40960 --answers 1024,2048
python benchmarks/vllm/gpu.py --arms snapkv --gpus 0 --requests 4 --length 8192

Weights are made up (load_format="dummy"), so that answers mean nothing; steps, blocks and seconds do. Every arm is an
engine in a process of its own with a time limit, so that one that fails does not lose the others. Rounds (--rounds):

- equal: as many requests as all arms can hold, in the whole pool: seconds a step of the answer;
- crowd: more requests than fit, in a pool of so many blocks as ``--room`` uncompressed requests take (the rest of the
  pool is withheld from the scheduler): how many answer at a time, and output tokens a second, prompts included;
- long: as many requests of ``--long`` tokens, in the whole pool;
- most: as many requests as an arm holds at a time, in a pool of so many bytes as ``--room`` uncompressed requests take
  in bfloat16, with answers of ``--answers`` tokens: output tokens a second while all answer, and prompts included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from rounds import Load, rounds

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
TRITON = {"attention_backend": "TRITON_ATTN"}
INT4 = {**TRITON, "kv_cache_dtype": "int4_per_token_head"}
ARMS: dict[str, dict[str, Any]] = {
    "stock": {},
    "stock fp8": {"kv_cache_dtype": "fp8"},
    "snapkv": {"method": "snapkv"},
    "adakv": {"method": "adakv"},
    "snapkv fp8": {"method": "snapkv", "kv_cache_dtype": "fp8"},
    "adakv fp8": {"method": "adakv", "kv_cache_dtype": "fp8"},
    "stock int4": INT4,
    "snapkv int4": {"method": "snapkv", **INT4},
    "adakv int4": {"method": "adakv", **INT4},
    "snapkv eager": {"method": "snapkv", "enforce_eager": True},
    "stock triton": TRITON,
    "adakv triton": {"method": "adakv", **TRITON},
}


def say(text: str) -> None:
    print(text, flush=True)


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


def number(value: float | None, form: str = ".0f") -> str:
    return "" if value is None else format(value, form)


def usual(one: dict[str, Any]) -> list[str]:
    """A row of a round in which all arms have as many requests."""
    step = one["step"]
    each = (number(1000 * step, ".1f"), number(one["answering"] / step)) if step else ("", "")
    cells = [one["arm"], str(one["answering"]), f"{one['used']:,}", *each, number(one["per_second"])]
    return [*cells, number(one["seconds"], ".1f"), number(one["prompts"], ".1f")]


USUAL = ["", "answer at a time", "blocks they take", "ms a step then", "tokens/s then"]
USUAL += ["output tokens/s, prompts included", "seconds", "of them until the last prompt was read"]


def largest(one: dict[str, Any]) -> list[str]:
    """A row of the round in which each has the most that it holds."""
    step = number(1000 * one["step"], ".1f") if one["step"] else ""
    cells = [one["arm"], f"{one['requests']}", str(one["answering"]), step, number(one["decoding"])]
    return [*cells, *(number(found) for found in one["whole"].values()), number(one["prompts"], ".1f")]


def table(found: list[dict[str, Any]], load: Load) -> str:
    """Markdown."""
    lines: list[str] = []
    pool = load.blocks(load.room, load.length, load.tokens) + 1
    marks = [f"with prompts, answers of {mark:,}" for mark in load.answers]
    titles = {
        "equal": f"{load.requests} requests of {load.length:,} tokens, the whole pool",
        "crowd": f"{load.crowd} requests, a pool of {pool:,} blocks",
        "long": f"{load.requests} requests of {load.long:,} tokens, the whole pool",
        "most": f"As many requests of {load.length:,} tokens as fit, a pool of the bytes of {load.room} in bfloat16",
    }
    for name, title in titles.items():
        rows = [one for one in found if one["round"] == name]
        if not rows:
            continue
        head = ["", "requests", "answer at a time", "ms a step then", "tokens/s while all answer", *marks]
        head = [*head, "seconds until the last prompt was read"] if name == "most" else USUAL
        cells = [head, ["---"] * len(head), *(largest(one) if name == "most" else usual(one) for one in rows)]
        lines += [f"\n**{title}**\n", *("| " + " | ".join(row) + " |" for row in cells)]
        for what in ("left", "preempted"):
            if any(one[what] for one in rows):
                text = {"left": "Blocks that never came back", "preempted": "Requests that were preempted"}[what]
                lines.append(f"\n{text}: { {one['arm']: one[what] for one in rows} }")
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
        f"prompts, greedy answers of {load.tokens} tokens where no other number is given, no prefix caching; "
        f"{load.budget:,} tokens a head are kept. A step's time is the median over those in which most requests "
        "answer. Of an answer that is cut for a column so many tokens are counted, until the last one has them.\n"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="snapkv,adakv,stock,stock fp8", help="in order; GPUs take turns")
    parser.add_argument("--gpus", default="0,1")
    parser.add_argument("--rounds", default="equal,crowd")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--crowd", type=int, default=16)
    parser.add_argument("--room", type=int, default=4)
    parser.add_argument("--keep", type=float, default=0.125)
    parser.add_argument("--long", type=int, default=40960)
    parser.add_argument("--answers", default="1024,2048", help="of the largest load")
    parser.add_argument("--seconds", type=int, default=150, help="time limit of an arm")
    parser.add_argument("--out", type=Path)
    for name in ("--work", "--folder", "--load"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    asked = parse()
    if asked.work:
        work(asked.folder, asked.work, Load(**json.loads(asked.load)))
        return
    names = ("length", "tokens", "requests", "crowd", "room", "keep", "long")
    answers = tuple(int(part) for part in asked.answers.split(","))
    wanted = tuple(asked.rounds.split(","))
    load = Load(**{name: getattr(asked, name) for name in names}, answers=answers, rounds=wanted)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA))
        arms, gpus = asked.arms.split(","), asked.gpus.split(",")

        def lane(number: int) -> None:
            for arm in arms[number :: len(gpus)]:
                start(arm, gpus[number], folder, load, asked.seconds, found)

        threads = [threading.Thread(target=lane, args=(number,)) for number in range(len(gpus))]
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
