"""A GPU that is not the current one: kernels launch where their tensors are."""

from __future__ import annotations

import pytest
import torch
from tests.models import VOCABULARY, tiny

import kvthrift

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("method", ["full", "snapkv", "adakv"])
def test_the_second_gpu_says_what_the_first_says(method: str, graph: bool) -> None:
    ids = torch.randint(1, VOCABULARY, (2, 150))
    said = []
    for device in ("cuda:0", "cuda:1"):
        model = tiny("llama").to(device, torch.float32)
        cache = kvthrift.Cache(model.config, method, budget=None if method == "full" else 50, page=16)
        out = kvthrift.generate(model, ids.to(device), cache, graph=graph, max_new_tokens=12, do_sample=False)
        said.append(out.cpu())
        if method != "full":
            assert cache.report().compression_seconds > 0
    tiny("llama").to("cpu")
    torch.testing.assert_close(said[0], said[1])
