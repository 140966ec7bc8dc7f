"""``kvthrift calibrate``: measures a model once for a method that needs it, and writes the file it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvthrift.calibrate import Artefact, check_free
from kvthrift.calibrate.centres import concentration
from kvthrift.cli import options as o
from kvthrift.cli.files import read_text
from kvthrift.cli.progress import Bars
from kvthrift.errors import OptionError, UnknownNameError
from kvthrift.integrations.transformers.calibrate import measure_heads
from kvthrift.integrations.transformers.centres import measure_centres
from kvthrift.integrations.transformers.head_scores import measure_head_scores
from kvthrift.integrations.transformers.loading import load_model
from kvthrift.integrations.transformers.measuring import measure_entropy, measure_retrieval
from kvthrift.integrations.transformers.surrogates import measure_surrogate

METHODS: dict[str, Callable[..., Artefact]] = {
    "headkv": measure_heads,
    "compresskv": measure_retrieval,
    "uncomp": measure_entropy,
    "kvzap": measure_surrogate,
    "kvzap-plus": partial(measure_surrogate, plus=True),
    "kvzip": measure_head_scores,
    "triattention": measure_centres,
}
SHOWN = 10

Method = Annotated[str, typer.Argument(metavar="METHOD", help=f"What to measure for: {', '.join(METHODS)}.")]
Out = Annotated[
    Path,
    typer.Option("--out", metavar="FILE", help="The file to write (.safetensors).", rich_help_panel=o.OUTPUT),
]
Samples = Annotated[int, typer.Option(min=1, help="Needle tests or passages to take.", rich_help_panel=o.TEXT)]
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
Form = Annotated[
    Literal["linear", "mlp"],
    typer.Option(help="For kvzap and kvzap-plus: maps that are linear, or small networks.", rich_help_panel=o.TEXT),
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
    form: Form = "linear",
    force: Force = False,
    debug: o.Debug = False,
) -> None:
    """Measure a model once, for methods that share room out or choose by what its heads and layers are good for.

    Takes a forward pass a test, for compresskv some words that the model says, for kvzap and kvzip (its form of whole
    heads) a second reading; kvzap-plus is kvzap fitted to KVzip+ scores. A run that is cut
    short keeps its results beside FILE, and goes on from them when it is started again.
    """
    if method not in METHODS:
        raise UnknownNameError("method to calibrate for", method, METHODS)
    if form != "linear" and not method.startswith("kvzap"):
        raise OptionError(f"--form {form} is of kvzap and kvzap-plus; {method} has no forms. Leave it out.")
    more = {"form": form} if form != "linear" else {}
    check_free(out, force=force)
    filler = None if text is None else read_text(text)
    with Bars(shown=True) as bars:
        where = None if device == "auto" else device
        llm, tokenizer = load_model(model, dtype=dtype, device=where, progress=bars.stage)
        found = METHODS[method](
            llm, tokenizer, out,
            samples=samples, length=length, seed=seed, text=filler, force=force, progress=bars.stage, **more,
        )  # fmt: skip
    _show(Console(), found, out)


def _show(console: Console, found: Artefact, out: Path) -> None:
    """What the measurement says of heads or layers, and where the file is."""
    facts = found.meta.provenance
    if "importance" in found.tensors and "counted" not in facts:
        _show_heads(console, found.tensors["importance"], ".3f")
        console.print(f"Measured on {facts['samples']} passages of {facts['length']} tokens, read twice.")
    elif "importance" in found.tensors:
        _show_heads(console, found.tensors["importance"], ".1%")
        said = (
            f"{facts['counted']} of {facts['steps']} answer tokens, those that the model found, in {facts['samples']}"
        )
        console.print(f"Measured on {said} tests.")
    elif "layer_error" in found.tensors:
        _show_layers(console, found.tensors["heads"], found.tensors["layer_error"])
        console.print(f"Heads ranked by {facts['found']} of {facts['samples']} tests, those that the model answered.")
    elif "explained" in found.tensors:
        _show_explained(console, found.tensors["explained"], "KVzip+" if "target" in facts else "KVzip")
        kept = facts.get("held_out", 0)
        if kept:
            console.print(f"On {kept} of the passages, which it was not fitted to; a linear map explains "
                          f"{facts['explained_linear']:.1%} of them.")  # fmt: skip
        console.print(f"Fitted on {facts['samples'] - kept} passages of {facts['length']} tokens, read twice.")
    elif "centres" in found.tensors:
        _show_concentration(console, concentration(found.tensors["centres"], int(facts["head_dim"])))
        console.print(f"Measured on {facts['samples']} passages of {facts['length']} tokens.")
    else:
        _show_entropy(console, found.tensors["entropy"].mean(dim=0))
        console.print(f"Measured on {facts['samples']} passages of {facts['length']} tokens.")
    console.print(f"Written to {out}; use it with -m {found.meta.method} -o calibration={out}", soft_wrap=True)


def _show_heads(console: Console, importance: Tensor, form: str) -> None:
    order = importance.flatten().argsort(descending=True, stable=True)[:SHOWN].tolist()
    console.print(f"The {len(order)} most important of {importance.numel()} KV heads")
    rows = [(*divmod(place, importance.shape[1]), f"{importance.flatten()[place]:{form}}") for place in order]
    console.print(_table(("layer", "head", "importance"), rows))


def _show_layers(console: Console, heads: Tensor, errors: Tensor) -> None:
    order = errors.argsort(descending=True, stable=True)[:SHOWN].tolist()
    console.print(f"The {len(order)} of {len(errors)} layers that suffer most from eviction")
    rows = [(n, f"{errors[n]:.1%}", ", ".join(map(str, heads[n, :4].tolist()))) for n in order]
    console.print(_table(("layer", "share of the error", "its best query heads"), rows))


def _show_entropy(console: Console, entropy: Tensor) -> None:
    console.print(f"Query entropy of {entropy.shape[1]} heads in {len(entropy)} layers")
    _show_spans(console, entropy)


def _show_concentration(console: Console, found: Tensor) -> None:
    console.print(f"How far queries point one way, from 0 to 1, in {found.shape[1]} heads of {len(found)} layers")
    _show_spans(console, found)


def _show_explained(console: Console, explained: Tensor, name: str) -> None:
    console.print(f"Variance of {name}'s log scores explained in {explained.numel()} KV heads: {explained.mean():.1%}")
    _show_spans(console, explained)


def _show_spans(console: Console, table: Tensor) -> None:
    rows = [(n, f"{row.min():.3f}", f"{row.mean():.3f}", f"{row.max():.3f}") for n, row in enumerate(table)]
    console.print(_table(("layer", "lowest", "mean", "highest"), rows))


def _table(columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row))
    return table
