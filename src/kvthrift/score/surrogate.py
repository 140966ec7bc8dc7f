"""What a costly score would say, foretold by a linear map of an entry's own key and value."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvthrift.core import LayerView, Signals
from kvthrift.errors import CalibrationError, ModelMismatchError, OptionError
from kvthrift.part import require
from kvthrift.score.base import Scorer

EXTRA = 3  # features beside key and value: their norms, and 1
LOWEST = -30.0  # of a logarithm that is foretold; what lies below is 0 in float32 sums all the same


def features(keys: Tensor, values: Tensor) -> Tensor:
    """``[..., Dk + Dv + 3]`` float32: a pre-RoPE key, the value, their L2 norms, and 1."""
    k, v = keys.float(), values.float()
    norms = [x.norm(dim=-1, keepdim=True) for x in (k, v)]
    return torch.cat((k, v, *norms, torch.ones_like(norms[0])), dim=-1)


def pack(weights: Tensor) -> str:
    """``[L, H, F]`` as float16 in base64, so that a recipe can hold it in one line."""
    return base64.b64encode(weights.detach().cpu().numpy().astype("<f2").tobytes()).decode("ascii")


@lru_cache(maxsize=8)
def unpack(text: str, layers: int, heads: int) -> Tensor:
    """The ``[L, H, F]`` float32 that :func:`pack` was given, rounded to float16.

    Raises:
        OptionError: the text is no such thing.
    """
    try:
        flat = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f2")
        found = torch.from_numpy(flat.astype(np.float32)).reshape(layers, heads, -1)
    except (ValueError, RuntimeError) as error:
        raise OptionError(f"the weights do not fit {layers} layers of {heads} heads: {error}.") from None
    require(bool(found.isfinite().all()), "the weights are not all finite numbers.")
    return found


def of_layer(view: LayerView, weights: str, layers: int, heads: int, each: int) -> Tensor:
    """This layer's part ``[H, each]`` of packed weights ``[layers, heads, each]``.

    Raises:
        CalibrationError: there are none.
        ModelMismatchError: they are of other sizes.
    """
    if not weights:
        raise CalibrationError("a surrogate without weights foretells nothing. Give a calibration.")
    number, there = view.numbers[view.layer] if view.numbers else view.layer, view.keys.shape[1]
    table = unpack(weights, layers, heads)
    if number >= layers or there != heads or table.shape[-1] != each:
        raise ModelMismatchError(
            f"these weights are for {layers} layers of {heads} KV heads and {table.shape[-1]} weights a head, but "
            f"layer {number} has {there} heads that take {each}. Calibrate for this model."
        )
    return table[number].to(view.keys.device)


@dataclass(frozen=True)
class LinearSurrogate(Scorer, name="surrogate"):
    """exp of a linear map of each entry's pre-RoPE key, value, and their norms, its own for every head (2601.07891).

    Fitted offline to the logarithm of another score, so that what comes out is that score as foretold. Looks at nothing
    but keys and values.

    ``weights`` is :func:`pack` of ``[layers, heads, Dk + Dv + 3]``, layers by the model's own numbers; ``model`` the
    fingerprint of the model it was fitted on.
    """

    weights: str = ""
    layers: int = 0
    heads: int = 0
    model: str = ""
    is_mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.weights:
            unpack(self.weights, self.layers, self.heads)

    def __str__(self) -> str:
        return f"{self.name}({self.layers} x {self.heads} heads)"

    @property
    def needs(self) -> Signals:
        return Signals(rope=True)

    def score(self, view: LayerView) -> Tensor:
        if view.rope is None:
            raise ValueError("the runtime did not gather the rotary embedding that was declared")
        size = view.keys.shape[-1] + view.values.shape[-1] + EXTRA
        mine = of_layer(view, self.weights, self.layers, self.heads, size)  # [H, F]
        keys = view.rope.rotate(view.keys, -view.positions)
        log = torch.einsum("bhtf,hf->bht", features(keys, view.values), mine)
        return log.clamp(min=LOWEST, max=-LOWEST).exp().masked_fill(~view.valid, 0.0)
