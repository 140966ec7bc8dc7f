"""``kvthrift calibrate``: measures a model once for a method that needs it, and writes the file it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvthrift.calibrate import Artefact, check_free
from kvthrift.cli import options as o
from kvthrift.cli.files import read_text
from kvthrift.cli.progress import Bars
from kvthrift.errors import UnknownNameError
from kvthrift.integrations.transformers.calibrate import measure_heads
from kvthrift.integrations.transformers.loading import load_model

METHODS = ("headkv",)
SHOWN = 10

Method = Annotated[str, typer.Argument(metavar="METHOD", help=f"What to measure for: {', '.join(METHODS)}.")]
Out = Annotated[
    Path,
    typer.Option("--out", metavar="FILE", help="The file to write (.safetensors).", rich_help_panel=o.OUTPUT),
]
Samples = Annotated[int, typer.Option(min=1, help="Needle tests to take.", rich_help_panel=o.TEXT)]
Length = Annotated[int, typer.Option(min=1, help="Tokens of each test.", rich_help_panel=o.TEXT)]
Seed = Annotated[int, typer.Option(help="Another one makes other tests.", rich_help_panel=o.TEXT)]
Text = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="What needles are hidden in. [dim]\\[default: Alice's Adventures in Wonderland][/dim]",
        rich_help_panel=o.TEXT,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Overwrite FILE and what another run left.", rich_help_panel=o.OUTPUT)
]


def calibrate(
    method: Method,
    out: Out,
    model: o.Model = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    samples: Samples = 16,
    length: Length = 1024,
    seed: Seed = 0,
    text: Text = None,
    force: Force = False,
    debug: o.Debug = False,
) -> None:
    """Measure how much each attention head of a model matters, for methods that share room out by it.

    Takes one forward pass a test. A run that is cut short keeps its results beside FILE, and goes on from them
    when it is started again.
    """
    if method not in METHODS:
        raise UnknownNameError("method to calibrate for", method, METHODS)
    check_free(out, force=force)
    filler = None if text is None else read_text(text)
    with Bars(shown=True) as bars:
        where = None if device == "auto" else device
        llm, tokenizer = load_model(model, dtype=dtype, device=where, progress=bars.stage)
        found = measure_heads(
            llm, tokenizer, out,
            samples=samples, length=length, seed=seed, text=filler, force=force, progress=bars.stage,
        )  # fmt: skip
    _show(Console(), found, out)


def _show(console: Console, found: Artefact, out: Path) -> None:
    """The heads that matter most, and where the file is."""
    importance = found.tensors["importance"]
    order = importance.flatten().argsort(descending=True, stable=True)[:SHOWN].tolist()
    console.print(f"The {len(order)} most important of {importance.numel()} KV heads")
    table = Table()
    for column in ("layer", "head", "importance"):
        table.add_column(column, justify="right")
    for place in order:
        layer, head = divmod(place, importance.shape[1])
        table.add_row(str(layer), str(head), f"{importance[layer, head]:.1%}")
    console.print(table)
    facts = found.meta.provenance
    console.print(
        f"Measured on {facts['counted']} of {facts['steps']} answer tokens, those that the model found, "
        f"in {facts['samples']} tests."
    )
    console.print(f"Written to {out}; use it with -m {found.meta.method} -o calibration={out}", soft_wrap=True)
