"""What a model answers from caches that kvpress compressed: runs in kvpress's environment, on a CPU or a GPU.

    python benchmarks/parity/answers.py samples.jsonl FOLDER --model FOLDER --ratio 0.9 --workers 4

The press sees the context alone; the question follows, and greedy decoding, as in kvpress's own pipeline. One JSON line
an answer in FOLDER/answers-N.jsonl, on the disk at once; started again, it goes on where it was cut short, with any
number of workers. What fails is a line with its reason.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

SNAP = ("SnapKVPress", {})
EXPECTED = ("ExpectedAttentionPress", {})
COMPACTOR = ("CompactorPress", {})
PLAIN = ("ExpectedAttentionPress", {"use_vnorm": False})  # as CriticalKV asks for
PRESSES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("", {}),
    "random": ("RandomPress", {}),
    "streamingllm": ("StreamingLLMPress", {}),
    "snapkv": SNAP,
    "pyramidkv": ("PyramidKVPress", {}),
    "chunkkv": ("ChunkKVPress", {"press": SNAP}),
    "expected_attention": EXPECTED,
    "keydiff": ("KeyDiffPress", {}),
    "tova": ("TOVAPress", {}),
    "knorm": ("KnormPress", {}),
    "lagkv": ("LagKVPress", {}),
    "adakv": ("AdaKVPress", {"press": SNAP}),
    "adakv_expected": ("AdaKVPress", {"press": EXPECTED}),
    "criticalkv": ("CriticalKVPress", {"press": SNAP}),
    "criticalkv_expected": ("CriticalKVPress", {"press": PLAIN}),
    "criticaladakv": ("CriticalAdaKVPress", {"press": SNAP}),
    "criticaladakv_expected": ("CriticalAdaKVPress", {"press": PLAIN}),
    "observed_attention": ("ObservedAttentionPress", {}),
    "leverage": ("LeverageScorePress", {}),
    "compactor": COMPACTOR,
    "adakv_compactor": ("AdaKVPress", {"press": COMPACTOR}),
    "chunkkv_compactor": ("ChunkKVPress", {"press": COMPACTOR}),
    "chunkkv_leverage": ("ChunkKVPress", {"press": ("LeverageScorePress", {})}),
    "chunkkv_tova": ("ChunkKVPress", {"press": ("TOVAPress", {})}),
    "chunkkv_capkv": ("ChunkKVPress", {"press": ("CapPress", {})}),
    "block_compactor": ("BlockPress", {"press": COMPACTOR}),
    "chunk_compactor": ("ChunkPress", {"press": COMPACTOR}),
    "merging_compactor": ("MergingPress", {"press": COMPACTOR}),
    "cur": ("CURPress", {}),
    "capkv": ("CapPress", {}),
    "adakv_capkv": ("AdaKVPress", {"press": ("CapPress", {})}),
    "non_causal": ("NonCausalAttnPress", {}),
    "entropy_gated": ("EntropyGatedChunkKVPress", {"press": SNAP}),
    "entropy_gated_compactor": ("EntropyGatedChunkKVPress", {"press": COMPACTOR}),
    "merging": ("MergingPress", {"press": SNAP}),
    "chunk": ("ChunkPress", {"press": SNAP}),
    "block_keydiff": ("BlockPress", {"press": ("KeyDiffPress", {})}),
    "rerotation": ("KeyRerotationPress", {"press": SNAP}),
    "simlayerkv": ("SimLayerKVPress", {"lazy_threshold": 0.1, "n_recent": 128}),
    "kvzip": ("KVzipPress", {}),
    "kvcompose": ("KVComposePress", {}),
    "kvgrad": ("KVgradPress", {}),
}
SET_BY_HAND = ("SimLayerKVPress",)  # no share to set: options that keep about a tenth of 4K
EAGER = ("observed_attention", "kvcompose")  # these read attention weights


def build(spec: tuple[str, dict[str, Any]], ratio: float) -> Any:
    """A press; the share that is removed belongs to the innermost."""
    import kvpress

    name, options = spec
    share = {"compression_ratio": ratio}
    inner = {key: build(value, ratio) for key, value in options.items() if isinstance(value, tuple)}
    plain = {key: value for key, value in options.items() if key not in inner}
    return getattr(kvpress, name)(**inner, **plain, **({} if inner or name in SET_BY_HAND else share))


def answer(model: Any, line: dict[str, Any], name: str, ratio: float) -> dict[str, Any]:
    """Read, compress, ask, and decode the likeliest token until one that ends an answer."""
    import torch
    from transformers import DynamicCache

    torch.manual_seed(crc32(f"{line['task']}/{line['id']}/{name}".encode()))  # random draws anew for every sample
    model.set_attn_implementation("eager" if name in EAGER else "sdpa")
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    context = torch.tensor([line["context"]], device=model.device)
    cache, length = DynamicCache(), len(line["context"])
    began = time.perf_counter()
    with torch.inference_mode():
        if name == "full":
            model.model(input_ids=context, past_key_values=cache)
        else:
            with build(PRESSES[name], ratio)(model):
                model.model(input_ids=context, past_key_values=cache)
        held = sum(layer.keys.shape[2] for layer in cache.layers) / (length * len(cache.layers))
        model.set_attn_implementation("sdpa")
        read = float(_synced(model, time.perf_counter) - began)
        # A mask is made for the first layer's entries, so where layers hold unlike many a question goes in by tokens.
        alike = len({layer.keys.shape[2] for layer in cache.layers}) == 1
        pieces = [line["question"]] if alike else [[token] for token in line["question"]]
        tokens: list[int] = []
        while True:
            for piece in pieces:
                ids = torch.tensor([piece], device=model.device)
                places = torch.arange(length, length + len(piece), device=model.device)[None]
                out = model(input_ids=ids, past_key_values=cache, position_ids=places, logits_to_keep=1)
                length += len(piece)
            tokens.append(int(out.logits[0, -1].argmax()))
            pieces = [tokens[-1:]]
            if tokens[-1] in line["ends"] or len(tokens) >= line["max_new_tokens"]:
                break
    seconds = float(_synced(model, time.perf_counter) - began)
    return {"tokens": tokens, "share_in_cache": held, "read_seconds": read, "seconds": seconds}


def _synced(model: Any, clock: Any) -> Any:
    if model.device.type == "cuda":
        import torch

        torch.cuda.synchronize()
    return clock()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; a last one that a kill cut short is passed over."""
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            print(f"{path}: passed over a line that was cut short", file=sys.stderr)


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    """What no two answers share."""
    return line["task"], line["id"], line["turn"], line["press"], line["ratio"]


def work(options: argparse.Namespace) -> None:
    """Answer what is left of one worker's share."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    logging.getLogger("kvpress").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.workers))
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for milliseconds at every new length
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
    )
    model = model.to(options.device).eval()
    done = {key(line) for path in options.out.glob("answers-*.jsonl") for line in read(path) if not line.get("error")}
    lines = list(read(options.samples))[options.shard :: options.workers]
    path = options.out / f"answers-{options.shard}.jsonl"
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")
    with path.open("a", encoding="utf-8") as file:
        for count, line in enumerate(lines, 1):
            for name in options.presses.split(","):
                blank = {k: line[k] for k in ("task", "id", "turn", "prompt")} | {"press": name, "ratio": options.ratio}
                if key(blank) in done:
                    continue
                try:
                    found = answer(model, line, name, options.ratio)
                except Exception as error:  # whatever goes wrong with a press is its answer
                    found = {"error": f"{type(error).__name__}: {error}"[:500]}
                file.write(json.dumps(blank | found) + "\n")
                file.flush()
                os.fsync(file.fileno())
            print(f"worker {options.shard}: {count} of {len(lines)} samples", flush=True)


def main() -> None:
    """Answer with every press, in one process or several."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--presses", default=",".join(PRESSES))
    parser.add_argument("--ratio", type=float, default=0.9, help="share of the cache that is removed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--shard", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = sorted(set(options.presses.split(",")) - set(PRESSES))
    if unknown:
        parser.error(f"no such press: {', '.join(unknown)}. There are {', '.join(PRESSES)}.")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.shard is not None or options.workers == 1:
        options.shard = options.shard or 0
        work(options)
        return
    command = [sys.executable, *sys.argv, "--shard"]
    running = [subprocess.Popen([*command, str(shard)]) for shard in range(options.workers)]
    sys.exit(max(process.wait() for process in running))


if __name__ == "__main__":
    main()
