"""``kvthrift serve`` from a shell: vLLM's server, eight clients at once through the openai package."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.vllm.texts import prompts

from kvthrift.integrations.vllm.freed import freed_by
from kvthrift.integrations.vllm.plan import Policy

pytest.importorskip("vllm")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

START = 400  # seconds, on two busy cores
POLICY = Policy(entries=256, least=32)

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    from kvthrift.integrations.transformers.embedded import embedded_path

    log = tmp_path_factory.mktemp("server") / "log"
    words = [sys.executable, "-m", "kvthrift", "serve", str(embedded_path()), "--method", "adakv", "--budget", "256"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "small", "--max-model-len", "4096"]
    words += ["--block-size", "32", "--gpu-memory-utilization", "0.3", "--enforce-eager"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with log.open("w") as out:
        server = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        found = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)
        _wait(found, server, log)
        yield found
        assert log.read_text().count("kvthrift: adakv, 256 entries a head") == 1  # one line a start, none a step
    finally:
        server.terminate()
        server.wait(60)


def _wait(client: object, server: subprocess.Popen[bytes], log: Path) -> None:
    began = time.monotonic()
    while time.monotonic() < began + START:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            client.models.list()  # type: ignore[attr-defined]
            return
        except openai.APIConnectionError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def _ask(client: object, text: str) -> tuple[str, int]:
    """A streamed answer, and the prompt's tokens."""
    stream = list(
        client.completions.create(  # type: ignore[attr-defined]
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


def test_eight_clients_stream_right_answers_and_what_they_gave_back_is_counted(client: object) -> None:
    asked = prompts(8)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: _ask(client, one[0]), asked))
    assert [key in text for (_, key), (text, _) in zip(asked, found, strict=True)] == [True] * 8
    counted = httpx.get(str(client.base_url).replace("/v1/", "/metrics")).text  # type: ignore[attr-defined]
    freed = [freed_by([POLICY] * 30, tokens, 10, block=32, block_bytes=2 * 3 * 64 * 32 * 2) for _, tokens in found]
    for name, wanted in (
        ("requests_compressed", 8),
        ("blocks_freed", sum(one.blocks for one in freed)),
        ("bytes_freed", sum(one.bytes for one in freed)),
    ):
        start = f'kvthrift:{name}_total{{engine="0",model_name="small"}} '
        (line,) = (line for line in counted.splitlines() if line.startswith(start))
        assert float(line.removeprefix(start)) == wanted, name


def test_a_short_prompt_is_answered_as_ever(client: object) -> None:
    assert _ask(client, "One, two, three,")[0]
