"""Greedy decoding in which one pass checks several guessed tokens, for ``kvthrift.generate``.

Transformers' own loop reads its first guesses together with the prompt, and reads anew what a cache holds already; so
the loop is ours here. Who guesses is transformers': a smaller model, or a look-up in the text so far.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.candidate_generator import AssistedCandidateGenerator, PromptLookupCandidateGenerator

from kvthrift.errors import OptionError
from kvthrift.integrations.transformers.cache import Cache, CacheLayer
from kvthrift.integrations.transformers.reading import read_on
from kvthrift.runtime.layer import FEW

_MOST = FEW - 1  # guesses of a pass, so that all of it is one read of the pages


class AssistedLoop:
    """The decoding loop that is handed to ``model.generate``.

    Args:
        assistant: a model with the same tokens that guesses; None looks guesses up.
        lookup: tokens to look up at a time, where there is no assistant; None for what the generation config says.
        streamer: gets tokens as they are accepted.
        delimiters: ids of tokens that end a segment of the text.
    """

    def __init__(
        self,
        assistant: PreTrainedModel | None,
        lookup: int | None,
        streamer: Any,
        delimiters: Collection[int] | None,
    ) -> None:
        self.assistant, self.lookup, self.streamer, self.delimiters = assistant, lookup, streamer, delimiters

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
        _check(input_ids, generation_config, cache)
        try:
            made = self._decode(
                model,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                cache,
                kwargs.get("attention_mask"),
            )
        finally:
            for layer in cache.layers:  # of transformers' own, which remember what they may have to go back to
                if hasattr(layer, "record_past"):
                    layer.record_past = False
        if self.streamer is not None:
            self.streamer.end()
        return made

    def _decode(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        cache: Cache,
        mask: Tensor | None,
    ) -> Tensor:
        cache.tell(input_ids, delimiters=self.delimiters, attention_mask=mask)
        guesses: Any = None
        guessed = input_ids[:, :0]  # the prompt is read alone: what guesses are behind it may be rejected
        while True:
            logits = read_on(model, torch.cat((input_ids, guessed), dim=1), mask, cache, keep=guessed.shape[1] + 1)
            ended, accepted = False, 0
            for place, row in enumerate(logits.unbind(dim=1)):
                scores: Tensor = logits_processor(input_ids, row.to(torch.float32, copy=True))  # type: ignore[arg-type]
                token = scores.argmax(dim=-1)
                input_ids = torch.cat((input_ids, token[:, None]), dim=1)
                if self.streamer is not None:
                    self.streamer.put(token.cpu())
                ended, accepted = bool(stopping_criteria(input_ids, scores).all()), place
                if ended or (place < guessed.shape[1] and not torch.equal(token, guessed[:, place])):
                    break
            if guesses is None:
                cache.activate_past_recording()  # from here on, so that a prompt is not remembered whole
            cache.crop(accepted - guessed.shape[1])
            if ended:
                return input_ids
            mask = None if mask is None else _grown(mask, input_ids.shape[1])
            if guesses is None:
                guesses = self._guesser(model, input_ids, mask, logits_processor, generation_config)
            else:
                guesses.update_candidate_strategy(input_ids, logits, accepted)
            if cache.recipe.trigger.every is not None:
                cache.tell(input_ids, delimiters=self.delimiters, attention_mask=mask)
            guessed = guesses.get_candidates(input_ids)[0].to(input_ids.device)[:, input_ids.shape[1] :][:, :_MOST]
            mask = None if mask is None else _grown(mask, input_ids.shape[1] + guessed.shape[1])

    def _guesser(
        self,
        model: PreTrainedModel,
        input_ids: Any,
        mask: Tensor | None,
        logits_processor: LogitsProcessorList,
        config: GenerationConfig,
    ) -> Any:
        if self.assistant is not None:
            known = {} if mask is None else {"attention_mask": mask}
            return AssistedCandidateGenerator(
                input_ids, self.assistant, config, known, inputs_tensor=input_ids, logits_processor=logits_processor
            )
        ends: Any = config.eos_token_id
        return PromptLookupCandidateGenerator(
            eos_token_id=None if ends is None else torch.tensor(ends, device=input_ids.device).reshape(-1),
            num_output_tokens=min(self.lookup or config.prompt_lookup_num_tokens or _MOST, _MOST),
            max_matching_ngram_size=config.max_matching_ngram_size or 2,
            max_length=config.max_length or input_ids.shape[1],
            logits_processor=logits_processor,
            vocab_size=model.config.get_text_config(decoder=True).vocab_size,
        )


def _grown(mask: Tensor, length: int) -> Tensor:
    """The mask of as many columns; new ones are real, and those of rejected guesses are gone."""
    more = max(length - mask.shape[1], 0)
    return torch.cat((mask, mask.new_ones(len(mask), more)), dim=1)[:, :length]


def _check(input_ids: Tensor, config: GenerationConfig, cache: Cache) -> None:
    """Refuse what one pass over several guesses cannot say, or cannot take back."""
    stuck = [n for n, x in enumerate(cache.layers) if not isinstance(x, CacheLayer) and not x.is_croppable]
    for wrong, what in (
        (bool(stuck), f"layers that cannot go back (such as {stuck[0] if stuck else 0}, whose state is recurrent)"),
        (len(input_ids) != 1, f"{len(input_ids)} sequences at once"),
        (config.num_beams not in (None, 1), "beams"),
        (bool(config.do_sample), "sampling"),
        (bool(config.return_dict_in_generate), "return_dict_in_generate=True"),
    ):
        if wrong:
            raise OptionError(
                f"guessed tokens are checked for one sequence, decoded greedily, of which ids are returned; {what} "
                "cannot be had with that. Leave out assistant_model and prompt_lookup_num_tokens."
            )
