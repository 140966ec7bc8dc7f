"""From a text and a question to token ids, knowing where the question begins. Knows nothing of caches."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvthrift.errors import ContextError, UnsupportedModelError

SEAM_TOKENS = 4  # a cut text may tokenize otherwise at its ends


@dataclass(frozen=True)
class Prompt:
    """A text followed by a question.

    Attributes:
        ids: ``[1, T]``.
        before_question: how many of them hold nothing of the question; the rest is all that comes after.
        context_tokens: tokens of the text alone, without what a chat template puts around it.
    """

    ids: Tensor
    before_question: int
    context_tokens: int

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.ids.shape[1]


def build_prompt(tokenizer: PreTrainedTokenizerBase, context: str, question: str) -> Prompt:
    """One message with the context and then the question, in the tokenizer's chat template where it has one.

    Raises:
        ContextError: the context or the question is empty.
        UnsupportedModelError: the template rewrites the message, so that the question cannot be found in it.
    """
    check_asked(context, question)
    context, question = context.strip(), question.strip()
    message = f"{context}\n\n{question}"
    templated = bool(tokenizer.chat_template)
    text = _conversation(tokenizer, message) if templated else f"{message}\n"
    start = text.find(message)
    if start < 0:
        raise UnsupportedModelError(
            "the chat template of this model rewrites the message, so the place where the question begins is not "
            "known. Use a model whose template quotes it."
        )
    ids = tokenize(tokenizer, text, special=not templated)
    head = tokenize(tokenizer, text[: start + len(message) - len(question)], special=not templated)
    return Prompt(torch.tensor([ids]), _shared(ids, head), len(tokenize(tokenizer, context)))


def check_asked(context: str, question: str) -> None:
    """Refuse an empty context or question.

    Raises:
        ContextError: naming the one that is empty.
    """
    for name, text in (("context", context), ("question", question)):
        if not text.strip():
            raise ContextError(f"the {name} is empty, so there is nothing to ask. Give another with --{name}.")


def cut(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> str:
    """The first ``tokens`` tokens of a text."""
    if not tokenizer.is_fast:
        return str(tokenizer.decode(tokenize(tokenizer, text)[:tokens]))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [stop for _, stop in encoded["offset_mapping"][:tokens]]
    return text[: max(ends, default=0)]


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False) -> list[int]:
    """Token ids of a text, however long."""
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def position_limit(model: PreTrainedModel) -> int | None:
    """Tokens the model has positions for, where it says so."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, new_tokens: int) -> int:
    """Tokens of a text for which the model has positions, with question, template and answer around it."""
    limit = position_limit(model)
    if limit is None:
        return sys.maxsize
    around = build_prompt(tokenizer, "x", question).length
    return max(limit - around - new_tokens - SEAM_TOKENS, 1)


def check_fits(model: PreTrainedModel, prompt: Prompt, new_tokens: int) -> None:
    """Refuse a prompt that leaves the model no positions for its answer.

    Raises:
        ContextError: with the numbers, and how much of the text would fit.
    """
    limit = position_limit(model)
    if limit is None or prompt.length + new_tokens <= limit:
        return
    room = max(limit - new_tokens - (prompt.length - prompt.context_tokens), 0)
    raise ContextError(
        f"the prompt has {prompt.length} tokens and up to {new_tokens} are to follow, but the model reads at most "
        f"{limit}; beyond that its positions mean nothing. Give --tokens {room} or less, or a model that reads more."
    )


def _conversation(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    turns = [{"role": "user", "content": message}]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def _shared(ids: list[int], head: list[int]) -> int:
    """Leading ids in common: a token that would straddle the end of ``head`` is left to what follows."""
    count = 0
    for ours, theirs in zip(ids, head, strict=False):
        if ours != theirs:
            break
        count += 1
    return count
