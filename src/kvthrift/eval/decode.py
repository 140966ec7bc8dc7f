"""Reading a prompt and answering, one forward pass a token, with the logits kept: freely, or along another's answer.

Knows models and caches; nothing of samples, scores or arms.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvthrift.eval.metrics.physics import Ints
from kvthrift.eval.probe import peaks, synchronize, watching
from kvthrift.integrations.transformers.cache import Cache
from kvthrift.integrations.transformers.decode import end_tokens
from kvthrift.integrations.transformers.second_pass import finish, start
from kvthrift.recipe import Recipe


@dataclass(frozen=True)
class Read:
    """A cache that a text was read into, the logits ``[V]`` behind its last token, and the seconds it took."""

    cache: Cache
    logits: Tensor
    seconds: float


def read(
    model: PreTrainedModel,
    ids: Sequence[int],
    recipe: Recipe,
    *,
    page: int,
    observe: Sequence[Recipe] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Read:
    """Read a text in one pass, compressed behind it; what comes later is kept as it is.

    Recipes that look twice have it fed once more, asked for in the words of ``tokenizer`` if there is one.
    """
    cache = start(model.config, recipe, page=page, observe=observe)
    given = torch.tensor([list(ids)], device=model.device)
    cache.tell(given, tokenizer=tokenizer)
    synchronize(model.device)
    began = perf_counter()
    logits = feed(model, cache, ids)
    finish(model, cache, given, recipe, tokenizer=tokenizer)
    synchronize(model.device)
    seconds = perf_counter() - began
    cache.compact()
    return Read(cache, logits, seconds)


def feed(model: PreTrainedModel, cache: Cache, ids: Sequence[int]) -> Tensor:
    """Feed ids in one pass; logits ``[V]`` behind the last."""
    given = torch.tensor([list(ids)], device=model.device)
    with torch.inference_mode():
        out = model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: Tensor = out.logits[0, -1]
    return logits


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer: the model's and the tokenizer's."""
    own = tokenizer.eos_token_id
    return frozenset(end_tokens(model) | ({own} if isinstance(own, int) else set()))


@dataclass(frozen=True)
class Answer:
    """Tokens in order, the end token included if one came; ``cut`` if none came before the limit."""

    tokens: tuple[int, ...]
    cut: bool


@dataclass
class Decoder:
    """One cache, decoded from step by step.

    Attributes:
        logits: what each token so far was drawn from, ``[V]`` each, the first of them from the prompt.
        keeps: whether all of them are kept; else only the last.
        watched: whether it is kept where heads look at the first step.
        seconds: of each step.
        looks: the position each head looks at most at the first step, ``[HG]`` a layer.
        quiet: steps before a fork began to share pages, which slows later ones; None if none did.
    """

    model: PreTrainedModel
    cache: Cache
    logits: list[Tensor]
    keeps: bool = True
    seconds: list[float] = field(default_factory=list)
    looks: list[Ints] = field(default_factory=list)
    quiet: int | None = None
    watched: bool = True

    def step(self, token: int) -> None:
        """Feed a token; its successor's logits are the last of ``logits`` then."""
        looking = self.keeps and self.watched and not self.seconds
        with watching(self.cache) if looking else nullcontext():
            began = perf_counter()
            found = feed(self.model, self.cache, [token])
            synchronize(self.model.device)
            self.seconds.append(perf_counter() - began)
            if looking:
                self.looks = peaks(self.cache)
        self.logits = [*self.logits, found] if self.keeps else [found]

    @property
    def quiet_seconds(self) -> list[float]:
        """Of the steps that shared pages with nobody; of all where there are none."""
        return self.seconds[: self.quiet] or self.seconds

    def table(self) -> Tensor:
        """All logits so far, ``[S, V]``."""
        return torch.stack(self.logits)


def answer(decoder: Decoder, limit: int, ends: frozenset[int]) -> Answer:
    """The likeliest token, again and again, until an end token or ``limit`` tokens."""
    tokens: list[int] = []
    while True:
        tokens.append(int(decoder.logits[-1].argmax()))
        if tokens[-1] in ends or len(tokens) >= limit:
            return Answer(tuple(tokens), tokens[-1] not in ends)
        decoder.step(tokens[-1])


def follow(decoder: Decoder, reference: Answer, limit: int, ends: frozenset[int]) -> Answer:
    """Go along a reference's tokens to their end, and give back what would have been said without it.

    Both are one up to the first token that is not the likeliest. The rest of the free answer is said from there, by
    going back (or by a fork, where cropping leaves a trace), so that it parts from the reference at the first mismatch.
    """
    parted: int | None = None
    fork: Decoder | None = None
    for step, token in enumerate(reference.tokens):
        logits = decoder.logits[-1].float()
        if parted is None and bool(logits[token] < logits.max()):
            parted = step
            fork = None if decoder.cache.is_croppable else _fork(decoder)
        if step + 1 < len(reference.tokens):
            decoder.step(token)
    if parted is None:
        return reference
    rest = answer(fork or _back(decoder, parted), limit - parted, ends)
    return Answer(reference.tokens[:parted] + rest.tokens, rest.cut)


def _fork(decoder: Decoder) -> Decoder:
    decoder.quiet = len(decoder.seconds)
    return Decoder(decoder.model, decoder.cache.fork(), decoder.logits[-1:], keeps=False)


def _back(decoder: Decoder, step: int) -> Decoder:
    """The decoder's cache as it was before ``step``; the decoder itself must not step any more."""
    decoder.cache.crop(step - len(decoder.seconds))
    return Decoder(decoder.model, decoder.cache, [decoder.logits[step]], keeps=False)


def all_at_once(decoder: Decoder, tokens: tuple[int, ...]) -> Tensor | None:
    """The logits ``[S, V]`` of an answer just decoded, read again in one pass instead of token by token.

    Another shape of the same computation: how far it departs is the noise of the arithmetic. None where the cache
    cannot be cropped without a trace.
    """
    if not decoder.cache.is_croppable:
        return None
    first = decoder.logits[0][None]
    if len(tokens) == 1:
        return first
    decoder.cache.crop(1 - len(tokens))
    given = torch.tensor([tokens[:-1]], device=decoder.model.device)
    with torch.inference_mode():
        out = decoder.model(input_ids=given, past_key_values=decoder.cache, use_cache=True)
    return torch.cat((first, out.logits[0]))
