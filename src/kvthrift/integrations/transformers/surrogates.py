"""Reads passages twice with a transformers model, for maps from keys and values to what the second reading looks at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvthrift.calibrate import Artefact
from kvthrift.calibrate.heads import Progress
from kvthrift.calibrate.mlp import explained, fit, held_out, linear_fit, load_pairs, save_pairs
from kvthrift.calibrate.surrogate import KIND, Sums
from kvthrift.calibrate.take import Job, Result, take
from kvthrift.integrations.transformers.cache import Cache
from kvthrift.integrations.transformers.calibrate import subject
from kvthrift.integrations.transformers.facts import attention_modules, module_facts
from kvthrift.integrations.transformers.measuring import Measuring, begin
from kvthrift.integrations.transformers.second_pass import look_again
from kvthrift.methods import method
from kvthrift.part import require
from kvthrift.recipe import Recipe
from kvthrift.score.surrogate import features

ROOM = 64  # tokens of the words that ask for a repetition, at most


def measure_surrogate(
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
    plus: bool = False,
    form: Literal["linear", "mlp"] = "linear",
) -> Artefact:
    """Fit every head's map from keys and values to KVzip's scores, and write it to a file (2601.07891, 2505.23416).

    Running sums stand in ``target.sums`` until the file is written; for networks, what was read in ``target.pairs-N``.

    Args:
        model: a causal LM loaded with ``attn_implementation="kvthrift"``.
        tokenizer: the model's.
        target: the file to write; results so far stand beside it, and a run that was cut short goes on.
        samples: passages to read.
        length: tokens of each, and as many of its repetition.
        seed: another one makes other passages.
        text: what passages are cut from; the shipped text by default.
        force: replace a file that is there.
        progress: told how far it is.
        plus: fit KVzip+'s scores, which the paper foretells.
        form: a linear map, or a network with one hidden layer (an eighth of the model's hidden size in all KV heads of
            a layer); every fifth passage is then kept to measure what it and a linear map explain.

    Raises:
        CalibrationError: the file is there, or the passages are too short or too few.
        ContextError: passage and repetition are longer than the model reads.
        MissingSignalError: the model's rotary embedding is not known, or for KVzip+ its output projection.
        OptionError: ``samples`` is below 1, or below 2 for networks.
        UnsupportedModelError: an architecture that kvthrift does not compress, or another attention implementation.
    """
    require(
        form == "linear" or samples >= 2, f"samples={samples} leaves no passage to fit a network to. Give 2 or more."
    )
    run = begin(model, tokenizer, text, samples, length, seed, needles=False, room=length + ROOM)
    if form == "mlp":
        return _measure_networks(
            model, tokenizer, Path(target), run, samples, plus=plus, force=force, progress=progress
        )
    recipe, path = method("kvzip", plus=plus), Path(f"{target}.sums")

    def read(number: int) -> Job:
        def job(_: list[Result]) -> Result:
            sums = Sums.load(path) if number else None
            if sums is None or sums.texts == number:  # else killed between this file and the other: it is in
                for layer, x, y in _twice(model, tokenizer, run.passages[number], recipe):
                    sums = sums or Sums.zeros(subject(model).layers, len(x), x.shape[-1])
                    sums.add(layer, x, y)
                assert sums is not None
                sums.texts = number + 1
                sums.save(path)
            return {"texts": number + 1}

        return "Reading twice", job

    def finish(results: list[Result]) -> Artefact:
        weights, explained = Sums.load(path).solve()
        more = {"target": "kvzip+"} if plus else {}
        meta = run.meta(KIND, "kvzap", samples=samples, explained=round(float(explained.mean()), 4), **more)
        return Artefact(meta, {"weights": weights.float(), "explained": explained.float()})

    settings = {"kind": KIND, "model": subject(model).fingerprint, **run.facts, **({"plus": True} if plus else {})}
    found = take(target, settings, [read(n) for n in range(samples)], finish, force=force, progress=progress)
    path.unlink(missing_ok=True)
    return found


def _measure_networks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path, run: Measuring, samples: int, *,
    plus: bool, force: bool, progress: Progress,
) -> Artefact:  # fmt: skip
    """The same for networks: entries are kept until all passages are read, then networks are fitted."""
    recipe, sizes = method("kvzip", plus=plus), subject(model)
    paths = [target.with_name(f"{target.name}.pairs-{n}") for n in range(samples)]
    hidden = int(model.config.get_text_config(decoder=True).hidden_size)
    width = max(hidden // 8 // sizes.kv_heads, 1)

    def read(number: int) -> Job:
        def job(_: list[Result]) -> Result:
            rows = {layer: (x, y) for layer, x, y in _twice(model, tokenizer, run.passages[number], recipe)}
            some = next(iter(rows.values()))
            none = (torch.zeros_like(some[0]), torch.ones_like(some[1]))  # of layers that keep transformers' own cache
            x, y = (torch.stack([rows.get(n, none)[k].cpu() for n in range(sizes.layers)]) for k in (0, 1))
            save_pairs(paths[number], x, y)
            return {"texts": number + 1}

        return "Reading twice", job

    def fitted(_: list[Result]) -> Result:
        kept = held_out(samples)
        x, y = load_pairs([path for n, path in enumerate(paths) if n not in kept])
        network, linear = fit(x, y, width).rounded(), linear_fit(x, y).half().float()
        x, y = load_pairs([paths[n] for n in kept])
        plain = torch.einsum("lhnf,lhf->lhn", x.float(), linear)
        found = {"network": network.table(), "explained": explained(network(x.float()), y)}
        save_file({**found, "explained_linear": explained(plain, y).float()}, f"{target}.network")
        return {"fitted": True}

    def finish(_: list[Result]) -> Artefact:
        tensors = load_file(f"{target}.network")
        shares = {k: round(float(t.mean()), 4) for k, t in tensors.items() if k != "network"}
        facts = {**shares, "width": width, "held_out": len(held_out(samples)), **({"target": "kvzip+"} if plus else {})}
        return Artefact(run.meta(KIND, "kvzap", samples=samples, **facts), {k: t.half() for k, t in tensors.items()})

    settings = {"kind": KIND, "model": sizes.fingerprint, "form": "mlp", "samples": samples, "plus": plus, **run.facts}
    jobs: list[Job] = [*(read(n) for n in range(samples)), ("Fitting", fitted)]
    found = take(target, settings, jobs, finish, force=force, progress=progress)
    for path in (*paths, Path(f"{target}.network")):
        path.unlink(missing_ok=True)
    return found


def _twice(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...], recipe: Recipe
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number of a layer, features ``[H, N, F]`` and scores ``[H, N]`` of its entries behind the sinks."""
    wanted = recipe.needs.second_pass[0]
    cache = Cache(model.config, method("full"), observe=[recipe])
    tokens = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    look_again(model, cache, tokens, wanted, tokenizer=tokenizer)
    modules, sinks = attention_modules(model), wanted.sinks
    for layer in cache.state.layers:
        if layer.store is None:
            continue
        read, rope = layer.store.read(), module_facts(modules[layer.number]).rope()
        keys = rope.rotate(read.keys[0], -layer.store.positions()[0])
        yield layer.number, features(keys, read.values[0])[:, sinks:], layer.second_pass[wanted][0, :, sinks:]
