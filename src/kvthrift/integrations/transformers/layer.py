"""One compressed layer of a cache, as a transformers model sees it.

Keys and values wait here until the model's attention function brings the queries. Decides nothing: all of it goes to
:class:`kvthrift.runtime.CacheState`, by way of the cache that owns the layer.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from kvthrift.allocate import DeletedHeads
from kvthrift.errors import CacheStateError, ModelMismatchError, UnsupportedModelError
from kvthrift.integrations.transformers.attention import HANDLE, untraced
from kvthrift.integrations.transformers.facts import config_fingerprint, module_facts
from kvthrift.integrations.transformers.stand_ins import StandIns, taken_over

if TYPE_CHECKING:
    from kvthrift.integrations.transformers.cache import Cache


class CacheLayer(CacheLayerMixin):
    """One compressed layer, as transformers sees it."""

    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, owner: Cache, place: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owner = weakref.ref(owner)
        self.place = place
        self._staged: tuple[Tensor, Tensor] | None = None
        self._module: weakref.ref[nn.Module] | None = None
        self._standing: StandIns | None = None

    @property
    def owner(self) -> Cache:
        """The cache this layer belongs to."""
        found = self._owner()
        if found is None:
            raise CacheStateError("the cache this layer belonged to is gone.")
        return found

    @property
    def place_number(self) -> int:
        """The model's own number of this layer."""
        return self.owner.state.layers[self.place].number

    @property
    def module(self) -> nn.Module:
        """The attention module that filled this layer.

        Raises:
            CacheStateError: there is none yet, or it is gone.
        """
        found = None if self._module is None else self._module()
        if found is None:
            raise CacheStateError("the model that filled this cache is gone, or the cache is empty.")
        return found

    def bind(self, module: nn.Module) -> None:
        """Belong to an attention module from now on, as if it had filled this layer."""
        self._module = weakref.ref(module)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: pages are taken as they are needed."""

    def _check_before(self) -> None:
        """Refuse a model with an attention of its own: what came to the layer before waits there still."""
        if self.place == 0:
            return
        owner = self.owner
        number = owner.state.layers[self.place - 1].number
        before = owner.layers[number]
        if isinstance(before, CacheLayer) and before._staged is not None:
            before._staged = None
            raise UnsupportedModelError(
                f"layer {number} attended without transformers' attention interface, where kvthrift works: models of "
                f"type {owner.config.model_type!r} compute attention by code of their own, and cannot be compressed."
            )

    @untraced
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values; they are stored once the attention function has seen the queries."""
        owner = self.owner
        owner.check_attention()
        if self._staged is not None:
            self._staged = None
            raise CacheStateError(
                "the keys handed over last were never attended to: the model's attention function lost track of the "
                "cache, or a forward pass failed. Call reset() and start again."
            )
        self._check_before()
        self._staged = (key_states.detach(), value_states.detach())
        self.is_initialized = True
        key = key_states.view(key_states.shape)  # a tensor of our own to hang the handle on
        setattr(key, HANDLE, self)
        return key, value_states

    def attend(self, module: nn.Module, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Attention over the cache and the keys just brought; see :meth:`CacheState.attend`."""
        if self._staged is None:
            raise CacheStateError("a layer attended twice to the same keys; this model's attention is not supported.")
        staged, self._staged = self._staged, None
        self._check_module(module)
        k, v = staged
        if self.place == 0:
            self.owner.check_step(k.shape[2])
        state, one = self.owner.state, query.shape[2] == 1
        before = None if one else self._stand_ins()  # a prompt is compressed behind its own attention,
        out = state.attend(self.place, query.detach(), k, v, scale=scale, mask=mask, facts=module_facts(module))
        return taken_over(out, self._stand_ins() if one else before)  # a decoded token before its own

    def _stand_ins(self) -> Tensor | None:
        """Which heads' outputs take the place of which; None where each has its own."""
        state = self.owner.state
        heads, look = state.recipe.heads, state.look
        if not state.needs.stand_ins or look is not None or not isinstance(heads, DeletedHeads):
            return None
        if self._standing is None or self._standing.heads != heads:
            self._standing = StandIns(heads, state.recipe.protect.sinks)
        return self._standing.of(state.layers[self.place])

    def discard(self) -> None:
        """Let go of keys that the attention function refuses to attend to."""
        self._staged = None

    def _check_module(self, module: nn.Module) -> None:
        known = None if self._module is None else self._module()
        if known is not None and known is not module:
            raise ModelMismatchError(
                "this cache was filled by another model. Use it with the model it was made with, or make a new one."
            )
        if known is None:
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig) and config_fingerprint(config) != self.owner.fingerprint:
                raise ModelMismatchError(
                    "this cache was made for a model with another config. Make it with this model's: "
                    "Cache(model.config, ...)."
                )
            self._module = weakref.ref(module)

    def get_seq_length(self) -> int:
        """Columns read so far, padding included: the logical length, not the stored one."""
        return self.owner.state.columns.length

    @untraced
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns a mask must cover, and their offset."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_max_cache_shape(self) -> int:
        """No limit (the older name of :meth:`get_max_length`)."""
        return -1

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether cropping leaves no trace: not if decoded tokens may have pushed others out."""
        return self.owner.state.recipe.trigger.every is None

    @property
    def batch_size(self) -> int:
        """Sequences held, or -1 before the first."""
        store = self.owner.state.layers[self.place].store
        return -1 if store is None else store.batch
