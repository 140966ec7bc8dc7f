"""``kvthrift.generate``: transformers' ``generate`` with its decoding loop over recorded steps.

Everything around the loop (generation config, logits processors, stopping criteria, streamers) stays transformers' own:
the loop is handed to it by ``custom_generate=``, its public place for one.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from functools import cache as once
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from kvthrift.errors import OptionError
from kvthrift.integrations.transformers.assisted import AssistedLoop
from kvthrift.integrations.transformers.cache import Cache
from kvthrift.integrations.transformers.delimiters import delimiter_ids
from kvthrift.integrations.transformers.graph import Fusing, GraphSteps, GraphUnavailableError, obstacle
from kvthrift.integrations.transformers.reading import read_on

_LOG = logging.getLogger("kvthrift")
_MOST_ROOM = 512  # steps whose pages are taken ahead
_WORTH = 4  # steps below which recording costs more than it saves


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: Cache,
    *,
    graph: bool = True,
    compiled: Fusing = False,
    streamer: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    delimiters: Collection[int] | None = None,
    **kwargs: Any,
) -> Any:
    """``model.generate`` with a kvthrift cache, each decode step a CUDA graph where that can be.

    Greedy and sampled decoding, any batch, padding to the left, logits processors, stopping criteria and streamers as
    in transformers. Where a step cannot be recorded (no GPU, layers that keep transformers' own cache, a model that
    asks the host within its step), it runs as usual, and one line of the log says why.

    Args:
        model: a causal LM loaded with ``attn_implementation="kvthrift"``.
        input_ids: ``[B, T]``, what the cache holds already included.
        cache: empty, or from :func:`kvthrift.prefill`, or a fork.
        graph: record steps at all.
        compiled: fuse the model's elementwise operations with ``torch.compile`` before recording: slow once, faster
            ever after. Or the name of one of its modes, such as ``"max-autotune-no-cudagraphs"``, or its options by
            name, with ``mode`` among them if need be. For 33 to 64 sequences the products of one input, such as
            queries, keys and values, are then one launch, unless the options have ``joined=False``.
        streamer: gets each token as it comes.
        tokenizer: the model's; recipes that look at the text's segments (``sablock``) find its punctuation with it. It
            is handed on to ``model.generate``, too.
        delimiters: ids of tokens that end a segment, instead of those a tokenizer finds.
        kwargs: as for ``model.generate``. With ``assistant_model=`` or ``prompt_lookup_num_tokens=`` the tokens of one
            sequence are guessed and checked greedily, at most 15 a pass, kernel by kernel; with ``every=`` compression
            then waits for the end of a pass.

    Returns:
        What ``model.generate`` returns.

    Raises:
        OptionError: beams or another mode whose loop is not this one.
        ContextError: the cache holds all of ``input_ids`` already.
        MissingSignalError: the recipe looks at segments, and neither ``tokenizer`` nor ``delimiters`` is given.
    """
    if not isinstance(cache, Cache):
        raise OptionError(f"cache is a {type(cache).__name__}; kvthrift.generate takes a kvthrift.Cache.")
    for name in ("num_beams", "num_return_sequences"):
        if (kwargs.get(name) or 1) != 1:
            raise OptionError(
                f"{name}={kwargs[name]} has a loop of its own: call model.generate, which takes the cache."
            )
    if kwargs.get("custom_generate") is not None:
        raise OptionError("custom_generate= has a loop of its own: call model.generate, which takes the cache.")
    assistant, lookup = (kwargs.pop(name, None) for name in ("assistant_model", "prompt_lookup_num_tokens"))
    config = kwargs.get("generation_config")
    lookup = lookup or getattr(config, "prompt_lookup_num_tokens", None)
    if delimiters is None and tokenizer is not None and cache.state.observes.segments:
        delimiters = delimiter_ids(tokenizer)
    loop: Any = _Loop(graph=graph, compiled=compiled, streamer=streamer, delimiters=delimiters)
    if assistant is not None or lookup is not None:
        loop = AssistedLoop(assistant, lookup, streamer, delimiters)
    return model.generate(  # type: ignore[operator]
        input_ids,
        past_key_values=cache,
        custom_generate=loop,
        streamer=streamer,
        tokenizer=tokenizer,
        **kwargs,
    )


@once
def _say_why(reason: str) -> None:
    _LOG.warning("decode steps run kernel by kernel, not as a graph: %s.", reason)


class _Loop:
    """Greedy or sampled decoding, a token a step."""

    def __init__(
        self, *, graph: bool, compiled: Fusing, streamer: Any, delimiters: Collection[int] | None = None
    ) -> None:
        self.graph, self.compiled, self.streamer, self.delimiters = graph, compiled, streamer, delimiters
        self.steps: GraphSteps | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        cache: Cache = kwargs["past_key_values"]
        if generation_config.num_beams != 1:
            raise OptionError("the generation config asks for beams: call model.generate, which takes the cache.")
        mask: Tensor | None = kwargs.get("attention_mask")
        pad = _pad_token(generation_config)
        unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        most = stopping_criteria.max_length or input_ids.shape[1] + _MOST_ROOM
        cache.tell(input_ids, delimiters=self.delimiters, attention_mask=mask)
        logits = read_on(model, input_ids, mask, cache)[:, -1]
        kept: tuple[list[Tensor], list[Tensor]] = ([], [])
        try:
            while True:
                raw = logits.to(torch.float32, copy=True)
                scores: Tensor = logits_processor(input_ids, raw)  # type: ignore[arg-type]
                if generation_config.output_scores:
                    kept[0].append(scores.clone())
                if generation_config.output_logits:
                    kept[1].append(raw)
                if generation_config.do_sample:
                    tokens = torch.multinomial(scores.softmax(dim=-1), num_samples=1)[:, 0]
                else:
                    tokens = scores.argmax(dim=-1)
                tokens = torch.where(unfinished, tokens, pad)
                input_ids = torch.cat((input_ids, tokens[:, None]), dim=1)
                if mask is not None:
                    mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
                if self.streamer is not None:
                    self.streamer.put(tokens.cpu())
                unfinished = unfinished & ~stopping_criteria(input_ids, scores)
                if not bool(unfinished.any()):
                    break
                logits = self._step(model, cache, input_ids, mask, most - input_ids.shape[1])
        finally:
            self._settle()
        if self.streamer is not None:
            self.streamer.end()
        if not generation_config.return_dict_in_generate:
            return input_ids
        return GenerateDecoderOnlyOutput(
            sequences=input_ids,  # type: ignore[arg-type]
            scores=tuple(kept[0]) if generation_config.output_scores else None,  # type: ignore[arg-type]
            logits=tuple(kept[1]) if generation_config.output_logits else None,  # type: ignore[arg-type]
            past_key_values=cache,
        )

    def _step(self, model: PreTrainedModel, cache: Cache, input_ids: Tensor, mask: Tensor | None, left: int) -> Tensor:
        """Logits ``[B, vocabulary]`` after the newest token; ``left`` more steps may follow this one."""
        if self.steps is not None and not self.steps.left:
            self._settle()
        if self.steps is None and self.graph:
            due = cache.state.until_due
            room = min(left + 1, _MOST_ROOM, _MOST_ROOM if due is None else due)
            if room >= _WORTH:
                self._record(model, cache, room)
        if self.steps is not None:
            return self.steps.step(input_ids[:, -1])
        if cache.recipe.trigger.every is not None:
            cache.tell(input_ids, delimiters=self.delimiters, attention_mask=mask)
        return read_on(model, input_ids, mask, cache)[:, -1]

    def _record(self, model: PreTrainedModel, cache: Cache, room: int) -> None:
        why = obstacle(model, cache)
        if why is None:
            try:
                self.steps = GraphSteps(model, cache, room, compiled=self.compiled)
                return
            except GraphUnavailableError as error:
                why = str(error)
        self.graph = False
        _say_why(why)

    def _settle(self) -> None:
        if self.steps is not None:
            self.steps.finish()
            self.steps = None


def _pad_token(config: GenerationConfig) -> int:
    """What finished sequences go on with."""
    for token in (config.pad_token_id, config.eos_token_id):
        if token is not None:
            return int(token[0] if isinstance(token, list) else token)
    return 0
