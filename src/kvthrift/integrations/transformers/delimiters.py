"""Which tokens end a segment of a text: those that end with a punctuation mark or a line break."""

from __future__ import annotations

from functools import lru_cache

from transformers import PreTrainedTokenizerBase

MARKS = ",.;:!?\n，。；：！？、"  # noqa: RUF001


@lru_cache(maxsize=4)
def delimiter_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of a vocabulary whose text ends with one of ``MARKS``, spaces behind it aside; fused tokens count.

    The whole vocabulary is decoded, once for each tokenizer.
    """
    ids = sorted(set(tokenizer.get_vocab().values()))
    texts = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    return frozenset(token for token, text in zip(ids, texts, strict=True) if text.rstrip(" ").endswith(tuple(MARKS)))
