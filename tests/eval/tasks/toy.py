"""A toy tokenizer that several tests import: its tokens are words."""

from __future__ import annotations


class Words:
    """A token is what stands between blanks, the blanks before it included."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.words: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        out, start = [], 0
        for end in [
            *(at for at in range(1, len(text)) if text[at].isspace() and not text[at - 1].isspace()),
            len(text),
        ]:
            out.append(self._id(text[start:end]))
            start = end
        return out

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.words[token] for token in token_ids)

    def _id(self, word: str) -> int:
        if word not in self.ids:
            self.ids[word] = len(self.words)
            self.words.append(word)
        return self.ids[word]
