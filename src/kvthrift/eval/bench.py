"""What is the same for all arms of a run: the model, its tokenizer, and the limits they set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvthrift.errors import ContextError
from kvthrift.eval.arm import Arm
from kvthrift.eval.decode import ends_of, feed, read
from kvthrift.integrations.transformers.cache import Cache

WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class PlainTokenizer:
    """A model's tokenizer as tasks see it: texts as they are, without special tokens."""

    whole: PreTrainedTokenizerBase

    @property
    def chat_template(self) -> Any:
        """The chat template, if there is one."""
        return self.whole.chat_template

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's tokenizer does."""
        return self.whole.apply_chat_template(*args, **kwargs)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text, however long."""
        return list(self.whole(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids."""
        return str(self.whole.decode(token_ids, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class Bench:
    """A model, its tokenizer, the size of a page, and what is measured beside scores and cost (see :class:`Grid`)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    page: int
    agreement: bool = True
    physics: bool = True

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer."""
        return ends_of(self.model, self.tokenizer)

    @property
    def limit(self) -> int | None:
        """Tokens the model has positions for, where it says so."""
        found = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def check_length(self, tokens: int, what: str) -> None:
        """Refuse more tokens than the model has positions for.

        Raises:
            ContextError: with both numbers.
        """
        if self.limit is not None and tokens > self.limit:
            raise ContextError(
                f"{what} takes {tokens} tokens, but the model reads at most {self.limit}; beyond that its positions "
                "mean nothing. Give a shorter length, or a model that reads more."
            )

    def check_arms(self, arms: Iterable[Arm]) -> None:
        """Refuse recipes that this model cannot have, before anything is read.

        Raises:
            UnsupportedModelError, ModelMismatchError, RecipeError: with the reason.
        """
        for arm in arms:
            Cache(self.model.config, arm.recipe, page=self.page)

    def warm_up(self, arm: Arm) -> None:
        """A short pass and a step, so that the first sample does not pay for what is set up once."""
        done = read(self.model, range(WARM_UP_TOKENS), arm.recipe, page=self.page, tokenizer=self.tokenizer)
        feed(self.model, done.cache, [0])
