"""Reading a context twice: the repetition is fed through the unmodified model, behind the whole uncompressed cache.

Nothing of what is fed is kept; only what it attends to is. Which tokens are fed is decided here, what is gathered by
:class:`kvthrift.runtime.second_pass.SecondLook`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvthrift.core import SecondPass
from kvthrift.errors import ContextError, MaskError
from kvthrift.integrations.transformers.cache import Cache
from kvthrift.integrations.transformers.facts import attention_modules
from kvthrift.integrations.transformers.relative import RelativeLook
from kvthrift.methods import method
from kvthrift.recipe import Recipe
from kvthrift.runtime.second_pass import SecondLook

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with "


def start(config: PreTrainedConfig, recipe: Recipe, *, page: int = 64, observe: Sequence[str | Recipe] = ()) -> Cache:
    """A cache to read a context into: for a recipe that looks twice, one that keeps everything until :func:`finish`."""
    if recipe.compresses and recipe.needs.second_pass:
        Cache(config, recipe, page=page)  # what cannot be honoured is refused before anything is read
        return Cache(config, method("full"), page=page, observe=[recipe, *observe])
    return Cache(config, recipe, page=page, observe=observe)


def finish(
    model: PreTrainedModel,
    cache: Cache,
    input_ids: Tensor,
    recipe: Recipe,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Look twice at a context that was just read into a cache of :func:`start`, if a recipe needs that, and compress.

    Args:
        input_ids, attention_mask: ``[B, T]`` as they were read.
        tokenizer: puts the request to repeat into words; None feeds none.

    Raises:
        ContextError: the model has not enough positions for context and repetition.
        MaskError: sequences end in padding, and some layers keep transformers' own sliding window.
    """
    for wanted in cache.state.observes.second_pass:
        look_again(model, cache, input_ids, wanted, attention_mask=attention_mask, tokenizer=tokenizer)
    if cache.recipe != recipe:
        cache.adopt(recipe)
    cache.state.sealed = True


def look_again(
    model: PreTrainedModel,
    cache: Cache,
    input_ids: Tensor,
    wanted: SecondPass,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Feed a context again, and note in every layer of its cache what that attends to.

    Sequences of equal length go together; of a padded batch each goes by itself.

    Args:
        cache: holds the whole context and nothing else; its entries and its length stay as they are.
        input_ids, attention_mask: ``[B, T]`` as they were read.
        wanted: what to feed and what to gather.
        tokenizer: see :func:`finish`.
    """
    state, batch = cache.state, len(input_ids)
    history = state.columns.history
    if history is not None and not history[:, -1].all() and len(cache.layers) > len(state.layers):
        raise MaskError(
            "the batch is padded on the right, where the layers that keep transformers' own sliding window have lost "
            "real tokens to padding, so a second pass would not see what the first did. Pad on the left."
        )
    words = Words.of(wanted, tokenizer)
    lengths = state.columns.seen(batch)
    parts = [[b] for b in range(batch)] if state.columns.padded else [list(range(batch))]
    boards = {layer.number: torch.zeros(0) for layer in state.layers}
    with state.meter.compressing(input_ids.device), torch.no_grad():
        for rows in parts:
            ids = input_ids[rows]
            if attention_mask is not None and state.columns.padded:
                ids = ids[attention_mask[rows].bool().to(ids.device)][None]
            fork = cache.fork()
            if state.columns.padded:
                fork.batch_select_indices(torch.tensor(rows))
            look = _look(model, wanted, int(lengths[rows[0]]))
            for tokens in _passes(look, ids, words):
                most = _feed(model, fork, look, tokens)
                state.meter.saw(state.held + max(most, look.bytes))
            for place, layer in enumerate(fork.state.layers):
                found = look.scores(place, layer)
                board = boards[layer.number]
                if not board.numel():
                    longest = int(lengths.max())
                    board = boards[layer.number] = found.new_zeros((batch, found.shape[1], longest))
                board[rows, :, : found.shape[-1]] = found
    for layer in state.layers:
        layer.second_pass[wanted] = boards[layer.number]


def _look(model: PreTrainedModel, wanted: SecondPass, length: int) -> SecondLook:
    return RelativeLook(wanted, length, attention_modules(model)) if wanted.relative else SecondLook(wanted, length)


def _passes(look: SecondLook, ids: Tensor, words: Words) -> Iterator[Tensor]:
    """The tokens ``[B, N]`` of each pass; ``look`` is told which part of the context they repeat."""
    if look.wanted.probe:
        yield _row(look.wanted.probe, ids)
        return
    length, first = ids.shape[1], min(look.wanted.sinks, ids.shape[1])
    chunk = look.wanted.chunk or max(length - first, 1)
    for begin in range(first, length, chunk):
        look.start, look.stop = begin, min(begin + chunk, length)
        quote = ids[:, max(begin - look.wanted.overlap, 0) : begin] if begin > first and words.later else ids[:, :0]
        said = [words.first] if begin == first else [words.later]
        parts = [*(_row(x, ids) for x in said), quote, _row(words.reply, ids), ids[:, look.start : look.stop]]
        yield torch.cat(parts, dim=1)


def _row(tokens: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(tokens, dtype=like.dtype, device=like.device).expand(len(like), len(tokens))


def _feed(model: PreTrainedModel, cache: Cache, look: SecondLook, tokens: Tensor) -> int:
    """One pass behind the whole context, through a fork that is thrown away; bytes that it was looked at with."""
    check_length(model, look.length + tokens.shape[1])
    extra: dict[str, Any] = {}
    fork = cache.fork()
    if fork.state.columns.history is not None:  # one sequence of a padded batch: its padding is still a column
        known = torch.from_numpy(fork.state.columns.history).to(tokens.device)
        extra["attention_mask"] = torch.cat((known, torch.ones_like(tokens, dtype=torch.bool)), dim=1).long()
        extra["position_ids"] = look.length + torch.arange(tokens.shape[1], device=tokens.device)[None]
    fork.state.look = look
    if isinstance(look, RelativeLook):
        extra["output_hidden_states"] = True
    told = model(input_ids=tokens, past_key_values=fork, use_cache=True, logits_to_keep=1, **extra)
    most = look.bytes
    if isinstance(look, RelativeLook):
        hidden = told.hidden_states or ()
        most += sum(t.numel() * t.element_size() for t in hidden)
        look.weigh(hidden)
    return most


@dataclass(frozen=True)
class Words:
    """Token ids of the request to repeat: before the first chunk, before later ones, and between request and chunk."""

    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    reply: tuple[int, ...] = ()

    @classmethod
    def of(cls, wanted: SecondPass, tokenizer: PreTrainedTokenizerBase | None) -> Words:
        """The recipe's own ids; else the default words of a tokenizer; else none."""
        if not wanted.instructed:
            return cls()
        if wanted.first or wanted.later or wanted.reply:
            return cls(wanted.first, wanted.later, wanted.reply)
        if tokenizer is None:
            return cls()
        first, later, reply = (_ids(tokenizer, text) for text in (FIRST, LATER, _reply(tokenizer)))
        return cls(first, later, reply)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _reply(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer's chat form puts between a user's words and the answer; empty if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return "\n\n"
    said = "a question"
    turns = [{"role": "user", "content": said}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return str(whole).rpartition(said)[2]


def check_length(model: PreTrainedModel, length: int) -> None:
    """Refuse more tokens than the model has positions for.

    Raises:
        ContextError: with both numbers.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise ContextError(
            f"the text has {length} tokens, but the model reads at most {limit}; beyond that its positions mean "
            "nothing. Shorten the text or use a model with a longer context."
        )
