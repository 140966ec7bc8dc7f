"""Measures a transformers model for calibrations that let it go on with a text, or look at all of its queries."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvthrift.calibrate import Artefact, Meta
from kvthrift.calibrate import entropy as e
from kvthrift.calibrate import retrieval as r
from kvthrift.calibrate.heads import Progress
from kvthrift.calibrate.needles import NeedleTests
from kvthrift.calibrate.passages import Passages
from kvthrift.calibrate.take import Job, Result, take
from kvthrift.data import demo_text
from kvthrift.errors import OptionError
from kvthrift.integrations.transformers.cache import Cache
from kvthrift.integrations.transformers.calibrate import subject
from kvthrift.integrations.transformers.decode import greedy
from kvthrift.integrations.transformers.facts import attention_modules, output_weight, weights_fingerprint
from kvthrift.integrations.transformers.prefill import check_length
from kvthrift.kernels import window_attention
from kvthrift.recipe import Recipe, Trigger
from kvthrift.score import WindowAttention

ANSWER = 50  # most tokens of an answer
STEPS = 32  # tokens that a text is continued by
_EVER = 1 << 40


@dataclass(frozen=True)
class Measuring:
    """What a calibration on plain passages starts from."""

    model: PreTrainedModel
    needles: NeedleTests | None
    passages: Passages
    facts: dict[str, Any]

    def meta(self, kind: str, method: str, **facts: Any) -> Meta:
        return replace(subject(self.model).meta(method, {**self.facts, **facts}), kind=kind)


def measure_retrieval(
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
    """Rank every layer's query heads by how they find meaning, measure what eviction costs it, write both (2508.02401).

    Args:
        model: a causal LM loaded with ``attn_implementation="kvthrift"``.
        tokenizer: the model's.
        target: the file to write; results so far stand beside it, and a run that was cut short goes on.
        samples: needle tests for the heads; half as many more, and as many passages, for the layers.
        length: tokens of each.
        seed: another one makes other tests.
        text: what needles are hidden in, and passages are cut from; the shipped text by default.
        force: replace a file that is there.
        progress: told how far it is.

    Raises:
        CalibrationError: the file is there, the tests or the text are too short, or the model finds nothing.
        ContextError: the tests are longer than the model reads.
        MissingSignalError: the model's output projection cannot be read.
        OptionError: ``samples`` is below 1.
        UnsupportedModelError: an architecture that kvthrift does not compress, or another attention implementation.
    """
    run = begin(model, tokenizer, text, samples, length, seed, needles=True, room=max(ANSWER, STEPS))
    go_on, tests, half = continuer(model), run.needles, max(1, samples // 2)
    if tests is None:
        raise ValueError("a run that ranks heads has needle tests")
    sizes = (subject(model).layers, subject(model).query_heads)

    def words(ids: Sequence[int]) -> list[str]:
        return re.findall(r"\w+", str(tokenizer.decode(list(ids))).lower())

    def find(number: int) -> Job:
        return "Ranking heads", lambda _: r.measure_heads_once(go_on, tests[number], words, sizes, ANSWER)

    def lose(ids: tuple[int, ...]) -> Job:
        return "Measuring layers", lambda found: r.measure_errors_once(
            go_on, ids, r.rank_heads(found[:samples])[0], STEPS
        )

    def finish(results: list[Result]) -> Artefact:
        heads, scores = r.rank_heads(results[:samples])
        errors = r.join_errors([results[samples : samples + half], results[samples + half :]])
        found = sum(result["found"] for result in results[:samples])
        meta = run.meta(r.KIND, "compresskv", samples=samples, found=found)
        return Artefact(meta, {"heads": heads, "scores": scores, "layer_error": errors})

    jobs = [find(number) for number in range(samples)]
    jobs += [lose(tests[samples + number].prompt) for number in range(half)]
    jobs += [lose(run.passages[number]) for number in range(half)]
    settings = {"kind": r.KIND, "model": subject(model).fingerprint, "samples": samples, **run.facts}
    return take(target, settings, jobs, finish, force=force, progress=progress)


def measure_entropy(
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
    """Measure the truncated matrix entropy of every query head's queries, and write it to a file (2410.03090).

    Arguments and errors as for :func:`measure_retrieval`; ``samples`` passages are read, none is answered.
    """
    run = begin(model, tokenizer, text, samples, length, seed, needles=False, room=0)
    dims = []

    def look(number: int) -> Job:
        def job(_: list[Result]) -> Result:
            found = torch.zeros(subject(model).layers, subject(model).query_heads, dtype=torch.float64)
            cache = Cache(model.config, observe=[Recipe("queries", WindowAttention(length))])
            with torch.inference_mode():
                model(input_ids=torch.tensor([run.passages[number]], device=model.device), past_key_values=cache,
                      logits_to_keep=1)  # fmt: skip
            for layer in cache.state.layers:
                if layer.window is not None and layer.window.queries is not None:
                    found[layer.number] = e.truncated_entropy(layer.window.queries[0]).cpu()
                    dims.append(layer.window.queries.shape[-1])
            return {"entropy": found.tolist(), "head_dim": dims[-1]}

        return "Measuring heads", job

    def finish(results: list[Result]) -> Artefact:
        table = torch.tensor([result["entropy"] for result in results], dtype=torch.float32)
        dim = int(results[0]["head_dim"])
        return Artefact(run.meta(e.KIND, "uncomp", samples=samples, head_dim=dim), {"entropy": table})

    settings = {"kind": e.KIND, "model": subject(model).fingerprint, **run.facts}
    jobs = [look(number) for number in range(samples)]
    return take(target, settings, jobs, finish, force=force, progress=progress)


def continuer(model: PreTrainedModel) -> r.Continue:
    """A model as a function from token ids to how it goes on, greedily, and where its heads look meanwhile."""

    def go_on(ids: tuple[int, ...], window: int, most: int) -> r.Continuation:
        asked = Recipe("window", WindowAttention(window + most - 1), trigger=Trigger(every=_EVER))  # seen in decoding
        cache = Cache(model.config, asked, observe=[asked])
        said = greedy(model, torch.tensor([ids], device=model.device), cache, most).tokens
        return r.Continuation(said, _layers(model, cache, min(window, len(ids)) + len(said) - 1))

    return go_on


def _layers(model: PreTrainedModel, cache: Cache, rows: int) -> Iterator[r.LayerRows]:
    modules = attention_modules(model)
    for layer in cache.state.layers:
        store, window = layer.store, layer.window
        if store is None or window is None or window.queries is None or window.positions is None:
            continue
        read = store.read()
        found = window_attention(
            window.queries[:, :, -rows:], read.keys, q_positions=window.positions[:, -rows:],
            k_positions=store.positions(), valid=store.valid(), scale=layer.scale,
        )  # fmt: skip
        module = modules[layer.number]
        yield r.LayerRows(layer.number, found[0].flatten(0, 1), read.values[0], lambda m=module: output_weight(m))  # type: ignore[misc]


def begin(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | None,
    samples: int,
    length: int,
    seed: int,
    *,
    needles: bool,
    room: int,
) -> Measuring:
    """Refuse what cannot be measured, and say on what passages it will be.

    Args:
        room: tokens that follow each text.
        needles: whether needle tests are wanted, too.

    Raises:
        CalibrationError, ContextError, OptionError, UnsupportedModelError: as :func:`measure_retrieval`.
    """
    if samples < 1:
        raise OptionError(f"samples={samples} must be at least 1 text.")
    Cache(model.config).check_attention()
    check_length(model, length + room)
    filler = demo_text() if text is None else text
    start = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]

    def encode(piece: str) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])

    tests = NeedleTests(encode, filler, length=length, seed=seed, start=start) if needles else None
    facts = {
        "length": length,
        "seed": seed,
        "text": hashlib.sha256(filler.encode()).hexdigest()[:16],
        "dtype": str(model.dtype).partition(".")[2],
        "weights": weights_fingerprint(model.config, attention_modules(model)),
    }
    return Measuring(model, tests, Passages(encode, filler, length=length, seed=seed, start=start), facts)
