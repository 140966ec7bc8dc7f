"""The cache that a transformers model takes as ``past_key_values``.

A thin front: layers hand keys and values on to :class:`kvthrift.runtime.CacheState`, which decides everything.
Layers that kvthrift does not compress (sliding windows, linear attention) keep transformers' own cache.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache as HFCache
from transformers import DynamicCache, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from kvthrift.budget import Budget
from kvthrift.core import ModuleFacts
from kvthrift.errors import CacheStateError, ModelMismatchError, OptionError, RecipeError, UnsupportedModelError
from kvthrift.integrations.transformers.attention import NAME
from kvthrift.integrations.transformers.delimiters import delimiter_ids
from kvthrift.integrations.transformers.facts import config_fingerprint, module_facts, refuse
from kvthrift.integrations.transformers.layer import CacheLayer
from kvthrift.integrations.transformers.reporting import cache_report
from kvthrift.methods import method
from kvthrift.recipe import Recipe
from kvthrift.runtime import CacheReport, CacheState
from kvthrift.runtime.segments import segment_numbers


class Cache(HFCache):
    """A compressed KV cache for ``model.generate(..., past_key_values=cache)`` or ``model(...)``.

    Load the model with ``attn_implementation="kvthrift"``. The prompt is compressed as it is read, its question
    included; to compress a context before any question is seen, use :func:`kvthrift.prefill`.

    Args:
        config: the model's config.
        recipe: a method's name, or a :class:`kvthrift.Recipe`.
        budget: entries per KV head (512), a share of the prompt ("25%") or bytes in all ("64MiB"); may be part of a
            recipe already, and None there keeps everything.
        page: entries per page of the store.
        observe: recipes (or methods' names) that :meth:`compressed` will be asked for later; what they look at is
            gathered and kept.
        options: the method's options, where ``recipe`` is a name.

    Raises:
        OptionError: ``config`` is something else, such as the model itself.
        RecipeError: no such method or option, or a value that cannot be honoured.
        BudgetError: the budget cannot be read, or is below what the recipe protects.
        UnsupportedModelError: an architecture that kvthrift does not compress.
        ModelMismatchError: a part was calibrated for a model with another config. Weights are not compared: the same
            architecture in another dtype, or fine-tuned, is accepted.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        recipe: str | Recipe = "full",
        *,
        budget: int | str | Budget | None = None,
        page: int = 64,
        observe: Sequence[str | Recipe] = (),
        **options: Any,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise OptionError(f"config is a {type(config).__name__}, and no model's config. Pass model.config.")
        refuse(config)
        self.config = config
        self.fingerprint = config_fingerprint(config)
        self.recipe = resolve(recipe, budget, options)
        _check_calibration(self.recipe, config.model_type, self.fingerprint)
        stock = DynamicCache(config=config)
        numbers = [i for i, layer in enumerate(stock.layers) if type(layer) is DynamicLayer]
        if not numbers:
            raise UnsupportedModelError(
                f"{config.model_type} has no full-attention layer, so there is nothing to compress. Use the "
                "model's own cache."
            )
        signals = [resolve(other, None, {}).needs for other in observe]
        state = CacheState(
            self.recipe,
            numbers,
            _skipped(self.recipe, len(stock.layers)),
            page=page,
            observe=reduce(or_, signals) if signals else None,
        )
        self._adopt(state, list(stock.layers))

    def _adopt(self, state: CacheState, layers: list[Any]) -> None:
        self.state = state
        for place, layer in enumerate(state.layers):
            layers[layer.number] = CacheLayer(self, place)
        super().__init__(layers=layers)

    # -- what transformers asks for ------------------------------------------------------------------------------

    def check_attention(self) -> None:
        """Refuse a model whose attention function would not call this cache back.

        Raises:
            UnsupportedModelError: with the remedy.
        """
        used = self.config.get_text_config(decoder=True)._attn_implementation
        if used != NAME:
            raise UnsupportedModelError(
                f"the model attends with {used!r}, which would ignore what this cache holds. Load it with "
                f'attn_implementation="{NAME}", or call model.set_attn_implementation("{NAME}").'
            )

    def check_step(self, length: int) -> None:
        """Refuse to go on where transformers' own layers saw other tokens than ours, as after a failed forward pass.

        Args:
            length: columns of the pass that our first layer is about to read.

        Raises:
            CacheStateError: they did.
        """
        first = self.state.layers[0].number
        stock: Any
        for number, stock in enumerate(self.layers):
            if isinstance(stock, CacheLayer) or not (getattr(stock, "is_sliding", False) and stock.is_initialized):
                continue
            if stock.get_seq_length() != self.state.columns.length + (length if number < first else 0):
                raise CacheStateError(
                    f"layer {number}, which keeps transformers' own cache, holds tokens that others do not: an earlier "
                    "forward pass failed half way. Call reset() and start again."
                )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far, padding included."""
        return self.state.columns.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest columns: ``-n`` forgets n; a positive number is the length to keep (the older meaning).

        Entries that compression dropped do not come back.
        """
        length = self.state.columns.length
        keep = length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, length)
        for layer in self._stock():
            layer.crop(keep - length)
        self.state.crop(max(keep, 0))

    def activate_past_recording(self) -> None:
        """Be told that tokens of passes to come may be taken back, as assisted decoding does before its first."""
        super().activate_past_recording()  # type: ignore[no-untyped-call]
        self.state.guesses = True

    def reset(self) -> None:
        """Forget everything; the cache can be filled anew."""
        old = self.state
        whole = {layer.number for layer in old.layers if layer.whole}
        for layer in self._stock():
            layer.reset()
        observe = old.observes if old.keeps_observations else None
        numbers = [x.number for x in old.layers]
        self._adopt(CacheState(old.recipe, numbers, whole, page=old.page, observe=observe), self.layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Hold the sequences that beam search goes on with."""
        for layer in self._stock():
            layer.reorder_cache(beam_idx)
        self.state.select(beam_idx.cpu().numpy().astype(np.int64))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every sequence ``repeats`` times."""
        for layer in self._stock():
            layer.batch_repeat_interleave(repeats)
        self.state.select(np.repeat(np.arange(max(self.batch_size, 0), dtype=np.int64), repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Hold these sequences of the batch (indices, or a bool for each)."""
        for layer in self._stock():
            layer.batch_select_indices(indices)
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self.state.select(rows.cpu().numpy().astype(np.int64))

    @property
    def is_initialized(self) -> bool:
        """Whether anything has been read."""
        return self.state.columns.length > 0

    @property
    def batch_size(self) -> int:
        """Sequences held, or -1 before the first."""
        store = self.state.layers[0].store
        return -1 if store is None else store.batch

    @property
    def is_croppable(self) -> bool:
        """Whether cropping leaves no trace."""
        return all(bool(layer.is_croppable) for layer in self.layers)

    def compact(self) -> None:
        """Free what transformers' own layers hold behind their window until the next token comes."""
        for layer in self._stock():
            for name in ("keys", "values"):
                held = getattr(layer, name, None)
                if isinstance(held, Tensor) and held.untyped_storage().nbytes() > held.numel() * held.element_size():
                    setattr(layer, name, held.clone())

    def _stock(self) -> Sequence[Any]:
        """The layers that keep transformers' own cache."""
        return [layer for layer in self.layers if not isinstance(layer, CacheLayer)]

    def tell(
        self,
        input_ids: Tensor,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        delimiters: Collection[int] | None = None,
        attention_mask: Tensor | None = None,
    ) -> None:
        """Say which tokens the next forward pass brings, for recipes that look at the text's segments.

        :func:`kvthrift.prefill` and :func:`kvthrift.generate` call this by themselves. Does nothing if no recipe asks,
        or neither ``tokenizer`` nor ``delimiters`` is given.

        Args:
            input_ids: ``[B, T]``, from the first token of the text on, those the cache holds already included.
            tokenizer: the model's; tokens that end with a punctuation mark or a line break end a segment.
            delimiters: ids of tokens that end a segment, instead; none makes one segment of the text.
            attention_mask: ``[B, T]``, 0 for padding.
        """
        if not self.state.observes.segments or (tokenizer is None and delimiters is None):
            return
        if delimiters is None and tokenizer is not None:
            delimiters = delimiter_ids(tokenizer)
        self.state.segments = segment_numbers(input_ids, delimiters or (), attention_mask)

    # -- what kvthrift adds --------------------------------------------------------------------------------------

    def fork(self) -> Cache:
        """Another cache that goes on from here; memory is shared until one side writes to it.

        Raises:
            CacheStateError: a forward pass is under way or failed half way.
        """
        return self._with_state(self.state.fork(), self.recipe)

    def _with_state(self, state: CacheState, recipe: Recipe) -> Cache:
        other = object.__new__(Cache)
        other.config, other.fingerprint, other.recipe = self.config, self.fingerprint, recipe
        modules = {x.place: x._module for x in self.layers if isinstance(x, CacheLayer)}
        layers = [None if isinstance(x, CacheLayer) else _copied(x) for x in self.layers]
        other._adopt(state, layers)
        for layer in other.layers:
            if isinstance(layer, CacheLayer):
                layer._module = modules[layer.place]
                layer.is_initialized = True
        return other

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write this cache to a file; see :func:`kvthrift.load`.

        Raises:
            CacheStateError: the cache is empty, or a forward pass failed half way.
            SaveFileError: the file exists or cannot be written.
        """
        from kvthrift.integrations.transformers.save import save

        save(self, path, overwrite=overwrite)

    def compressed(self, recipe: str | Recipe, *, budget: int | str | Budget | None = None, **options: Any) -> Cache:
        """A fork of this uncompressed cache, compressed under another recipe; this one stays as it is.

        The context must have been read with ``prefill(model, ids, observe=[recipe, ...])``, so that what the recipe
        looks at was gathered. Reading once and compressing often compares recipes at the cost of one prefill; what is
        kept is the same as if the recipe had been there from the start.

        Raises:
            RecipeError: entries were dropped already, or the recipe cannot be honoured.
            MissingSignalError: a signal the recipe needs was not observed.
        """
        wanted = resolve(recipe, budget, options)
        _check_calibration(wanted, self.config.model_type, self.fingerprint)
        state = self.state.under(wanted, _skipped(wanted, len(self.layers)), self._facts())
        return self._with_state(state, wanted)

    def adopt(self, recipe: Recipe) -> None:
        """Compress this uncompressed cache in place; arguments and errors as for :meth:`compressed`."""
        _check_calibration(recipe, self.config.model_type, self.fingerprint)
        self.state.adopt(recipe, _skipped(recipe, len(self.layers)), self._facts())
        self.recipe = recipe

    def _facts(self) -> list[ModuleFacts]:
        layers = [x for x in self.layers if isinstance(x, CacheLayer)]
        return [module_facts(x.module) for x in sorted(layers, key=lambda x: x.place)]

    def report(self) -> CacheReport:
        """What is held, by layer, in entries and bytes of live tensors; and what was done."""
        return cache_report(self)

    def check_integrity(self) -> None:
        """State the store's conservation law for every layer that shares its pages with nobody.

        Raises:
            CacheStateError: pages are lost or owned twice.
        """
        for layer in self.state.layers:
            if layer.store is not None and layer.store.pool.stores == 1:
                layer.store.check_integrity()

    def __repr__(self) -> str:
        return f"Cache({self.recipe}; {self.state.columns.length} tokens seen, {self.state.held} bytes held)"


def _copied(layer: Any) -> Any:
    """An independent copy of a layer of transformers' own (its tensors are replaced, not written, on update)."""
    import copy

    return copy.deepcopy(layer)


def resolve(recipe: str | Recipe, budget: int | str | Budget | None, options: dict[str, Any]) -> Recipe:
    """The recipe that a method's name and its options, or a recipe and a budget, stand for.

    Raises:
        RecipeError: it is neither, or comes with options of its own.
    """
    if isinstance(recipe, str):
        return method(recipe, budget=budget, **options)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"a recipe is a method's name or a kvthrift.Recipe, not {type(recipe).__name__}.")
    if options:
        raise RecipeError(
            f"options {', '.join(options)} go with a method's name; this recipe is complete. Change it with "
            "with_options()."
        )
    return recipe if budget is None else recipe.with_options(budget=Budget.parse(budget))


def _check_calibration(recipe: Recipe, model_type: str, fingerprint: str) -> None:
    for part in recipe.parts:
        if part.model and part.model != fingerprint:
            raise ModelMismatchError(
                f"recipe {recipe.name}: {part.kind} {part.name!r} was calibrated for the model with fingerprint "
                f"{part.model}, but this {model_type} has {fingerprint}, so its numbers mean nothing here. Calibrate "
                "for this model (kvthrift calibrate) and give that file."
            )


def _skipped(recipe: Recipe, layers: int) -> set[int]:
    wrong = [number for number in recipe.skip if not -layers <= number < layers]
    if wrong:
        raise RecipeError(f"skip={wrong} names layers that a model of {layers} layers does not have.")
    return {number % layers for number in recipe.skip}


__all__ = ["Cache", "CacheLayer"]
