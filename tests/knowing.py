"""Random models that pass needle tests: they say every token of the answer, and look where they look."""

from __future__ import annotations

from typing import Any

import pytest
from tests.models import VOCABULARY
from transformers import PreTrainedModel

from kvthrift.calibrate import retrieval
from kvthrift.calibrate.heads import Observation, Observe
from kvthrift.integrations.transformers import calibrate, measuring


class Letters:
    """A tokenizer with one token a character, and one that begins every text."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        ids = [2 + ord(letter) % (VOCABULARY - 2) for letter in text]
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}


def know(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every model that is measured say what a model that found the needle would say."""
    plain = calibrate.observer

    def observer(model: PreTrainedModel) -> Observe:
        def observe(ids: tuple[int, ...], window: int) -> Observation:
            seen = plain(model)(ids, window)
            return Observation((*ids[len(ids) - window + 1 :], -1), seen.rows)

        return observe

    monkeypatch.setattr(calibrate, "observer", observer)


class Spelling(Letters):
    """Letters that can be read back as one word each."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every model say the answer of a needle test first, and look where it looks."""
    plain = measuring.continuer

    def continuer(model: Any) -> retrieval.Continue:
        def go_on(ids: tuple[int, ...], window: int, most: int) -> retrieval.Continuation:
            seen = plain(model)(ids, window, most)
            spoken = "".join(chr(token - 2) for token in ids[1:] if token >= 2)
            asked = spoken.rpartition("\nAnswer: ")[2]
            asked = asked[: asked.index(" is") + 3] if " is" in asked else ""
            begin = spoken.index(asked) + len(asked) + 1 if asked else 0
            answer = ids[begin : begin + len(seen.said)]
            return retrieval.Continuation((*answer, *seen.said[len(answer) :]), seen.layers)

        return go_on

    monkeypatch.setattr(measuring, "continuer", continuer)
