"""One decode step of an unmodified model with a kvthrift cache as a CUDA graph.

Launching a step's few hundred kernels from Python takes several times as long as the kernels do. Recorded once, the
whole step, model and cache, is launched by a single call. Lengths, page tables and positions are tensors on the
device, so a replay needs nothing from the host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache as once
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvthrift.errors import NoRoomError, OptionError
from kvthrift.integrations.transformers.cache import Cache, CacheLayer
from kvthrift.runtime import gather
from kvthrift.runtime.fixed import FixedSteps

_LOG = logging.getLogger("kvthrift")
_WARM_UP = 2
_BATCHES = 64  # sizes of a batch, and options, that a process may compile for; what is over would stay in pieces
_PASS = "post_grad_custom_pre_pass"
Fusing = bool | str | Mapping[str, Any]


class GraphUnavailableError(Exception):
    """A step cannot be recorded; the message says why. Eager steps can still be taken."""


def obstacle(model: PreTrainedModel, cache: Cache) -> str | None:
    """Why this model's step with this cache cannot be a graph; None if nothing is known against it."""
    if model.device.type != "cuda":
        return f"the model is on {model.device.type}, and graphs need a CUDA device"
    foreign = next((i for i, layer in enumerate(cache.layers) if not isinstance(layer, CacheLayer)), None)
    if foreign is not None:
        return f"layer {foreign} keeps transformers' own cache, which grows by new tensors"
    if len({p.device for p in model.parameters()}) > 1:
        return "the model lies on several devices"
    if cache.state.needs.stand_ins:
        return "which heads' outputs stand for which is looked up on the host"
    if (why := gather.obstacle(cache.state)) is not None:
        return why
    stores = (layer.store for layer in cache.state.layers)
    return next((why for store in stores if store is not None and (why := store.unfit)), None)


class GraphSteps:
    """Decode steps of ``model`` with ``cache``, replayed from one recording.

    Args:
        model: with ``attn_implementation="kvthrift"``, on a CUDA device.
        cache: it has read the prompt.
        room: steps for which pages are taken now; no more can be replayed.
        compiled: fuse the model's elementwise operations by ``torch.compile`` first (takes a while, once a model); or
            the name of a mode of ``torch.compile`` without graphs of its own; or options for it by name, with
            ``mode`` among them if need be. Products of 33 to 64 rows are also joined where they have their input in
            common (:mod:`.horizontal_fusion`), unless the options have ``joined=False``.

    Raises:
        GraphUnavailableError: the step cannot be recorded. The cache is as it was, but for the pages taken.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, room: int, *, compiled: Fusing = False) -> None:
        why = obstacle(model, cache)
        if why is not None:
            raise GraphUnavailableError(why)
        try:
            self.steps = FixedSteps(cache.state, room)
        except NoRoomError as error:
            raise GraphUnavailableError(f"no pages for {room} steps could be had: {error}") from error
        self.tokens = torch.zeros(len(self.steps.positions), 1, dtype=torch.long, device=model.device)
        self.cache = cache
        forward: Callable[..., Any] = _fused(model, compiled) if compiled else model
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.inference_mode(), self.steps, torch.cuda.device(model.device):
                self._record(forward)
        except Exception as error:
            raise GraphUnavailableError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        finally:
            self.steps.taken = 0
            self.steps.restart()
            self.steps.settle()

    def _record(self, forward: Callable[..., Any]) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._forward(forward)
                self.steps.restart()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph):
            self.logits = self._forward(forward)

    def _forward(self, forward: Callable[..., Any]) -> Tensor:
        out = forward(
            input_ids=self.tokens,
            position_ids=self.steps.positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1]
        self.steps.positions.add_(1)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Read ``tokens [B]``; the next token's logits ``[B, vocabulary]``, valid until the next step."""
        if self.steps.taken >= self.steps.room:
            raise IndexError(f"there was room for {self.steps.room} steps")
        self.tokens.copy_(tokens[:, None])
        with torch.cuda.device(self.tokens.device):
            self.graph.replay()
        self.steps.taken += 1
        return self.logits

    @property
    def left(self) -> int:
        """Steps there is room for."""
        return self.steps.room - self.steps.taken

    def finish(self) -> None:
        """Count on the host what was replayed; the cache can be used in any way again, the graph not."""
        with self.steps:
            pass
        self.graph.reset()


def _fused(model: PreTrainedModel, how: Fusing) -> Callable[..., Any]:
    """The model's forward pass, compiled in pieces between attention and attention."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    most = _BATCHES * layers
    compiled = torch.compile(model.__call__, dynamic=False, options=_options(how))

    def forward(**kwargs: Any) -> Any:
        # a module's number is part of its code to the compiler, so each layer is compiled by itself
        with torch._dynamo.config.patch(recompile_limit=most, accumulated_recompile_limit=most):
            return compiled(**kwargs)

    return forward


def _options(how: Fusing) -> dict[str, Any]:
    """The compiler's options for what ``compiled=`` asks for, with the pass that joins products.

    Raises:
        OptionError: there is no such mode, or ``joined`` is no switch.
    """
    given = dict(how) if isinstance(how, Mapping) else {}
    mode, joined = how if isinstance(how, str) else given.pop("mode", None), given.pop("joined", True)
    modes = torch._inductor.list_mode_options()
    if mode and mode not in modes:
        raise OptionError(f"compiled: torch.compile has no mode {mode!r}. Valid: {', '.join(modes)}.")
    options = {**(modes[mode] if mode else {}), **given}
    if joined is False:
        return options
    if _PASS in options:
        _say_apart(f"the options have a {_PASS} of their own")
        return options
    try:
        from kvthrift.integrations.transformers.horizontal_fusion import JoinProducts
    except ImportError as error:
        _say_apart(f"this torch has no place for it ({error})")
        return options
    if _PASS not in torch._inductor.list_options():
        _say_apart(f"this torch has no option {_PASS}")
        return options
    if joined is not True and not isinstance(joined, JoinProducts):
        raise OptionError(f"compiled: joined={joined!r}, where True, False or a JoinProducts is meant.")
    return {**options, _PASS: JoinProducts() if joined is True else joined}


@once
def _say_apart(reason: str) -> None:
    _LOG.warning("products of one input are not joined: %s.", reason)
