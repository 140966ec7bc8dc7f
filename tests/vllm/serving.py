"""``kvthrift serve`` in a process of its own, and clients of it through the openai package."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import openai
from tests.vllm.texts import prompts

from kvthrift.integrations.transformers.embedded import embedded_path
from kvthrift.integrations.vllm.freed import freed_by
from kvthrift.integrations.vllm.plan import Policy

BLOCK = 32
START = 400  # seconds, on two busy cores
NUMBERS = 30 * 2 * 3 * 64  # of a token: layers, keys and values, heads, dim


@contextmanager
def serving(log: Path, *flags: str, **variables: str) -> Iterator[openai.OpenAI]:
    """A client of a server with a small model, which ends with it.

    Args:
        log: where it says what it says.
        flags: of ``kvthrift serve``.
        variables: of its environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "kvthrift", "serve", str(embedded_path()), "--host", "127.0.0.1"]
    words += ["--port", str(port), "--served-model-name", "small", "--max-model-len", "4096"]
    words += ["--block-size", str(BLOCK), *flags]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO", **variables}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with log.open("w") as out:
        server = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)
        _wait(client, server, log)
        yield client
    finally:
        server.terminate()
        server.wait(60)


def _wait(client: openai.OpenAI, server: subprocess.Popen[bytes], log: Path) -> None:
    began = time.monotonic()
    while time.monotonic() < began + START:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def ask(client: openai.OpenAI, text: str) -> tuple[str, int]:
    """A streamed answer, and the prompt's tokens."""
    stream: list[Any] = list(
        client.completions.create(
            model="small",
            prompt=text,
            max_tokens=10,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    )
    return "".join(part.choices[0].text for part in stream if part.choices), stream[-1].usage.prompt_tokens


def check_eight_clients(client: openai.OpenAI, policies: Sequence[Policy], number_bytes: int) -> None:
    """Eight at once are answered right, and what they gave back is counted.

    Args:
        client: of a server that has answered nobody yet.
        policies: of its layers.
        number_bytes: of a number in its cache.
    """
    asked = prompts(8)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: ask(client, one[0]), asked))
    assert [key in text for (_, key), (text, _) in zip(asked, found, strict=True)] == [True] * 8
    with urlopen(str(client.base_url).replace("/v1/", "/metrics"), timeout=60) as answer:
        counted = answer.read().decode()
    size = NUMBERS // len(policies) * BLOCK * number_bytes
    freed = [freed_by(policies, tokens, 10, block=BLOCK, block_bytes=size) for _, tokens in found]
    for name, wanted in (
        ("requests_compressed", 8),
        ("blocks_freed", sum(one.blocks for one in freed)),
        ("bytes_freed", sum(one.bytes for one in freed)),
    ):
        start = f'kvthrift:{name}_total{{engine="0",model_name="small"}} '
        (line,) = (line for line in counted.splitlines() if line.startswith(start))
        assert float(line.removeprefix(start)) == wanted, name
