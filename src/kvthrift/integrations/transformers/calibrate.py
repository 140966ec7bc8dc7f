"""Measures a transformers model for the calibrations, its attention rows read off a kvthrift cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvthrift.calibrate import Artefact
from kvthrift.calibrate.heads import Observation, Observe, Progress, Subject, calibrate_heads
from kvthrift.calibrate.needles import NeedleTests
from kvthrift.data import demo_text
from kvthrift.integrations.transformers.cache import Cache
from kvthrift.integrations.transformers.facts import (
    attention_modules,
    config_fingerprint,
    weights_fingerprint,
)
from kvthrift.integrations.transformers.prefill import check_length
from kvthrift.kernels import window_attention
from kvthrift.recipe import Recipe
from kvthrift.runtime import CacheState
from kvthrift.score import WindowAttention


def measure_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: str | Path,
    *,
    samples: int = 16,
    length: int = 1024,
    seed: int = 0,
    text: str | None = None,
    force: bool = False,
    progress: Progress = None,
) -> Artefact:
    """Measure how much every head of a model matters for retrieval, and write it to a file (2410.19258).

    Args:
        model: a causal LM loaded with ``attn_implementation="kvthrift"``.
        tokenizer: the model's.
        target: the file to write; results so far stand beside it, and a run that was cut short goes on.
        samples: needle tests to take.
        length: tokens of each.
        seed: another one makes other tests.
        text: what needles are hidden in; the shipped text by default.
        force: replace a file that is there.
        progress: told how far it is.

    Raises:
        CalibrationError: the file is there, the tests or the text are too short, or the model finds nothing.
        ContextError: the tests are longer than the model reads.
        UnsupportedModelError: an architecture that kvthrift does not compress, or another attention
            implementation.
    """
    filler = demo_text() if text is None else text
    Cache(model.config).check_attention()
    check_length(model, length)
    start = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]

    def encode(piece: str) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])

    tests = NeedleTests(encode, filler, length=length, seed=seed, start=start)
    facts = {
        "text": hashlib.sha256(filler.encode()).hexdigest()[:16],
        "dtype": str(model.dtype).partition(".")[2],
        "weights": weights_fingerprint(model.config, attention_modules(model)),
    }
    return calibrate_heads(
        observer(model), tests, subject(model), target,
        samples=samples, force=force, progress=progress, provenance=facts,
    )  # fmt: skip


def observer(model: PreTrainedModel) -> Observe:
    """A model as a function from token ids to what it says and where its heads look."""

    def observe(ids: tuple[int, ...], window: int) -> Observation:
        cache = Cache(model.config, observe=[Recipe("window", WindowAttention(window))])
        tokens = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            logits = model(input_ids=tokens, past_key_values=cache, logits_to_keep=window).logits
        said = tuple(logits[0].argmax(dim=-1).tolist())
        return Observation(said, _rows(cache.state))

    return observe


def _rows(state: CacheState) -> Iterator[tuple[int, Tensor]]:
    for layer in state.layers:
        store, window = layer.store, layer.window
        if store is None or window is None or window.queries is None or window.positions is None:
            continue
        yield layer.number, window_attention(
            window.queries, store.read().keys, q_positions=window.positions, k_positions=store.positions(),
            valid=store.valid(), scale=layer.scale,
        )[0]  # fmt: skip


def subject(model: PreTrainedModel) -> Subject:
    """Who a model is, and its sizes."""
    text = model.config.get_text_config(decoder=True)
    queries = int(text.num_attention_heads)
    heads = int(getattr(text, "num_key_value_heads", None) or queries)
    return Subject(config_fingerprint(model.config), str(text.model_type), int(text.num_hidden_layers), heads, queries)
