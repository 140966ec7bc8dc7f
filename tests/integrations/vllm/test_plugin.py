"""The plugin where vLLM is absent or not served, or where another plugin was there before."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

from kvthrift.errors import UnsupportedModelError
from kvthrift.integrations.vllm import contract, plugin

ASKS = ["server", "--additional-config", '{"kvthrift": {"method": "snapkv", "budget": 64}}']


def absent(name: str) -> str:
    raise PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("version", "device", "word"),
    [
        (absent, "cpu", "vLLM is not installed"),
        (lambda _: "0.25.1", "cuda", "the insides of 0.25.1 were not tested"),
        (lambda _: "0.33.0", "cpu", "the insides of 0.33.0 were not tested"),
        (lambda _: "0.26.0", "xpu", "runs on xpu"),
    ],
)
def test_where_it_is_not_served_it_stays_out_and_says_so(
    version: object, device: str, word: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line in the log; an error if the command line asks for it."""
    platform = SimpleNamespace(current_platform=SimpleNamespace(device_type=device, is_cuda=lambda: True))
    monkeypatch.setattr(contract.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platform)
    monkeypatch.setattr(sys, "argv", ["server"])
    with caplog.at_level(logging.WARNING, "kvthrift"):
        plugin.register()
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("kvthrift stays out of vLLM: ")
    assert word in caplog.text
    monkeypatch.setattr(sys, "argv", ASKS)
    with pytest.raises(UnsupportedModelError, match=word):
        plugin.register()


class Backend:
    """One of vLLM's enumeration."""

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def is_overridden(self) -> bool:
        return self.path is not None

    def get_path(self) -> str:
        return self.path or "vllm.own.Backend"


def test_backends_that_another_plugin_has_replaced() -> None:
    ours, other = Backend("kvthrift.integrations.vllm.gpu_flash.KvthriftFlashBackend"), Backend("other.Attention")
    assert plugin._taken({"FLASH_ATTN": Backend(), "TRITON_ATTN": Backend()}, "cuda") == {}
    assert plugin._taken({"FLASH_ATTN": ours, "TRITON_ATTN": other}, "cuda") == {"TRITON_ATTN": "other.Attention"}
    assert plugin._taken({"CPU_ATTN": other}, "cpu") == {"CPU_ATTN": "other.Attention"}
