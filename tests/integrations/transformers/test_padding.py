"""Padding is not there: a row of a padded batch keeps, says and costs what it does alone."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from tests.fitted import DELIMITERS, fitted
from tests.models import text, tiny
from tests.reading import TWICE
from torch import Tensor

import kvthrift

Side = Literal["left", "right"]
LENGTHS = (40, 97, 150, 17)  # longer and shorter than budget and windows
BUDGET = 48
MODELS = ("llama", "gemma3")


def rows() -> list[Tensor]:
    return [text(1, length, seed=index) for index, length in enumerate(LENGTHS)]


def padded(parts: list[Tensor], side: Side) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[B, longest]``."""
    longest = max(part.shape[1] for part in parts)
    ids, mask = torch.zeros(len(parts), longest, dtype=torch.long), torch.zeros(len(parts), longest)
    for b, part in enumerate(parts):
        place = slice(-part.shape[1], None) if side == "left" else slice(0, part.shape[1])
        ids[b, place], mask[b, place] = part[0], 1
    return ids, mask.long()


@torch.inference_mode()
def read(name: str, past: kvthrift.Cache, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    extra = {}
    if mask is not None:
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        extra = {"attention_mask": mask, "position_ids": positions}
    logits: Tensor = tiny(name)(input_ids=ids, past_key_values=past, use_cache=True, **extra).logits
    return logits


def recipe(method: str) -> kvthrift.Recipe:
    if method == "full":
        return kvthrift.method(method)
    return fitted(kvthrift.method(method, budget=BUDGET))


def positions(past: kvthrift.Cache, layer: int, row: int) -> list[list[int]]:
    store = past.state.layers[layer].store
    assert store is not None
    held, lengths = store.positions()[row], store.lengths[row]
    return [held[h, : lengths[h]].tolist() for h in range(len(lengths))]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [name for name in kvthrift.methods() if name not in TWICE])
def test_a_row_keeps_and_says_what_it_does_alone(method: str, side: Side) -> None:
    parts = rows()
    ids, mask = padded(parts, side)
    more = [text(1, 3, seed=10 + index) for index in range(len(parts))]
    config = tiny("llama").config
    together = kvthrift.Cache(config, recipe(method), page=16)
    together.tell(ids, delimiters=DELIMITERS, attention_mask=mask)
    first = read("llama", together, ids, mask)
    grown = torch.cat((mask, torch.ones(len(parts), 3, dtype=torch.long)), dim=1)
    held = [[positions(together, layer, b) for layer in range(2)] for b in range(len(parts))]
    turn = read("llama", together, torch.cat(more), grown)
    grown = torch.cat((grown, torch.ones(len(parts), 1, dtype=torch.long)), dim=1)
    step = read("llama", together, torch.full((len(parts), 1), 7), grown)
    together.check_integrity()
    for b, part in enumerate(parts):
        alone = kvthrift.Cache(config, recipe(method), page=16)
        alone.tell(part, delimiters=DELIMITERS)
        expected = read("llama", alone, part)
        assert held[b] == [positions(alone, layer, 0) for layer in range(2)]
        close(first[b, mask[b].bool()], expected[0])
        close(turn[b], read("llama", alone, more[b])[0])
        close(step[b], read("llama", alone, torch.full((1, 1), 7))[0])


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=3e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_entries(side: Side) -> None:
    ids, mask = padded(rows(), side)
    past = kvthrift.Cache(tiny("llama").config)
    read("llama", past, ids, mask)
    report = past.report()
    assert report.tokens == LENGTHS
    assert report.entries == report.full_entries == sum(LENGTHS) * 2 * 2
    for layer in past.state.layers:
        assert layer.store is not None
        np.testing.assert_array_equal(layer.store.lengths, np.repeat(np.array(LENGTHS)[:, None], 2, axis=1))


@pytest.mark.parametrize("method", ["full", "snapkv", "lava", "h2o"])
@pytest.mark.parametrize("name", MODELS)
def test_generate_with_left_padding_is_generate_row_by_row(name: str, method: str) -> None:
    parts, model = rows(), tiny(name)
    ids, mask = padded(parts, "left")

    def answer(ids: Tensor, mask: Tensor) -> Tensor:
        past = kvthrift.Cache(model.config, recipe(method))
        made: Tensor = model.generate(  # type: ignore[operator]
            ids, attention_mask=mask, past_key_values=past, max_new_tokens=12, do_sample=False
        )
        return made[:, -12:]

    together = answer(ids, mask)
    alone = torch.cat([answer(part, torch.ones_like(part)) for part in parts])
    assert torch.equal(together, alone)


def test_a_turn_may_be_padded_too() -> None:
    """Second turns of different lengths, padded on either side, on top of a padded prompt."""
    parts = rows()
    ids, mask = padded(parts, "left")
    turns = [text(1, length, seed=20 + length) for length in (50, 3, 33, 64)]
    more, more_mask = padded(turns, "right")
    config = tiny("llama").config
    together = kvthrift.Cache(config, recipe("snapkv"), page=16)
    read("llama", together, ids, mask)
    grown = torch.cat((mask, more_mask), dim=1)
    turn = read("llama", together, more, grown)
    last = read("llama", together, torch.full((4, 1), 9), torch.cat((grown, torch.ones(4, 1).long()), dim=1))
    for b, (part, own) in enumerate(zip(parts, turns, strict=True)):
        if own.shape[1] < 32:  # alone, a few tokens are taken for speculation and not compressed
            continue
        alone = kvthrift.Cache(config, recipe("snapkv"), page=16)
        read("llama", alone, part)
        close(turn[b, more_mask[b].bool()], read("llama", alone, own)[0])
        close(last[b], read("llama", alone, torch.full((1, 1), 9))[0])
        assert positions(together, 0, b) == positions(alone, 0, 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prefill_in_chunks_reads_a_padded_batch(side: Side) -> None:
    """Some chunks are all padding for some rows."""
    parts, model = rows(), tiny("llama")
    ids, mask = padded(parts, side)
    past = kvthrift.prefill(model, ids, attention_mask=mask, chunk=16)
    assert past.report().tokens == LENGTHS
    grown = torch.cat((mask, torch.ones(4, 1, dtype=torch.long)), dim=1)
    step = read("llama", past, torch.full((4, 1), 7), grown)
    for b, part in enumerate(parts):
        alone = kvthrift.prefill(model, part)
        close(step[b], read("llama", alone, torch.full((1, 1), 7))[0])


@pytest.mark.parametrize("method", ["snapkv", "adakv", "h2o", "expected_attention", "streamingllm", "tova"])
def test_a_short_row_is_done_when_its_chunks_are(method: str) -> None:
    """Right padding fills whole chunks: they neither age a row's window nor cut it again."""
    parts, model = [text(1, length, seed=length) for length in (160, 64, 96)], tiny("llama")
    ids, mask = padded(parts, "right")
    together = kvthrift.prefill(model, ids, recipe(method), attention_mask=mask, chunk=32)
    together.check_integrity()
    for b, part in enumerate(parts):
        alone = kvthrift.prefill(model, part, recipe(method), chunk=32)
        assert [positions(together, n, b) for n in range(2)] == [positions(alone, n, 0) for n in range(2)]
