"""``kvthrift serve`` from a shell: vLLM's server, eight clients at once through the openai package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvthrift.integrations.vllm.plan import Policy

pytest.importorskip("vllm")
pytest.importorskip("openai")

from tests.vllm.serving import ask, check_eight_clients, serving

POLICY = Policy(entries=256, least=32)
FLAGS = ("--method", "adakv", "--budget", "256", "--gpu-memory-utilization", "0.3", "--enforce-eager")

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(log, *FLAGS, VLLM_CPU_KVCACHE_SPACE="1") as found:
        yield found
        assert log.read_text().count("kvthrift: adakv, 256 entries a head") == 1  # one line a start, none a step


def test_eight_clients_stream_right_answers_and_what_they_gave_back_is_counted(client: Any) -> None:
    check_eight_clients(client, [POLICY] * 30, 2)


def test_a_short_prompt_is_answered_as_ever(client: Any) -> None:
    assert ask(client, "One, two, three,")[0]
