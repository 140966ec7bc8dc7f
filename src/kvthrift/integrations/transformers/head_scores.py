"""Reads passages twice with a transformers model, for how much the second reading ever looks at each head."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvthrift.calibrate import Artefact
from kvthrift.calibrate.heads import KIND, Progress
from kvthrift.calibrate.take import Job, Result, take
from kvthrift.integrations.transformers.cache import Cache
from kvthrift.integrations.transformers.calibrate import subject
from kvthrift.integrations.transformers.measuring import begin
from kvthrift.integrations.transformers.second_pass import look_again
from kvthrift.integrations.transformers.surrogates import ROOM
from kvthrift.methods import method
from kvthrift.score import SecondPassAttention


def measure_head_scores(
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
    """Measure the largest of KVzip's scores in every head, mean over passages, and write it to a file (2505.23416).

    The published form takes one English text. Arguments and errors as for
    :func:`kvthrift.integrations.transformers.surrogates.measure_surrogate`.
    """
    run = begin(model, tokenizer, text, samples, length, seed, needles=False, room=length + ROOM)
    scorer = method("kvzip").scorer
    assert isinstance(scorer, SecondPassAttention)
    wanted, sizes = scorer.look, (subject(model).layers, subject(model).kv_heads)

    def read(number: int) -> Job:
        def job(_: list[Result]) -> Result:
            cache = Cache(model.config, method("full"), observe=[method("kvzip")])
            tokens = torch.tensor([run.passages[number]], device=model.device)
            with torch.inference_mode():
                model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                look_again(model, cache, tokens, wanted, tokenizer=tokenizer)
            found = torch.zeros(sizes, dtype=torch.float64)
            for layer in cache.state.layers:
                found[layer.number] = layer.second_pass[wanted][0, :, wanted.sinks :].amax(dim=-1).cpu()
            return {"most": found.tolist()}

        return "Reading twice", job

    def finish(results: list[Result]) -> Artefact:
        table = torch.tensor([result["most"] for result in results], dtype=torch.float64).mean(dim=0)
        return Artefact(run.meta(KIND, "kvzip", samples=samples), {"importance": table.float()})

    settings = {"kind": KIND, "of": "kvzip", "model": subject(model).fingerprint, **run.facts}
    jobs = [read(number) for number in range(samples)]
    return take(target, settings, jobs, finish, force=force, progress=progress)
