"""Mean scores of kvpress's answers, by kvthrift's scorers, with paired intervals; beside kvthrift's own arms if asked.

    python benchmarks/parity/score.py samples.jsonl FOLDER --run results/quality/run --budget 10%

Runs in kvthrift's environment on what export.py and answers.py wrote. A failed answer counts as 0, as in `kvthrift
eval`; an answer to another prompt than the run's is refused.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from transformers import AutoTokenizer

from kvthrift.eval.metrics import SCORERS
from kvthrift.eval.metrics.interval import Interval, paired_means
from kvthrift.eval.rows import read_rows
from kvthrift.eval.sample import Sample, Turn
from kvthrift.integrations.transformers.embedded import embedded_path

Scores = dict[str, dict[tuple[str, str], float]]  # arm -> (task, sample) -> mean over turns


def sample_of(line: dict[str, Any]) -> Sample:
    """The sample of an exported line."""
    data = line["sample"]
    turns = tuple(Turn(**turn | {"answers": tuple(turn["answers"])}) for turn in data["turns"])
    return Sample(**data | {"turns": turns})


def theirs(samples: Iterable[dict[str, Any]], answers: Iterable[dict[str, Any]], decode: Any) -> tuple[Scores, int]:
    """Scores of answers, and how many of these failed."""
    known = {(line["task"], line["id"], line["turn"]): line for line in samples}
    found: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    failed = 0
    for answer in {_key(line): line for line in answers}.values():  # of a repeated one, the last
        line = known[answer["task"], answer["id"], answer["turn"]]
        sample = sample_of(line)
        failed += "error" in answer
        text = "" if "error" in answer else decode(answer["tokens"])
        score = 0.0 if "error" in answer else float(SCORERS[sample.scorer](text, sample, sample.turns[line["turn"]]))
        found[f"kvpress {answer['press']}"][answer["task"], answer["id"]].append(score)
    return {arm: {key: float(np.mean(x)) for key, x in rows.items()} for arm, rows in found.items()}, failed


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["task"], line["id"], line["turn"], line["press"]


def ours(folder: Path, budget: str, digests: dict[tuple[str, str], str]) -> Scores:
    """Scores of a run's arms with the question hidden, on samples that were exported."""
    out: Scores = defaultdict(dict)
    for row in read_rows(folder / "rows.jsonl"):
        place = row["task"], row["sample"]
        if row["question"] != "hidden" or place not in digests or row["budget"] not in ("all", budget):
            continue
        if row.get("prompt", digests[place]) != digests[place]:
            raise SystemExit(f"sample {place} was another prompt in {folder} than in the exported file.")
        out[f"kvthrift {row['arm'].partition('@')[0]}"][place] = float(row["score"])
    return dict(out)


def said(found: Interval, *, signed: bool = False) -> str:
    """``41 (35 to 48)``, in points of 100."""
    bounds = "" if found.low is None or found.high is None else f" ({100 * found.low:.0f} to {100 * found.high:.0f})"
    return f"{100 * found.mean:+.1f}{bounds}" if signed else f"{100 * found.mean:.1f}{bounds}"


def table(scores: Scores, reference: str) -> str:
    """Markdown: means over tasks, and differences to one arm on the samples that all have."""
    shared = set.intersection(*(set(rows) for rows in scores.values()))
    tasks: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for place in sorted(shared):
        tasks[place[0]].append(place)
    if not tasks:
        raise SystemExit("there is no sample that every arm has answered.")
    arms = [reference, *sorted(arm for arm in scores if arm != reference)]
    grid = {task: np.array([[scores[arm][at] for at in places] for arm in arms]) for task, places in tasks.items()}
    means = paired_means(grid, 0)
    order = sorted(range(len(arms)), key=lambda i: -means[i].mean.mean)
    head = ["arm", "mean", f"less {reference}", *tasks]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for i in order:
        cells = [said(means[i].mean), said(means[i].difference, signed=True)]
        cells += [f"{100 * means[i].tasks[task].mean:.1f}" for task in tasks]
        lines.append(f"| {' | '.join([arms[i], *cells])} |")
    counts = ", ".join(f"{task} {len(places)}" for task, places in tasks.items())
    return "\n".join([*lines, "", f"Samples that every arm answered: {counts}. 95% paired bootstrap, tasks alike."])


def main(
    samples: Path,
    answers: Path,
    run: Annotated[Path | None, typer.Option(help="folder of a `kvthrift eval` on the same samples")] = None,
    budget: Annotated[str, typer.Option(help="that run's budget to show")] = "10%",
    reference: str = "kvpress full",
    model: Annotated[str, typer.Option(help="folder of the tokenizer; the embedded model's by default")] = "",
) -> None:
    """Print the table."""
    tokenizer = AutoTokenizer.from_pretrained(model or embedded_path())
    lines = [json.loads(text) for text in samples.read_text(encoding="utf-8").splitlines()]
    given = [row for path in sorted(answers.glob("answers-*.jsonl")) for row in read_rows(path)]
    scores, failed = theirs(lines, given, lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    digests = {(line["task"], line["id"]): line["prompt"] for line in lines}
    if run is not None:
        scores |= ours(run, budget, digests)
    print(table(scores, reference))
    if failed:
        print(f"\n{failed} answers of kvpress failed and count as 0.")


if __name__ == "__main__":
    typer.run(main)
