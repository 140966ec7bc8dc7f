"""The samples that `kvthrift eval` asks with the question hidden, as token ids, for answers.py.

    python benchmarks/parity/export.py samples.jsonl --samples 15

Runs in kvthrift's environment. A line for every question: the ids of the context, which are read and compressed, those
of the question, which follow, and what scorer and table need to know.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedTokenizerBase

from kvthrift.eval.bench import PlainTokenizer
from kvthrift.eval.decode import ends_of
from kvthrift.eval.prompt import build_prompt
from kvthrift.eval.sample import Task, shortened
from kvthrift.eval.tasks import find
from kvthrift.integrations.transformers.loading import load_model

TASKS = "ruler.niah_single_2,ruler.niah_multikey_1,ruler.niah_multivalue,niah.number"


def lines(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
    *,
    length: int,
    count: int,
    seed: int,
    limit: int,
    data: Path | None,
) -> Iterator[dict[str, Any]]:
    """What is asked of each sample of a task, one line a question."""
    for sample in task.samples(PlainTokenizer(tokenizer), length=length, count=count, seed=seed, data=data):
        cut = shortened(sample, limit) if limit else sample
        prompt = build_prompt(tokenizer, cut, visible=False)
        (reading,) = prompt.readings
        for ask in reading.asks:
            yield {
                "task": sample.task,
                "id": sample.id,
                "turn": ask.turn,
                "context": list(reading.ids),
                "question": list(ask.ids),
                "max_new_tokens": cut.turns[ask.turn].max_new_tokens,
                "ends": ends,
                "prompt": prompt.digest,
                "sample": asdict(cut) | {"context": ""},
            }


def main(
    out: Path,
    tasks: str = TASKS,
    samples: Annotated[int, typer.Option(help="of each task")] = 15,
    length: Annotated[int, typer.Option(help="tokens of a sample, template and answer included")] = 4096,
    max_new_tokens: Annotated[int, typer.Option(help="answers are cut there; 0 for the tasks' own limits")] = 48,
    model: Annotated[str, typer.Option(help="the embedded one by default")] = "",
    seed: int = 0,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="local data sets")] = None,
) -> None:
    """Write the samples of a grid; options are those of `kvthrift eval`."""
    net, tokenizer = load_model(model or None)
    ends = sorted(ends_of(net, tokenizer))
    with out.open("w", encoding="utf-8") as file:
        for task in find(tasks.split(",")):
            for line in lines(
                task, tokenizer, ends, length=length, count=samples, seed=seed, limit=max_new_tokens, data=data
            ):
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    typer.run(main)
