"""Reads passages with a transformers model and takes the means of every head's queries before rotation."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvthrift.calibrate import Artefact
from kvthrift.calibrate.centres import KIND, as_text, join, query_means
from kvthrift.calibrate.heads import Progress
from kvthrift.calibrate.take import Job, Result, take
from kvthrift.integrations.transformers.cache import Cache
from kvthrift.integrations.transformers.calibrate import subject
from kvthrift.integrations.transformers.facts import attention_modules, module_facts
from kvthrift.integrations.transformers.measuring import begin
from kvthrift.recipe import Recipe
from kvthrift.score import WindowAttention


def measure_centres(
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
    """Measure the mean pre-RoPE query of every query head, and write it to a file (2604.04921).

    Queries are those that attention is given, turned back by their positions: behind a norm, where a model has one, and
    with a rotary embedding's attention scaling in them.

    Args:
        model: a causal LM loaded with ``attn_implementation="kvthrift"``.
        tokenizer: the model's.
        target: the file to write; results so far stand beside it, and a run that was cut short goes on.
        samples: passages to read (the paper reads up to 32768 tokens in all, of any coherent text).
        length: tokens of each.
        seed: another one makes other passages.
        text: what passages are cut from; the shipped text by default.
        force: replace a file that is there.
        progress: told how far it is.

    Raises:
        CalibrationError: the file is there, or the text is too short.
        ContextError: the passages are longer than the model reads.
        MissingSignalError: the model's rotary embedding is not known.
        OptionError: ``samples`` is below 1.
        UnsupportedModelError: an architecture that kvthrift does not compress, or another attention implementation.
    """
    run = begin(model, tokenizer, text, samples, length, seed, needles=False, room=0)

    def read(number: int) -> Job:
        def job(_: list[Result]) -> Result:
            found = _means(model, run.passages[number])
            return {**as_text(found[0]), "head_dim": found[1]}

        return "Measuring heads", job

    def finish(results: list[Result]) -> Artefact:
        meta = run.meta(KIND, "triattention", samples=samples, head_dim=int(results[0]["head_dim"]))
        return Artefact(meta, {"centres": join(results).half()})

    settings = {"kind": KIND, "model": subject(model).fingerprint, **run.facts}
    return take(target, settings, [read(n) for n in range(samples)], finish, force=force, progress=progress)


def _means(model: PreTrainedModel, ids: tuple[int, ...]) -> tuple[Tensor, int]:
    """Means ``[L, HG, D + half]`` of one passage, zero where a layer keeps transformers' own cache; the head dim."""
    cache = Cache(model.config, observe=[Recipe("queries", WindowAttention(len(ids)))])
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, logits_to_keep=1)
    modules, rows = attention_modules(model), {}
    for layer in cache.state.layers:
        if layer.window is None or layer.window.queries is None or layer.window.positions is None:
            continue
        rope = module_facts(modules[layer.number]).rope()
        plain = rope.rotate(layer.window.queries[0], -layer.window.positions)
        rows[layer.number] = (query_means(plain, rope.inv_freq.numel()).cpu(), plain.shape[-1])
    some = next(iter(rows.values()))
    table = torch.zeros(subject(model).layers, *some[0].shape, dtype=torch.float64)
    for number, (means, _) in rows.items():
        table[number] = means
    return table, some[1]
