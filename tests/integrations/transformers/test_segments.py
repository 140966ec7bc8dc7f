"""The segments of a text: found by a tokenizer, told to a cache, and asked for where nobody told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.fitted import DELIMITERS
from tests.models import text, tiny
from tests.reading import held
from torch import Tensor

from kvthrift import Cache, MissingSignalError, generate, method, prefill
from kvthrift.integrations.transformers.delimiters import delimiter_ids
from kvthrift.runtime.segments import cut_segments, segment_numbers

PROMPT = 160


class Pieces:
    """A tokenizer of a few tokens."""

    words = ("a", ",", " b.", "c. ", "\n", "x\n\n", ".5", "…a", "d;", " ", "！", "?!", "'s")

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}

    def batch_decode(self, ids: list[list[int]], **_: Any) -> list[str]:
        return ["".join(self.words[token] for token in row) for row in ids]


def test_tokens_that_end_with_a_mark_end_a_segment() -> None:
    found = delimiter_ids(Pieces())  # type: ignore[arg-type]
    assert {Pieces.words[n] for n in found} == {",", " b.", "c. ", "\n", "x\n\n", "d;", "！", "?!"}


def test_a_delimiter_ends_its_segment() -> None:
    ids = torch.tensor([[1, 7, 2, 2, 7, 7, 3]])
    assert segment_numbers(ids, {7}).tolist() == [[0, 0, 1, 1, 1, 2, 3, 4]]
    assert segment_numbers(ids, ()).tolist() == [[0] * 7 + [1]]


def test_padding_belongs_to_no_segment() -> None:
    plain = [3, 7, 4, 7, 5]
    left, right = torch.tensor([[0, 7, *plain]]), torch.tensor([[*plain, 0, 7]])
    wanted = segment_numbers(torch.tensor([plain]), {7}).tolist()[0]
    for ids, mask in ((left, [[0, 0, 1, 1, 1, 1, 1]]), (right, [[1, 1, 1, 1, 1, 0, 0]])):
        found = segment_numbers(ids, {7}, torch.tensor(mask)).tolist()[0]
        assert found[:6] == wanted
        assert found[6:] == [wanted[-1]] * 2


def test_what_is_cut_off_is_text_to_come() -> None:
    numbers = segment_numbers(torch.tensor([[1, 7, 2, 7, 3]]), {7})
    assert cut_segments(numbers, 3).tolist() == [[0, 0, 1, 2]]
    assert cut_segments(numbers, 9).tolist() == numbers.tolist()
    assert cut_segments(numbers, 0).tolist() == [[0]]


def test_every_way_of_telling_keeps_the_same() -> None:
    model, ids = tiny("llama"), text(2, PROMPT)
    wanted = held(prefill(model, ids, "sablock", budget=48, delimiters=DELIMITERS))
    caches = [Cache(model.config, "sablock", budget=48) for _ in range(2)]
    generate(model, ids, caches[0], delimiters=DELIMITERS, max_new_tokens=1)
    caches[1].tell(ids, delimiters=DELIMITERS)
    model.generate(ids, past_key_values=caches[1], max_new_tokens=1)  # type: ignore[operator]
    observed = prefill(model, ids, observe=["sablock"], delimiters=DELIMITERS)
    for cache in (*caches, observed.compressed("sablock", budget=48)):
        assert held(cache) == wanted
        assert cache.state.segments is None  # given back once it is read
    assert held(prefill(model, ids, "sablock", budget=48, delimiters=())) != wanted


def test_a_tokenizer_tells_its_delimiters(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), text(1, PROMPT) % len(Pieces.words)
    pieces: Any = Pieces()
    found = prefill(model, ids, "sablock", budget=48, tokenizer=pieces)
    assert held(found) == held(prefill(model, ids, "sablock", budget=48, delimiters=delimiter_ids(pieces)))


def test_chunks_know_their_segments() -> None:
    model, ids = tiny("llama"), text(1, PROMPT)
    cache = prefill(model, ids, "sablock", budget=48, chunk=50, delimiters=DELIMITERS)
    assert [[len(head) for head in layer] for layer in held(cache)] == [[48, 48]] * 2
    cache.check_integrity()
    assert cache.state.segments is None


def plain_generate(ids: Tensor, cache: Cache) -> None:
    tiny("llama").generate(ids, past_key_values=cache, max_new_tokens=2)  # type: ignore[operator]


def test_a_plain_generate_is_refused_with_what_to_call_instead() -> None:
    model, ids = tiny("llama"), text(1, PROMPT)
    cache = Cache(model.config, "sablock", budget=48)
    with pytest.raises(MissingSignalError, match=r"kvthrift.prefill\(model, ids, recipe, tokenizer=tokenizer\)"):
        plain_generate(ids, cache)
    cache.reset()
    cache.tell(ids, delimiters=DELIMITERS)
    plain_generate(ids, cache)
    with pytest.raises(MissingSignalError, match="punctuation"):
        prefill(model, ids, "sablock", budget=48)
    with pytest.raises(MissingSignalError, match="punctuation"):
        generate(model, ids, Cache(model.config, "sablock", budget=48), max_new_tokens=2)
    with pytest.raises(MissingSignalError, match="punctuation"):
        prefill(model, ids, observe=["sablock"]).compressed("sablock", budget=48)
    with pytest.raises(MissingSignalError, match="segments of the text"):
        prefill(model, ids).compressed("sablock", budget=48)


def test_a_text_within_the_budget_needs_no_telling() -> None:
    plain_generate(text(1, 40), Cache(tiny("llama").config, "sablock", budget=48))


def test_decoding_goes_on_cutting_by_segments() -> None:
    model, ids = tiny("llama"), text(1, PROMPT)
    cache = Cache(model.config, "sablock", budget=48, every=8)
    generate(model, ids, cache, delimiters=DELIMITERS, max_new_tokens=30)
    report = cache.report()
    assert report.entries <= (48 + 8) * 4
    assert cache.state.segments is not None
    assert cache.state.held >= cache.state.segments.numel() * 4  # counted
    cache.crop(PROMPT)
    assert cache.state.segments.shape[1] == PROMPT + 1
    silent = Cache(model.config, "sablock", budget=180, every=8)
    with pytest.raises(MissingSignalError, match="punctuation"):
        model.generate(ids, past_key_values=silent, max_new_tokens=40)  # type: ignore[operator]


def test_sequences_may_be_chosen_and_forked() -> None:
    model = tiny("llama")
    cache = prefill(model, text(2, PROMPT), observe=["sablock"], delimiters=DELIMITERS)
    other = cache.fork()
    other.batch_select_indices(torch.tensor([1]))
    alone = prefill(model, text(2, PROMPT)[1:], "sablock", budget=48, delimiters=DELIMITERS)
    assert held(other.compressed("sablock", budget=48)) == held(alone)
    assert method("sablock").needs.segments
    assert "segments of the text" in str(method("sablock").needs)
