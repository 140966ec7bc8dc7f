"""Horizontal fusion, a pass over the compiler's graphs: products of few rows with one input become one launch.

It knows graphs, not models: whatever multiplies one input by several parameters is found (queries, keys and values;
gates and what they gate). Weights stay what they are and where they are.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from kvthrift.kernels import linears

_ATEN = torch.ops.aten
_VIEWS = (_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default)


@dataclass(frozen=True)
class Product:
    """``x W^T + b`` as a graph has it; the last two are its inputs."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None


@dataclass(frozen=True)
class JoinProducts(CustomGraphPass):
    """For ``post_grad_custom_pre_pass`` of ``torch.compile``'s options.

    Attributes:
        fewest: rows from which on products are joined; it is 64 of which whole steps were measured.
        most: rows up to which they are.
        devices: kinds of devices.
    """

    fewest: int = 33
    most: int = linears.MOST_ROWS
    devices: tuple[str, ...] = ("cuda",)

    def __call__(self, graph: Graph) -> None:
        """Change the graph in place."""
        found: dict[object, list[Product]] = {}
        for product in filter(self.takes, products(graph)):
            found.setdefault(_source(product.x), []).append(product)
        joined = [group for alike in found.values() for group in _groups(alike)]
        for group in joined:
            _join(graph, group)
        if joined:
            graph.eliminate_dead_code()

    def takes(self, product: Product) -> bool:
        """Whether the kernel is for such a product."""
        x, weight = _value(product.x), _value(product.weight)
        if x is None or weight is None or x.device.type not in self.devices:
            return False
        if not all(isinstance(n, int) for t in (x, weight) for n in (*t.shape, *t.stride())):
            return False
        bias = None if product.bias is None else _value(product.bias)
        if product.bias is not None and (bias is None or tuple(bias.shape) != (len(weight),) or bias.dtype != x.dtype):
            return False
        return self.fewest <= x.shape[0] <= self.most and linears.unfit_for(x, [weight]) is None

    def uuid(self) -> Any:
        """What the compiler's caches tell graphs apart by."""
        return get_hash_for_files((__file__, linears.__file__), repr(self))


def products(graph: Graph) -> Iterator[Product]:
    """Products with transposed inputs of the graph, in order."""
    for node in graph.nodes:
        if node.target == _ATEN.mm.default and not node.kwargs:
            bias, (x, right) = None, node.args
        elif node.target == _ATEN.addmm.default and not node.kwargs:
            bias, x, right = node.args
        else:
            continue
        weight = _transposed(right)
        given = weight is not None and (bias is None or _given(bias))
        if given and isinstance(x, Node) and isinstance(weight, Node):
            yield Product(node, x, weight, bias)


def _transposed(node: Any) -> Node | None:
    """The graph's input that ``node`` is the transposed of."""
    if not isinstance(node, Node):
        return None
    if node.target == _ATEN.t.default or (
        node.target in (_ATEN.permute.default, _ATEN.transpose.int)
        and tuple(node.args[1:]) in (([1, 0],), ((1, 0),), (0, 1), (1, 0))
    ):
        inner = node.args[0]
        return inner if _given(inner) else None
    return None


def _given(node: Any) -> TypeGuard[Node]:
    return isinstance(node, Node) and node.op == "placeholder"


def _value(node: Node) -> Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def _source(x: Node) -> object:
    """What several views of one tensor have in common."""
    value = _value(x)
    while x.op == "call_function" and x.target in _VIEWS and isinstance(x.args[0], Node):
        x = x.args[0]
    return x, None if value is None else tuple(value.shape)


def _groups(alike: list[Product]) -> Iterator[list[Product]]:
    """As many at once as there may be; one that is left alone stays as it is."""
    for first in range(0, len(alike) - 1, linears.MOST):
        yield alike[first : first + linears.MOST]


def _join(graph: Graph, group: list[Product]) -> None:
    with graph.inserting_before(group[0].node):
        weights, biases = [product.weight for product in group], [product.bias for product in group]
        call = graph.call_function(torch.ops.kvthrift.linears.default, (group[0].x, weights, biases))
        outs = [graph.call_function(operator.getitem, (call, i)) for i in range(len(group))]
    call.meta["val"] = [product.node.meta["val"] for product in group]
    for product, out in zip(group, outs, strict=True):
        out.meta.update(product.node.meta)
        product.node.replace_all_uses_with(out)
        graph.erase_node(product.node)
