"""Many clients at a server with too small a pool, for minutes: every answer right, nobody stuck, no block lost.

python benchmarks/vllm/soak.py --minutes 5 --clients 16 --method snapkv --budget 256 --every 32

Prompts of mixed lengths have a number hidden in them. Each is asked once alone first; where the number was found then,
it has to be found ever after. Some clients hang up while their prompt is read, some while it is answered. Prints what
was seen; the exit code is 1 if anything is off.

Where prompts are compressed while they are read (--chunks), what is kept depends on where the parts end. So the same
parts are read of a prompt whoever else is served (--part tokens; somebody else always is, or vLLM reads more), and the
number stands all over a prompt, or the queries of a part would not know that it will be asked for.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai

from kvthrift.integrations.transformers.embedded import embedded_path

START, STUCK, DRAIN = 400, 240, 120  # seconds
SENTENCES = (3, 12, 30, 45, 60, 75)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


@dataclass
class Seen:
    """What all clients saw; under ``lock``."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0  # seconds
    notes: list[str] = field(default_factory=list)

    def note(self, what: str, seconds: float = 0.0, text: str = "") -> None:
        with self.lock:
            self.counts[what] += 1
            self.worst = max(self.worst, seconds)
            if text and len(self.notes) < 10:
                self.notes.append(f"{what}: {text}")


def prompt(index: int, *, often: bool) -> tuple[str, str]:
    """Text number ``index``, and the number hidden in it once, or ``often``."""
    key = str(7300 + 17 * index)
    count = SENTENCES[index % len(SENTENCES)]
    needle = f"\nThe special magic number is {key}. Remember it: {key} is the special magic number.\n"
    body, cut = FILLER * count, len(FILLER) * count // 2
    if often:
        needle, cut = needle * 2, 0
        body = (FILLER * 5 + needle) * (count // 6)
    return (
        f"<|im_start|>user\nDocument {index}. {body[:cut]}{needle}{body[cut:]}\n"
        "What is the special magic number mentioned in the document?<|im_end|>\n"
        "<|im_start|>assistant\nThe special magic number mentioned in the document is"
    ), key


def ask(client: openai.OpenAI, text: str, tokens: int, hang_up: float | None = None) -> str | None:
    """A streamed answer; None if we hung up after so many seconds."""
    began, out = time.monotonic(), ""
    stream = client.completions.create(
        model="small", prompt=text, max_tokens=tokens, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    for part in stream:
        out += part.choices[0].text if part.choices else ""
        if hang_up is not None and time.monotonic() - began > hang_up:
            stream.close()
            return None
    return out


def drop_while_read(base: str, text: str, seconds: float) -> None:
    """Ask and hang up before an answer can have begun."""
    try:
        httpx.post(f"{base}/completions", json={"model": "small", "prompt": text, "max_tokens": 32}, timeout=seconds)
    except httpx.TimeoutException:
        return


def keep_company(base: str, end: threading.Event) -> None:
    """Ask for long answers until the end."""
    client = openai.OpenAI(base_url=base, api_key="-", max_retries=0, timeout=STUCK)
    while not end.is_set():
        stream = client.completions.create(
            model="small", prompt="Once", max_tokens=2000, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        for _ in stream:
            if end.is_set():
                stream.close()
                break


def live(number: int, base: str, known: list[tuple[str, str]], until: float, seen: Seen) -> None:
    """One client."""
    draw = random.Random(number)
    client = openai.OpenAI(base_url=base, api_key="-", max_retries=0, timeout=STUCK)
    while time.monotonic() < until:
        text, key = draw.choice(known)
        began, fate = time.monotonic(), draw.random()
        try:
            if fate < 0.1:
                drop_while_read(base, text, 0.05 + draw.random())
                seen.note("hung up while read")
                continue
            found = ask(client, text, draw.choice((8, 12, 48, 120)), draw.random() * 5 if fate < 0.2 else None)
        except openai.APITimeoutError:
            seen.note("stuck", STUCK, f"client {number}, number {key}")
            continue
        except (openai.APIError, httpx.HTTPError) as error:
            seen.note("failed", 0, str(error)[:200])
            continue
        if found is None:
            seen.note("hung up while answered")
        else:
            fine = key in found
            seen.note("right" if fine else "wrong", time.monotonic() - began, "" if fine else f"{key}: {found[:80]!r}")


LEFT = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")


def metrics(base: str) -> dict[str, float]:
    """Counters and gauges of interest, summed over labels."""
    found: Counter[str] = Counter()
    for line in httpx.get(base.removesuffix("/v1") + "/metrics", timeout=30).text.splitlines():
        name = line.split("{")[0].split(" ")[0]
        ours = name.startswith("kvthrift:") and name.endswith("_total")
        if ours or name in (*LEFT, "vllm:num_preemptions_total"):
            found[name] += float(line.rsplit(" ", 1)[1])
    return dict(found)


def resident(process: int) -> float:
    """MiB that a process and all below it hold."""
    total, waiting = 0.0, [process]
    while waiting:
        one = Path(f"/proc/{waiting.pop()}")
        try:
            total += int((one / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            for task in (one / "task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return total


def start(asked: argparse.Namespace, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if asked.stock:
        words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(embedded_path())]
    else:
        words = [sys.executable, "-m", "kvthrift", "serve", str(embedded_path()), "--method", asked.method]
        words += ["--budget", asked.budget, "--check", *(["--chunks"] if asked.chunks else [])]
        words += ["--every", str(asked.every)] if asked.every else []
        words += ["--groups", str(asked.groups)] if asked.groups else []
    words += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "small", "--max-model-len", "2304"]
    words += ["--block-size", "32", "--gpu-memory-utilization", "0.3", "--enforce-eager"]
    words += ["--max-num-seqs", str(asked.clients + 1)]
    words += ["--num-gpu-blocks-override", str(asked.blocks), "--kv-cache-dtype", asked.cache]
    if asked.chunks:
        words += ["--max-num-batched-tokens", str((asked.clients + 1) * asked.part)]
        words += ["--long-prefill-token-threshold", str(asked.part)]
    else:
        words += ["--max-num-batched-tokens", "512"]
    with log.open("w") as out:
        server = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    return server, f"http://127.0.0.1:{port}/v1"


def wait(server: subprocess.Popen[bytes], base: str, log: Path) -> None:
    """Until the server answers."""
    began = time.monotonic()
    while time.monotonic() < began + START:
        if server.poll() is not None:
            raise SystemExit(log.read_text()[-3000:])
        try:
            httpx.get(f"{base}/models", timeout=5).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(1)
    raise SystemExit(log.read_text()[-3000:])


def drained(base: str) -> dict[str, float]:
    """The counters once nobody is served any more, or what they are after so many seconds."""
    began = time.monotonic()
    while True:
        found = metrics(base)
        if not sum(found[name] for name in LEFT) or time.monotonic() > began + DRAIN:
            return found
        time.sleep(1)


def soak(asked: argparse.Namespace, server: subprocess.Popen[bytes], base: str) -> int:
    """All clients for as long as was asked, then the reckoning."""
    client, end = openai.OpenAI(base_url=base, api_key="-", max_retries=0, timeout=STUCK), threading.Event()
    company = threading.Thread(target=keep_company, args=(base, end), daemon=True)
    if asked.chunks:
        company.start()
    texts = [prompt(n, often=asked.chunks) for n in range(asked.prompts)]
    known = [(text, key) for text, key in texts if key in (ask(client, text, 12) or "")]
    print(f"alone: {len(known)} of {asked.prompts} numbers found", flush=True)
    seen, before, until = Seen(), resident(server.pid), time.monotonic() + 60 * asked.minutes
    threads = [threading.Thread(target=live, args=(n, base, known, until, seen)) for n in range(asked.clients)]
    for thread in threads:
        thread.start()
    while time.monotonic() < until and server.poll() is None:
        time.sleep(min(60, max(1, until - time.monotonic())))
        left = (until - time.monotonic()) / 60
        print(f"{left:.0f} minutes left, {resident(server.pid):.0f} MiB: {dict(seen.counts)}", flush=True)
    for thread in threads:
        thread.join(STUCK + DRAIN)
    hanging = sum(thread.is_alive() for thread in threads)
    end.set()
    alive = server.poll() is None
    last = drained(base) if alive else {}
    total, after = sum(seen.counts.values()), resident(server.pid)
    print(f"{total} requests by {asked.clients} clients in {asked.minutes} minutes: {dict(seen.counts)}")
    print(f"slowest answer {seen.worst:.0f} s; server held {before:.0f} MiB before and {after:.0f} MiB after")
    for name, value in sorted(last.items()):
        print(f"  {name} {value:g}")
    print(*seen.notes, sep="\n")
    left = sum(last.get(name, 1) for name in LEFT)
    faults = {
        "no number was found alone": not known,
        "wrong answers": seen.counts["wrong"],
        "stuck requests": seen.counts["stuck"] + hanging,
        "failed requests": seen.counts["failed"],
        "the server died": not alive,
        "blocks or requests left in the pool": left,
        "nothing was given back": not asked.stock and not last.get("kvthrift:blocks_freed_total"),
    }
    off = [name for name, wrong in faults.items() if wrong]
    print("OFF: " + ", ".join(off) if off else "all right: the pool is whole")
    return int(bool(off))


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--minutes", type=float, default=5)
    words.add_argument("--clients", type=int, default=16)
    words.add_argument("--prompts", type=int, default=24, help="different prompts")
    words.add_argument("--blocks", type=int, default=120, help="blocks of the pool, of 32 tokens")
    words.add_argument("--stock", action="store_true", help="the same load without kvthrift, to compare memory")
    words.add_argument("--method", default="snapkv")
    words.add_argument("--budget", default="256")
    words.add_argument("--every", type=int, default=32, help="0 for at the end of prompts only")
    words.add_argument("--chunks", action="store_true", help="compress while prompts are read, too")
    words.add_argument("--groups", type=int, default=0, help="runs of layers with budgets of their own")
    words.add_argument("--cache", default="auto", help="dtype of the KV cache, such as fp8")
    words.add_argument("--part", type=int, default=64, help="tokens of a prompt that a step reads, with --chunks")
    asked = words.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        server, base = start(asked, log)
        try:
            wait(server, base, log)
            code = soak(asked, server, base)
            if code:
                print(log.read_text()[-4000:])
            return code
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


if __name__ == "__main__":
    sys.exit(main())
