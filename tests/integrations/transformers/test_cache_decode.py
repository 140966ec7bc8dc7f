"""Compression while decoding, against the published loops written out: one token in, the worst one out."""

from __future__ import annotations

import pytest
import torch
from tests.fitted import APART
from tests.masked import Kept, MaskedModel, kept
from tests.models import text, tiny
from tests.reading import DECIDES, TWICE
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import rotate_half

import kvthrift

BATCH, PROMPT, STEPS, ROOM = 2, 70, 20, 24


@torch.inference_mode()
def read(past: kvthrift.Cache, ids: Tensor) -> Tensor:
    logits: Tensor = tiny("llama")(input_ids=ids, past_key_values=past, use_cache=True).logits
    return logits


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=3e-4, rtol=1e-4)


def grown(held: Tensor) -> Tensor:
    """One more column, held."""
    return torch.cat((held, torch.ones_like(held[..., :1])), dim=-1)


def best(scores: Tensor, held: Tensor, recent: int) -> Tensor:
    """The ``ROOM`` best of ``held [B, H, T]`` by ``scores [B, H, T]``, the newest ``recent`` among them."""
    newest = held.flip(-1).cumsum(-1).flip(-1) <= recent
    ranked = scores.masked_fill(newest, float("inf")).masked_fill(~held, float("-inf"))
    return torch.zeros_like(held).scatter_(2, ranked.topk(ROOM, dim=-1).indices, True)


def same(past: kvthrift.Cache, held: Kept) -> None:
    ours = kept(past)
    assert all(torch.equal(ours[layer], mask) for layer, mask in held.items())


def test_tova_drops_what_the_newest_token_attends_to_least() -> None:
    past, truth = kvthrift.Cache(tiny("llama").config, "tova", budget=ROOM, decode=True), MaskedModel("llama")
    ids = text(BATCH, PROMPT)
    close(read(past, ids), truth.read(ids))
    held: Kept = {layer: torch.ones(BATCH, 2, PROMPT, dtype=torch.bool) for layer in truth.seen}
    for step in range(STEPS):
        for layer, weights in truth.seen.items():
            row = weights[:, :, -1].mean(dim=1, keepdim=True)  # newest query, mean over all heads
            held[layer] = best(row.expand_as(held[layer]), held[layer], recent=1)
        token = text(BATCH, 1, seed=step)
        close(read(past, token), truth.read(token, held))
        held = {layer: grown(mask) for layer, mask in held.items()}
        same(past, held)


def test_h2o_drops_what_all_queries_so_far_attended_to_least() -> None:
    past = kvthrift.Cache(tiny("llama").config, "h2o", budget=ROOM, recent=8, decode=True)
    truth, ids = MaskedModel("llama"), text(BATCH, PROMPT)
    close(read(past, ids), truth.read(ids))
    held: Kept = {layer: torch.ones(BATCH, 2, PROMPT, dtype=torch.bool) for layer in truth.seen}
    total = {layer: torch.zeros(BATCH, 2, 0) for layer in truth.seen}
    for step in range(STEPS):
        for layer, weights in truth.seen.items():
            columns = weights.unflatten(1, (2, 2)).mean(dim=2).sum(dim=2)  # [B, H, T]
            columns[..., : total[layer].shape[-1]] += total[layer]
            total[layer] = columns
            held[layer] = best(columns, held[layer], recent=8)
        token = text(BATCH, 1, seed=step)
        close(read(past, token), truth.read(token, held))
        held = {layer: grown(mask) for layer, mask in held.items()}
        same(past, held)


def test_streamingllm_slides_its_window() -> None:
    past = kvthrift.Cache(tiny("llama").config, "streamingllm", budget=ROOM, sinks=4, decode=True)
    truth, ids = MaskedModel("llama"), text(BATCH, PROMPT)
    close(read(past, ids), truth.read(ids))
    for step in range(STEPS):
        steps = torch.arange(PROMPT + step)
        mask = ((steps < 4) | (steps >= PROMPT + step - (ROOM - 4))).expand(BATCH, 2, -1)
        token = text(BATCH, 1, seed=step)
        close(read(past, token), truth.read(token, dict.fromkeys(truth.seen, mask)))
        same(past, dict.fromkeys(truth.seen, grown(mask)))


class Restarted:
    """The paper's StreamingLLM: unrotated keys are kept and rotated by their place in the cache at every step."""

    def __init__(self, ids: Tensor) -> None:
        self.model = tiny("llama", "sdpa")
        past = DynamicCache(config=self.model.config)
        with torch.inference_mode():
            self.model(input_ids=ids, past_key_values=past)
        steps = torch.arange(ids.shape[1])
        self.keys = [self.turn(layer.keys, -steps) for layer in past.layers]
        self.values = [layer.values for layer in past.layers]

    def turn(self, keys: Tensor, steps: Tensor) -> Tensor:
        cos, sin = self.model.model.rotary_emb(keys, steps.abs()[None])  # type: ignore[operator,union-attr]
        sin = sin * steps.sign()[None, :, None]
        return keys * cos[:, None] + rotate_half(keys) * sin[:, None]

    def evict(self) -> None:
        keep = [*range(4), *range(self.keys[0].shape[2] - ROOM + 4, self.keys[0].shape[2])]
        self.keys = [keys[:, :, keep] for keys in self.keys]
        self.values = [values[:, :, keep] for values in self.values]

    def read(self, ids: Tensor) -> Tensor:
        held, length = self.keys[0].shape[2], ids.shape[1]
        past = DynamicCache(config=self.model.config)
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            past.update(self.turn(keys, torch.arange(held)), values, layer)
        places = torch.arange(held, held + length)
        with torch.inference_mode():
            logits: Tensor = self.model(input_ids=ids, past_key_values=past, position_ids=places[None]).logits
        fresh = [self.turn(layer.keys[:, :, held:], -places) for layer in past.layers]
        self.keys = [torch.cat((old, new), dim=2) for old, new in zip(self.keys, fresh, strict=True)]
        self.values = [layer.values for layer in past.layers]
        return logits


@pytest.mark.parametrize("decode", [False, True])
def test_rerotated_streamingllm_is_a_model_that_counts_places_in_the_cache(decode: bool) -> None:
    ids = text(BATCH, PROMPT)
    options = {"budget": ROOM, "sinks": 4, "rerotate": True, "decode": decode}
    past = kvthrift.Cache(tiny("llama").config, "streamingllm", **options)  # type: ignore[arg-type]
    truth = Restarted(ids)
    read(past, ids)
    truth.evict()
    for step in range(STEPS):
        token = text(BATCH, 1, seed=step)
        close(read(past, token), truth.read(token))
        if decode:
            truth.evict()
    if not decode:
        close(read(past, text(BATCH, 5)), truth.read(text(BATCH, 5)))


def test_turning_keys_matters() -> None:
    """Otherwise the test above would pass without it."""
    logits = []
    for rerotate in (True, False):
        past = kvthrift.Cache(tiny("llama").config, "streamingllm", budget=ROOM, rerotate=rerotate)
        read(past, text(BATCH, PROMPT))
        logits.append(read(past, text(BATCH, 1)))
    assert (logits[0] - logits[1]).abs().max() > 0.1


CUTTING = [name for name in kvthrift.methods() if name not in ("full", *APART, *DECIDES, *TWICE)]


@pytest.mark.parametrize("method", CUTTING)
def test_every_few_tokens_the_budget_is_met_again(method: str) -> None:
    every, room = 5, 48
    past = kvthrift.Cache(tiny("llama").config, method, budget=room, page=8, every=every)
    read(past, text(BATCH, 150))
    recent, sinks = past.recipe.protect.recent, past.recipe.protect.sinks
    compressions = past.report().compressions
    for step in range(24):
        read(past, text(BATCH, 1, seed=step))
        report = past.report()
        assert report.entries <= (room + every) * 2 * 2 * BATCH
        newest = 150 + step
        for masks in kept(past).values():
            assert masks[..., newest - recent + 1 : newest + 1].all()
            assert masks[..., :sinks].all()
    assert report.compressions >= compressions + 2 * 3
    past.check_integrity()
