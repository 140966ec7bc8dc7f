"""Which entries kvthrift keeps where a kvpress press kept as many, and how many of them are the same.

    python benchmarks/parity/ours.py FOLDER [--out PAGE.md]

Runs in kvthrift's environment, after prepare.py and theirs.py. Prints Markdown; ends with status 1 if a pair that is to
keep the same entries differs in more than rounding.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import transformers
import typer
from agree import NEAR, Agreement, compare
from cases import CASES, Case, Spec
from numpy.typing import NDArray
from torch import Tensor

import kvthrift
from kvthrift.allocate import BudgetLayers
from kvthrift.core import LayerView, Signals
from kvthrift.eval.probe import layout
from kvthrift.eval.provenance import commit
from kvthrift.recipe import Recipe
from kvthrift.score import Scorer, WindowAttention
from kvthrift.select import ChunkUnit

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Watched(Scorer, name="watched"):
    """Another scorer, whose scores are noted."""

    base: Scorer = field(default_factory=WindowAttention)
    seen: list[Tensor] = field(default_factory=list, compare=False)
    is_mass: ClassVar[bool] = True

    @property
    def needs(self) -> Signals:
        return self.base.needs

    def score(self, view: LayerView) -> Tensor:
        self.seen.append(self.base.score(view))
        return self.seen[-1].clone()


def snap(recipe: Recipe, kernel: int = 5) -> Recipe:
    """The recipe on the scores and the window of kvpress's SnapKV."""
    scorer = WindowAttention(window=64, pool="avg", kernel=kernel)
    return recipe.with_options(scorer=scorer, protect=kvthrift.Protect(recent=64))


def ramp(kept: Bools) -> Recipe:
    """PyramidKV on the layer budgets that were counted."""
    counts = tuple(int(n) for n in kept.sum(axis=(1, 2)) // kept.shape[1])
    return snap(kvthrift.method("pyramidkv")).with_options(layers=BudgetLayers(counts))


def words(about: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """KVzip's request as kvpress puts it."""
    return {key: tuple(ids) for key, ids in about["words"].items()}


RECIPES: dict[str, Callable[[Bools, dict[str, Any]], Recipe]] = {
    "Knorm": lambda *_: kvthrift.method("knorm"),
    "KeyDiff": lambda *_: kvthrift.method("keydiff"),
    "TOVA": lambda *_: kvthrift.method("tova"),
    "StreamingLLM": lambda *_: kvthrift.method("streamingllm", sinks=4),
    "SnapKV": lambda *_: kvthrift.method("snapkv", window=64, pool="avg", kernel=5),
    "Expected Attention": lambda *_: kvthrift.method("expected_attention"),
    "AdaKV(SnapKV)": lambda *_: snap(kvthrift.method("adakv")),
    "AdaKV(Expected Attention)": lambda *_: kvthrift.method("adakv", base="expected_attention"),
    "CriticalKV(SnapKV)": lambda *_: snap(kvthrift.method("criticalkv")),
    "CriticalAdaKV(SnapKV)": lambda *_: snap(kvthrift.method("criticalkv", base="adakv")),
    "Observed attention": lambda *_: kvthrift.method("h2o", recent=0, average="rows"),
    "LagKV, whole ranks": lambda *_: kvthrift.method("lagkv"),
    "LagKV, split ranks": lambda *_: kvthrift.method("lagkv"),
    "PyramidKV, kvpress's counts": lambda kept, _: ramp(kept),
    "PyramidKV, the paper's counts": lambda *_: snap(kvthrift.method("pyramidkv")),
    "ChunkKV, whole chunks": lambda *_: snap(kvthrift.method("chunkkv", chunk=16), kernel=1),
    "ChunkKV, chunks of 20": lambda *_: snap(kvthrift.method("chunkkv", chunk=20)),
    "KVzip": lambda _, about: kvthrift.method("kvzip", repeat=512, sinks=4, **words(about)),
    "KVCompose": lambda *_: kvthrift.method("kvcompose"),
    "KVCompose, tight": lambda *_: kvthrift.method("kvcompose"),
    "KVCompose, unstructured": lambda *_: kvthrift.method("kvcompose", structured=False),
    "Knorm by share": lambda *_: kvthrift.method("knorm", budget="10%"),
    "SnapKV, each by its defaults": lambda *_: kvthrift.method("snapkv"),
}


def keep(model: Any, ids: Tensor, case: Case, theirs: Bools, about: dict[str, Any]) -> tuple[Bools, Tensor | None, str]:
    """What kvthrift keeps ``[L, H, T]``, by which scores if they are all that decides, and the recipe."""
    recipe = RECIPES[case.method](theirs, about)
    heads = theirs.shape[0] * theirs.shape[1]
    mean = -(-int(theirs.sum()) // heads) if isinstance(recipe.layers, BudgetLayers) else int(theirs.sum()) // heads
    if recipe.budget is None:
        recipe = recipe.with_options(budget=kvthrift.Budget.parse(mean))
    watched = Watched(recipe.scorer)
    cache = kvthrift.prefill(model, ids[:, : case.tokens], recipe.with_options(scorer=watched))
    scores = None
    if recipe.refine is None and not isinstance(recipe.unit, ChunkUnit):
        scores = torch.stack(watched.seen[: theirs.shape[0]])[:, 0]
    return layout(cache, case.tokens).kept, scores, str(recipe).replace(" | ", ", ")


def row(name: str, case: Case, found: Agreement) -> str:
    """A line of the table."""
    if found.near and not found.far:
        verdict = f"the same but for {found.near} of equal score"
    else:
        verdict = "the same" if found.exact else "other entries"
    return (
        f"| {case.name} | {name} | {found.heads} | {found.theirs} | {found.ours} | {found.share:.2%} | "
        f"{found.heads_apart} | {verdict} |"
    )


def said(spec: Spec) -> str:
    """A press as one would write it."""
    name, options = spec
    given = [f"{key}={said(value) if isinstance(value, tuple) else value}" for key, value in options.items()]
    return f"{name}({', '.join(given)})"


def page(about: dict[str, Any], rows: list[str], recipes: dict[str, str]) -> str:
    """The whole page."""
    seen: dict[str, Case] = {}
    for case in CASES:
        seen.setdefault(case.method, case)
    why = [f"- **{name}**: {case.differs}." for name, case in seen.items() if case.differs]
    options = [f"| {name} | `{said(case.press)}` | `{recipes[name]}` |" for name, case in seen.items()]
    versions = f"kvpress {about['kvpress']} on torch {about['torch']} and transformers {about['transformers']}"
    mine = f"kvthrift {version('kvthrift')} at {commit()} on torch {torch.__version__} and transformers"
    return "\n".join(
        [
            "# The same entries as kvpress",
            "",
            f"{versions}; {mine} {transformers.__version__}. Float32 on a CPU, one text of 1,040 tokens (1,156 and "
            "1,000 where a row needs it), a random Llama of 4 layers x 2 KV heads (`tiny`) and SmolLM2-135M-Instruct "
            "(`smollm2`, 30 x 3). `make parity` makes this page from nothing.",
            "",
            "The number behind a name is the share removed. kvthrift is given as many entries as the press kept, for "
            "the two round shares differently (last but one row). Entries of equal score: those that one of them keeps "
            f"alone, while their scores differ by less than {NEAR:g} of their size from those the other keeps instead.",
            "",
            HEADER,
            *rows,
            "",
            "## Why some differ",
            "",
            *why,
            "",
            "## Options",
            "",
            "| case | kvpress | kvthrift |\n|---|---|---|",
            *options,
            "",
        ]
    )


HEADER = (
    "| case | model | heads | kept by kvpress | kept by kvthrift | in common | heads that differ | verdict |\n"
    "|---|---|---:|---:|---:|---:|---:|---|"
)


def main(folder: Path, out: Annotated[Path | None, typer.Option(help="also write the page here")] = None) -> None:
    """Compare, print the page, and fail if a pair that is to keep the same entries does not."""
    transformers.utils.logging.disable_progress_bar()
    ids = torch.tensor([json.loads((folder / "ids.json").read_text(encoding="utf-8"))])
    rows, wrong, recipes, about = [], [], {}, {}
    for name in ("tiny", "smollm2"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder / name, dtype=torch.float32, attn_implementation="kvthrift"
        ).eval()
        about = json.loads((folder / f"theirs-{name}.json").read_text(encoding="utf-8"))
        with np.load(folder / f"theirs-{name}.npz") as packed:
            for case in CASES:
                theirs = np.unpackbits(packed[case.name], axis=-1, count=case.tokens).astype(bool)
                ours, scores, recipe = keep(model, ids, case, theirs, about)
                found = compare(ours, theirs, None if scores is None else scores.numpy(), case.rivals)
                recipes.setdefault(case.method, recipe)
                rows.append(row(name, case, found))
                print(rows[-1], file=sys.stderr, flush=True)
                if not case.differs and found.far:
                    wrong.append(f"{case.name} on {name}")
    text = page(about, rows, recipes)
    print(text)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    if wrong:
        print(f"These are to keep the same entries and do not: {', '.join(wrong)}.")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
