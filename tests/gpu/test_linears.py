"""Products of few rows on CUDA: whatever cut may be chosen, against float64; the same bits; early launches; graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.integrations.transformers.test_horizontal_fusion import Seen
from tests.kernels.test_linears import GPUS, given, wanted
from tests.models import VOCABULARY, text, tiny
from torch import Tensor

import kvthrift
from kvthrift.integrations.transformers.graph import GraphSteps
from kvthrift.kernels.linears import Setting, launched, linears, naive_linears, setting_of

pytestmark = pytest.mark.gpu

SHAPES: dict[str, tuple[int, tuple[int, ...], str, torch.dtype]] = {
    "q, k, v": (4096, (4096, 1024, 1024), "nnn", torch.bfloat16),
    "q, k, v with biases": (3584, (3584, 512, 512), "yyy", torch.bfloat16),
    "small q, k, v": (896, (896, 128, 128), "yyy", torch.float16),
    "gate, up": (4096, (14336, 14336), "nn", torch.bfloat16),
    "gate, up of few": (2048, (5632, 5632), "nn", torch.float16),
    "odd": (1040, (24, 1000, 72, 8), "nyny", torch.bfloat16),
    "short": (48, (33, 1), "yn", torch.float16),
    "vocabulary": (1024, (32003,), "n", torch.bfloat16),
}
Asked = tuple[Tensor, list[Tensor], list[Tensor | None]]


def close(found: list[Tensor], want: list[Tensor], about: object = "") -> None:
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-2, rtol=1e-2, msg=lambda message: f"{about}: {message}")


def first(rows: int, asked: Asked) -> Asked:
    """The first rows of the input, with nothing that may be read behind them; memory of outputs is not finite."""
    x, weights, biases = asked
    wide = torch.full((rows + 1, x.shape[1] + 16), torch.nan, dtype=x.dtype, device=x.device)
    wide[:rows, : x.shape[1]] = x[:rows]
    stale = [torch.full((rows, len(w)), torch.nan, dtype=x.dtype, device=x.device) for w in weights]
    del stale
    return wide[:rows, : x.shape[1]], weights, biases


def settings(depth: int, sizes: tuple[int, ...]) -> list[Setting]:
    """What may be chosen on GPUs of all sizes."""
    return list(dict.fromkeys(setting_of(depth, sizes, device, Setting()) for device in GPUS))


@pytest.mark.parametrize("name", SHAPES)
def test_every_cut_that_may_be_chosen_against_float64(name: str) -> None:
    depth, sizes, biased, dtype = SHAPES[name]
    torch.manual_seed(3)
    asked = given(64, depth, sizes, biased, dtype)
    want = wanted(*asked)
    for rows in range(1, 65):
        here = first(rows, asked)
        for cut in settings(depth, sizes):
            close(launched(*here, cut), [y[:rows] for y in want], (rows, cut))
        close(linears(*here), [y[:rows] for y in want], rows)


@pytest.mark.parametrize("name", ["q, k, v", "gate, up of few", "odd"])
def test_the_same_bits_each_time(name: str) -> None:
    depth, sizes, biased, dtype = SHAPES[name]
    asked = given(64, depth, sizes, biased, dtype)
    for cut in settings(depth, sizes):
        found = launched(*asked, cut)
        for _ in range(100):
            assert all(map(torch.equal, launched(*asked, cut), found)), cut


def test_one_launch_after_another_reads_what_the_one_before_wrote() -> None:
    """Launches overlap: what the launch before writes must not be read too early, nor its input be written over."""
    x, weights, _ = given(64, 2048, (2048,) * 8, "n" * 8, torch.bfloat16)
    for cut in (Setting(), Setting(columns=64), Setting(columns=128, run=3)):
        for _ in range(20):
            found, want = x.contiguous(), x.contiguous()
            for w in weights:
                found, want = launched(found, [w], [None], cut)[0], naive_linears(want, [w], [None])[0]
            assert float((found - want).float().norm() / want.float().norm()) < 2e-2


def recorded(x: Tensor, weights: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    none: list[Tensor | None] = [None] * len(weights)
    linears(x, weights, none)  # compiled before it is recorded
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(3):
            found = linears(x, weights, none)
    return graph, found


def test_graphs_one_by_one_and_at_once() -> None:
    x, weights, biases = given(33, 4096, (1024, 512), "nn", torch.bfloat16)
    x = x.contiguous()
    made = [recorded(x, weights) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in made]
    for _ in range(20):
        x.copy_(torch.randn(x.shape))
        torch.cuda.synchronize()
        for stream, (graph, found) in zip(streams, made, strict=True):
            for y in found:
                y.fill_(torch.nan)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for _, found in made:
            close(found, wanted(x, weights, biases))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_step_of_a_model_with_joined_products() -> None:
    model = copy.deepcopy(tiny("qwen2")).to("cuda", torch.bfloat16)
    cache = kvthrift.prefill(model, text(3, 60).to("cuda"), "snapkv", budget=50)
    tokens = torch.randint(1, VOCABULARY, (3,), device="cuda")
    seen, found = Seen("cuda"), []
    for how in ({"joined": seen}, {"joined": False}):
        torch._dynamo.reset()
        steps = GraphSteps(model, cache.fork(), 4, compiled=how)
        found.append([steps.step(tokens).clone() for _ in range(3)])
        steps.finish()
    torch.testing.assert_close(*map(torch.stack, found), atol=0.1, rtol=0.1)
    launches = {n for _, many in seen.counts for n in many}  # type: ignore[attr-defined]
    assert launches == {2, 3}, "what is alike in two layers may be compiled once"
