"""``kvthrift inspect``: what compressed caches hold of one prompt, by layer, head and token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvthrift.cli import options as o
from kvthrift.cli.choose import choose_recipe, choose_recipes
from kvthrift.cli.compare import Task, check_window
from kvthrift.cli.files import check_target, read_text, write_whole
from kvthrift.cli.inspection import Inspection, inspect_prompt
from kvthrift.cli.progress import Bars
from kvthrift.cli.prompt import build_prompt, check_asked, check_fits, cut, room
from kvthrift.cli.run import DEMO_QUESTION, DEMO_TOKENS, EMBEDDED
from kvthrift.cli.setting import Setting
from kvthrift.cli.show_inspection import facts, show_inspection
from kvthrift.data import demo_text
from kvthrift.integrations.transformers.cache import Cache
from kvthrift.integrations.transformers.loading import load_model

ALICE = "Alice's Adventures in Wonderland"

Methods = Annotated[
    str | None,
    typer.Option(metavar="A,B,...", help="Several methods, side by side.", rich_help_panel=o.COMPRESSION),
]
Find = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Say which heads hold it. [dim]\\[default: the full cache's answer][/dim]",
        rich_help_panel=o.OUTPUT,
    ),
]
FullText = Annotated[
    bool,
    typer.Option(
        "--full-text", help="Paint all of a long text, not its head, tail and peaks.", rich_help_panel=o.OUTPUT
    ),
]
Html = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the same as a page, for a browser.", rich_help_panel=o.OUTPUT),
]
Force = Annotated[bool, typer.Option("--force", help="Let --html overwrite a file.", rich_help_panel=o.OUTPUT)]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Print nothing but the answers of the compressed caches.", rich_help_panel=o.OUTPUT
    ),
]


def inspect(
    model: o.Model = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    method: o.MethodName = None,
    methods: Methods = None,
    option: o.Pairs = None,
    recipe: o.RecipeFile = None,
    budget: o.BudgetText = None,
    every: o.Every = None,
    merge: o.Merge = None,
    chunk: o.Chunk = None,
    page: o.Page = 64,
    context: o.Context = None,
    tokens: o.Tokens = None,
    question: o.Question = DEMO_QUESTION,
    hide_question: o.HideQuestion = False,
    max_new_tokens: o.MaxNewTokens = 64,
    find: Find = None,
    full_text: FullText = False,
    html: Html = None,
    force: Force = False,
    quiet: Quiet = False,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Show what a compressed cache holds of a text: how much in which layer and head, and which words.

    The prompt is read as by 'kvthrift run'; what is shown is what the cache holds
    right after compression, before anything is answered.
    """
    flags: dict[str, Any] = {
        "name": method, "options": option or [], "file": recipe, "budget": budget, "every": every, "merge": merge
    }  # fmt: skip
    chosen = (choose_recipe(**flags),) if methods is None else choose_recipes(names=methods, **flags)
    as_page = None if html is None else _page_maker(html, force=force)
    text = demo_text() if context is None else read_text(context)
    check_asked(text, question)
    with Bars(shown=not quiet) as bars:
        where = None if device == "auto" else device
        llm, tokenizer = load_model(model, dtype=dtype, device=where, progress=bars.stage)
        for one in chosen:
            Cache(llm.config, one, page=page)  # refused before anything is read
        if tokens is None and context is None:
            tokens = min(DEMO_TOKENS, room(llm, tokenizer, question, max_new_tokens))
        prompt = build_prompt(tokenizer, text if tokens is None else cut(tokenizer, text, tokens), question)
        check_fits(llm, prompt, max_new_tokens)
        for one in chosen:
            check_window(prompt, one)
        task = Task.plan(prompt, hide=hide_question, chunk=chunk, page=page, max_new_tokens=max_new_tokens)
        found = inspect_prompt(llm, tokenizer, task, chosen, bars, question, find)
    setting = Setting.of(llm, model or EMBEDDED, task, question, hidden=hide_question, recipe=chosen[0])
    if html is not None and as_page is not None:
        name = ALICE if context is None else "stdin" if context == "-" else Path(context).name
        write_whole(html, as_page(found, setting, name), force=force)
    if as_json:
        said = {key: value for key, value in setting.plain().items() if key != "recipe"}
        typer.echo(json.dumps(said | found.plain(), indent=2))
    elif quiet:
        for arm in found.arms:
            typer.echo(arm.answer)
    else:
        show_inspection(Console(), setting, found, full_text=full_text)


def _page_maker(path: Path, *, force: bool) -> Callable[[Inspection, Setting, str], str]:
    """What makes the page, once all that could stop it was looked at.

    Raises:
        KvthriftError: it could not be written there, or a package that it takes is not installed.
    """
    check_target(path, force=force)
    from kvthrift.eval.report import inspect_page

    inspect_page([], title="", facts={})  # an empty one, to be refused before anything is read

    def page(found: Inspection, setting: Setting, name: str) -> str:
        said = {
            "question": setting.question,
            "prompt": f"{setting.prompt_tokens:,} tokens, {len(found.tokens):,} of them compressed",
            **{f"recipe {arm.name}": str(arm.recipe) for arm in found.arms},
            **facts(found),
            "model": f"{setting.model}, {setting.dtype}",
            "machine": setting.device,
            "versions": ", ".join(f"{name} {version}" for name, version in setting.versions.items()),
        }
        return inspect_page(found.snapshots(name, setting.question), title=f"What caches held of {name}", facts=said)

    return page
