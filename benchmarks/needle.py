"""Needle in a haystack: does a 7-digit number survive compression?

    python benchmarks/needle.py --out benchmarks/results/needle-cpu

Every method at every budget answers the same prompts from the same reading of them: one prefill a batch, compressed
under each recipe in turn (`Cache.compressed`, which keeps what the recipe would have kept from the start). Batches are
padded on the left. Writes one JSON line a cell and a Markdown table with 95% Wilson intervals.
"""

from __future__ import annotations

import json
import math
import platform
import random
import subprocess
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.progress import Progress
from torch import Tensor

import kvthrift
from kvthrift.data import demo_text
from kvthrift.integrations.transformers.loading import load_model

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
WORDS = (
    "amber", "basalt", "cedar", "delta", "ember", "fjord", "garnet", "harbor", "indigo", "juniper", "kestrel",
    "lagoon", "meadow", "nectar", "onyx",
)  # fmt: skip
ASK = "\n\nWhat is the special magic number for {key} mentioned in the text above? Answer with the number only."
ANSWER = "The special magic number for {key} is"


@dataclass(frozen=True)
class Prompt:
    """One question: token ids of the context and of what follows it, and the number to find."""

    context: list[int]
    question: list[int]
    number: str


@dataclass(frozen=True)
class Cell:
    """One method at one budget on one group of prompts."""

    method: str
    budget: str
    haystack: str
    length: int
    visible: bool
    found: int
    digits: float
    samples: int
    entries: float
    bytes: int


def prompts(tokenizer: object, haystack: str, length: int, samples: int, seed: int) -> list[Prompt]:
    """Prompts of about ``length`` tokens, needles at evenly spread depths."""
    draw = random.Random(f"{seed}-{haystack}-{length}")
    book = demo_text()
    out = []
    for index in range(samples):
        key, number = draw.choice(WORDS), str(draw.randrange(10**6, 10**7))
        start = draw.randrange(len(book) // 2)
        text = FILLER * (length // 15) if haystack == "filler" else book[start:]
        lines = tokenizer.decode(tokenizer(text).input_ids[: length - 110]).splitlines(keepends=True)
        place = round((index + 0.5) / samples * (len(lines) - 1))
        lines.insert(place, f"The special magic number for {key} is {number}.\n")
        ask, answer = ASK.format(key=key), ANSWER.format(key=key)
        message = [{"role": "user", "content": "".join(lines) + ask}]
        whole = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False) + answer
        cut = whole.rindex(ask)
        context, question = whole[:cut], whole[cut:]
        encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
        out.append(Prompt(encode(context), encode(question), number))
    return out


def padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask ``[B, T]``."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def forward(model: object, cache: kvthrift.Cache, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of the last column ``[B, V]``; ``mask`` covers all columns."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
    return out.logits[:, -1]


def answer(model: object, cache: kvthrift.Cache, logits: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Greedy continuation ``[B, steps]``."""
    tokens = [logits.argmax(dim=-1, keepdim=True)]
    for _ in range(steps - 1):
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        tokens.append(forward(model, cache, tokens[-1], mask).argmax(dim=-1, keepdim=True))
    return torch.cat(tokens, dim=1)


def score(texts: list[str], numbers: list[str]) -> tuple[int, float]:
    """How many answers hold the whole number, and the mean share of its leading digits."""
    found, leading = 0, 0.0
    for text, number in zip(texts, numbers, strict=True):
        digits = "".join(c for c in text if c.isdigit())
        found += number in digits
        same = next((i for i, (a, b) in enumerate(zip(digits, number, strict=False)) if a != b), min(len(digits), 7))
        leading += same / 7
    return found, leading / len(numbers)


def cells(
    model: object,
    tokenizer: object,
    batch: list[Prompt],
    recipes: list[kvthrift.Recipe],
    visible: bool,
    tag: tuple[str, int],
) -> list[Cell]:
    """Every recipe on one batch, from one prefill."""
    device, pad = model.device, tokenizer.pad_token_id or 0
    rows = [p.context + p.question if visible else p.context for p in batch]
    ids, mask = padded(rows, pad, device)
    full = kvthrift.Cache(model.config, "full", observe=[r for r in recipes if r.budget is not None])
    logits = forward(model, full, ids, mask)
    out = []
    for recipe in recipes:
        cache = full.compressed(recipe) if recipe.budget is not None else full.fork()
        held = cache.report()
        first, seen = logits, mask
        if not visible:
            asked, asked_mask = padded([p.question for p in batch], pad, device)
            seen = torch.cat((mask, asked_mask), dim=1)
            first = forward(model, cache, asked, seen)
        tokens = answer(model, cache, first, seen, 10)
        found, digits = score(tokenizer.batch_decode(tokens), [p.number for p in batch])
        heads = sum(row.heads for row in held.layers) * len(batch)
        name, budget = recipe.name, str(recipe.budget or "all")
        size = held.bytes // len(batch)
        if recipe.budget is None:  # what was observed for the others is not the full cache's
            size = held.full_bytes // len(batch)
        out.append(Cell(name, budget, *tag, visible, found, digits, len(batch), held.entries / heads, size))
    return out


def wilson(found: int, total: int) -> tuple[float, float]:
    """95% interval of a share."""
    z, share = 1.96, found / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def table(rows: list[Cell], budgets: list[str]) -> str:
    """Markdown: a method a row; found in % with its interval for each budget, question visible | hidden."""
    groups: dict[tuple[str, str, bool], list[Cell]] = defaultdict(list)
    for row in rows:
        groups[row.method, row.budget, row.visible].append(row)
    head = [f"{budget} {'visible' if v else 'hidden'}" for budget in budgets for v in (True, False)]
    lines = ["| method | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]

    def show(method: str, budget: str, visible: bool) -> str:
        found = groups.get((method, budget, visible), [])
        if not found:
            return "-"
        hits, total = sum(c.found for c in found), sum(c.samples for c in found)
        low, high = wilson(hits, total)
        return f"{100 * hits / total:.0f} ({100 * low:.0f}-{100 * high:.0f})"

    for method in dict.fromkeys(row.method for row in rows):
        shown = [show(method, "all" if method == "full" else b, v) for b in budgets for v in (True, False)]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def size_table(rows: list[Cell], budgets: list[str]) -> str:
    """Markdown: MiB really held a prompt after compression, mean over prompts; a method a row."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in rows:
        groups[row.method, row.budget].append(row.bytes)
    lines = ["| MiB held | " + " | ".join(budgets) + " |", "|---|" + "---|" * len(budgets)]
    for method in dict.fromkeys(row.method for row in rows):
        sizes = [groups.get((method, "all" if method == "full" else b), [0]) for b in budgets]
        lines.append(f"| {method} | " + " | ".join(f"{sum(s) / len(s) / 2**20:.1f}" for s in sizes) + " |")
    return "\n".join(lines)


def provenance(model: object, samples: int) -> str:
    """What was run, on what, at which commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else platform.processor() or "CPU"
    return (
        f"SmolLM2-135M-Instruct, {model.dtype}, {device}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, kvthrift {kvthrift.__version__} at {commit.strip() or 'an unknown commit'}. "
        f"{samples} prompts a cell; found = all 7 digits in the answer, % (95% Wilson interval)."
    )


def main(
    out: Annotated[Path, typer.Option(help="results go to OUT.jsonl and OUT.md")],
    methods: Annotated[str, typer.Option(help="comma-separated; all by default")] = "",
    budgets: str = "512,256,128,64",
    lengths: str = "2500,4000",
    haystacks: str = "filler,book",
    samples: Annotated[int, typer.Option(help="prompts for each length and haystack")] = 20,
    batch: int = 10,
    seed: int = 0,
    model: Annotated[str, typer.Option(help="embedded model by default")] = "",
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Run the grid."""
    net, tokenizer = load_model(model or None, dtype=torch.bfloat16, device=device)
    names = methods.split(",") if methods else ["full", "random", "streamingllm", *kvthrift.methods()]
    sizes = budgets.split(",")
    recipes = []
    for name in dict.fromkeys(names):
        recipes += [kvthrift.method(name)] if name == "full" else [kvthrift.method(name, budget=b) for b in sizes]
    rows: list[Cell] = []
    groups = [(h, int(n), v) for h in haystacks.split(",") for n in lengths.split(",") for v in (True, False)]
    with Progress() as bar:
        task = bar.add_task("prompts", total=len(groups) * samples)
        for haystack, length, visible in groups:
            found = prompts(tokenizer, haystack, length, samples, seed)
            for start in range(0, samples, batch):
                rows += cells(net, tokenizer, found[start : start + batch], recipes, visible, (haystack, length))
                bar.advance(task, min(batch, samples - start))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".jsonl").write_text("\n".join(json.dumps(asdict(row)) for row in rows) + "\n")
    text = "\n\n".join((provenance(net, samples * len(groups) // 2), table(rows, sizes), size_table(rows, sizes)))
    out.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    typer.run(main)
