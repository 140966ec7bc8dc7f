"""Products of one input within the compiler's graphs: which are joined, and that nothing else changes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.models import VOCABULARY, tiny
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from kvthrift.errors import OptionError
from kvthrift.integrations.transformers import graph as module
from kvthrift.integrations.transformers.horizontal_fusion import JoinProducts

PASS = "post_grad_custom_pre_pass"
HERE = JoinProducts(fewest=2, devices=("cpu",))
BF16 = torch.bfloat16


def counted(graph: Graph) -> tuple[int, list[int]]:
    """Products that are left, and how many matrices each launch takes."""
    names = [str(node.target) for node in graph.nodes]
    left = sum(name in ("aten.mm.default", "aten.addmm.default") for name in names)
    return left, [len(n.args[1]) for n in graph.nodes if str(n.target) == "kvthrift.linears.default"]


def joined(function: Callable[..., Any], *given: Tensor, how: JoinProducts = HERE) -> tuple[int, list[int]]:
    """The counts behind the pass, once what the graph computes was compared."""
    with torch.no_grad():
        traced: GraphModule = make_fx(function, tracing_mode="fake")(*given)
        how(traced.graph)
        traced.graph.lint()
        traced.recompile()
        torch.testing.assert_close(traced(*given), function(*given), atol=0, rtol=0)
    return counted(traced.graph)


def numbers(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def three(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return F.linear(x, q).relu(), F.linear(x, k), F.linear(x, v) + 1


def test_products_of_one_input_are_one() -> None:
    weights = [numbers(n, 64) for n in (64, 32, 16)]
    assert joined(three, numbers(4, 64), *weights) == (0, [3])
    assert joined(three, numbers(4, 1, 64), *weights) == (0, [3])  # a view each


def test_products_of_different_inputs_are_not() -> None:
    def two(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return F.linear(F.linear(x, w).relu(), v)

    given = numbers(4, 64), numbers(64, 64), numbers(32, 64)
    assert joined(two, *given) == (2, [])


def test_biases_and_none_together() -> None:
    def two(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, w, b), F.linear(x, v)

    assert joined(two, numbers(2, 64), numbers(32, 64), numbers(32), numbers(48, 64)) == (0, [2])


def test_more_than_four_are_several_launches() -> None:
    def many(x: Tensor, *weights: Tensor) -> list[Tensor]:
        return [F.linear(x, w) for w in weights]

    assert joined(many, numbers(3, 32), *(numbers(16, 32) for _ in range(6))) == (0, [4, 2])
    assert joined(many, numbers(3, 32), *(numbers(16, 32) for _ in range(5))) == (1, [4])


@pytest.mark.parametrize(("rows", "taken"), [(1, False), (2, True), (64, True), (65, False)])
def test_only_of_few_rows_and_not_of_one(rows: int, taken: bool) -> None:
    weights = [numbers(n, 64) for n in (64, 32, 16)]
    assert joined(three, numbers(rows, 64), *weights) == ((0, [3]) if taken else (3, []))
    if rows == 1:
        assert joined(three, numbers(1, 64), *weights, how=JoinProducts(1, devices=("cpu",))) == (0, [3])
    if rows == 64:
        assert joined(three, numbers(64, 64), *weights, how=JoinProducts(most=63, devices=("cpu",))) == (3, [])


@pytest.mark.parametrize(("rows", "taken"), [(32, False), (33, True)])
def test_of_so_few_rows_that_a_library_is_faster_none(rows: int, taken: bool) -> None:
    found = joined(
        three, numbers(rows, 64), *(numbers(n, 64) for n in (64, 32, 16)), how=JoinProducts(devices=("cpu",))
    )
    assert found == ((0, [3]) if taken else (3, []))


def test_what_the_kernel_does_not_take_stays() -> None:
    weights = [numbers(n, 64, dtype=torch.float32) for n in (64, 32, 16)]
    assert joined(three, numbers(4, 64, dtype=torch.float32), *weights) == (3, [])
    assert joined(three, numbers(4, 64), *(numbers(n, 64) for n in (64, 32, 16)), how=JoinProducts()) == (3, [])
    assert joined(three, numbers(4, 40), *(numbers(n, 40) for n in (64, 32, 16))) == (3, [])

    def computed(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, w * 2), F.linear(x, v.T)  # one is no parameter, one lies the other way

    assert joined(computed, numbers(4, 64), numbers(32, 64), numbers(64, 32)) == (2, [])


class Seen(JoinProducts):
    """Notes what the pass made of each graph."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(fewest=2, devices=(device,))
        object.__setattr__(self, "counts", [])

    def __call__(self, graph: Graph) -> None:
        super().__call__(graph)
        self.counts.append(counted(graph))  # type: ignore[attr-defined]

    def uuid(self) -> None:
        return None  # compiled anew, so that something is seen


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # the latter with biases
def test_a_compiled_model_says_the_same(name: str) -> None:
    torch._dynamo.reset()
    model = copy.deepcopy(tiny(name, "sdpa")).to(BF16)
    ids = torch.randint(1, VOCABULARY, (3, 1))
    seen = Seen()
    with torch.inference_mode():
        found = module._fused(model, {"joined": seen})(input_ids=ids, use_cache=False).logits
        torch._dynamo.reset()
        apart = module._fused(model, {"joined": False})(input_ids=ids, use_cache=False).logits
        plain = model.float()(input_ids=ids, use_cache=False).logits
    layers = model.config.num_hidden_layers
    launches = sorted(n for _, many in seen.counts for n in many)  # type: ignore[attr-defined]
    assert launches == sorted([3, 2] * layers)
    assert sum(left for left, _ in seen.counts) == 2 * layers + 1  # type: ignore[attr-defined]  # and the vocabulary's
    torch.testing.assert_close(found, apart, atol=0, rtol=0)
    assert float((found - plain).norm() / plain.norm()) < 2e-2


def test_options_and_modes_go_together() -> None:
    assert module._options(True) == {PASS: JoinProducts()}
    assert module._options({"joined": False}) == {}
    assert module._options({"joined": HERE}) == {PASS: HERE}
    assert module._options("max-autotune-no-cudagraphs") == {
        "max_autotune": True, "coordinate_descent_tuning": True, PASS: JoinProducts()
    }  # fmt: skip
    mixed = {"mode": "max-autotune-no-cudagraphs", "coordinate_descent_tuning": False, "joined": False}
    assert module._options(mixed) == {"max_autotune": True, "coordinate_descent_tuning": False}
    with pytest.raises(OptionError, match="no mode 'no-such-mode'"):
        module._options("no-such-mode")
    with pytest.raises(OptionError, match="joined='yes'"):
        module._options({"joined": "yes"})


def test_a_pass_of_the_users_own_stays_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    module._say_apart.cache_clear()
    with caplog.at_level(logging.WARNING, "kvthrift"):
        assert module._options({PASS: HERE}) == {PASS: HERE}
    assert "are not joined" in caplog.text


def test_a_torch_without_the_place_for_it_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    module._say_apart.cache_clear()
    monkeypatch.setattr(torch._inductor, "list_options", lambda: ["max_autotune"])
    with caplog.at_level(logging.WARNING, "kvthrift"):
        assert module._options(True) == {}
    assert "are not joined" in caplog.text


def test_caches_tell_settings_apart() -> None:
    assert JoinProducts().uuid() == JoinProducts().uuid()
    assert JoinProducts().uuid() != JoinProducts(most=32).uuid()
    assert JoinProducts() == JoinProducts()  # so that the compiler's own guards know it again
