"""``kvthrift serve``: vLLM's own OpenAI-compatible server, with kvthrift in it."""

from __future__ import annotations

import os
import shlex
from typing import Annotated, Any

import typer
from rich.console import Console

from kvthrift.cli import options as o
from kvthrift.cli.choose import choose_recipe
from kvthrift.integrations.vllm.contract import check_served, installed
from kvthrift.integrations.vllm.serving import command, flag, forecast, settings_for, shape_of

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}  # what we do not know is vLLM's
PROMPTS = (2048, 8192, 32768)
BLOCKS = {"cpu": 128, "cuda": 16}  # vLLM's own, where --block-size is not given


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id, as vLLM takes it.")],
    method: o.MethodName = None,
    option: o.Pairs = None,
    recipe: o.RecipeFile = None,
    budget: o.BudgetText = None,
    every: o.Every = None,
    chunks: Annotated[
        bool, typer.Option("--chunks", help="Compress while a prompt is read, too: after every step that reads a part.")
    ] = False,
    groups: Annotated[
        int | None,
        typer.Option(
            "--groups", min=1, help="For unequal layers: so many runs of neighbours, each with its layers' mean."
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare the scheduler's and the workers' counts at every step.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and the command, and start nothing.")
    ] = False,
    debug: o.Debug = False,
) -> None:
    """Start vLLM's server; each prompt, once read, gives most of its blocks back, and its answer as it grows (--every).

    All other flags are vLLM's and are handed on to it (see its own --help).
    """
    device = check_served()
    chosen = choose_recipe(name=method, options=option or [], file=recipe, budget=budget, every=every, merge=None)
    asked: dict[str, Any] = {"recipe": chosen.plain()}
    flags = {"chunks": chunks, "groups": groups, "check": check}
    asked |= {key: value for key, value in flags.items() if value}
    shape = shape_of(model, flag(context.args, "--kv-cache-dtype") or "auto")
    settings = settings_for(shape, asked)
    words = command(model, asked, context.args)
    console = Console(stderr=True)
    console.print(f"[bold]kvthrift[/bold] in vLLM {installed()}: {settings}", soft_wrap=True, highlight=False)
    given = flag(context.args, "--block-size")
    block = int(given) if given.isdigit() and int(given) else BLOCKS[device]
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "") if device == "cpu" else ""
    pool = shape.pool(context.args, space, block, len(settings.classes))
    for prompt in PROMPTS:
        console.print(f"  {forecast(settings, shape, prompt, block, pool)}", soft_wrap=True, highlight=False)
    if dry_run:
        console.print(shlex.join(words), soft_wrap=True, highlight=False)
        return
    os.execv(words[0], words)
