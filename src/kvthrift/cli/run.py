"""``kvthrift run``: one question about one text, answered with the full cache and with a compressed one."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console

from kvthrift.cli import options as o
from kvthrift.cli.choose import choose_recipe
from kvthrift.cli.compare import Comparison, Task, check_window, measure, warm_up
from kvthrift.cli.files import check_target, read_text, write_whole
from kvthrift.cli.progress import Bars
from kvthrift.cli.prompt import build_prompt, check_asked, check_fits, cut, room
from kvthrift.cli.setting import Setting
from kvthrift.cli.show import show_comparison
from kvthrift.data import demo_text
from kvthrift.integrations.transformers.loading import load_model
from kvthrift.methods import method as recipe_of
from kvthrift.recipe import Recipe

EMBEDDED = "SmolLM2-135M-Instruct (embedded)"
DEMO_TOKENS = 4096
DEMO_QUESTION = "What was printed in large letters on the paper label of the bottle?"


def run(
    model: o.Model = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    method: o.MethodName = None,
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
    quiet: o.Quiet = False,
    as_json: o.AsJson = False,
    save_recipe: o.SaveRecipe = None,
    force: o.Force = False,
    debug: o.Debug = False,
) -> None:
    """Ask about a long text, with the full cache and a compressed one, and compare.

    Both read the same tokens through the same code. Without options this is a
    demo: Alice's first chapters, the embedded model, SnapKV with 512 entries.
    """
    chosen = choose_recipe(name=method, options=option or [], file=recipe, budget=budget, every=every, merge=merge)
    if save_recipe is not None:
        check_target(save_recipe, force=force)
    text = demo_text() if context is None else read_text(context)
    check_asked(text, question)
    with Bars(shown=not quiet) as bars:
        where = None if device == "auto" else device
        llm, tokenizer = load_model(model, dtype=dtype, device=where, progress=bars.stage)
        if tokens is None and context is None:
            tokens = min(DEMO_TOKENS, room(llm, tokenizer, question, max_new_tokens))
        prompt = build_prompt(tokenizer, text if tokens is None else cut(tokenizer, text, tokens), question)
        check_fits(llm, prompt, max_new_tokens)
        check_window(prompt, chosen)
        task = Task.plan(prompt, hide=hide_question, chunk=chunk, page=page, max_new_tokens=max_new_tokens)
        warm_up(llm, prompt)
        short = measure(llm, tokenizer, task, chosen, bars, chosen.name)  # first, as it may be refused
        full = None
        if as_json or not quiet:
            full = measure(llm, tokenizer, task, recipe_of("full"), bars, "full cache")
    if save_recipe is not None:
        write_whole(save_recipe, _recipe_text(chosen, save_recipe), force=force)
    if full is None:
        typer.echo(short.answer)
        return
    setting = Setting.of(llm, model or EMBEDDED, task, question, hidden=hide_question, recipe=chosen)
    found = Comparison(full, short)
    if as_json:
        typer.echo(json.dumps(setting.plain() | found.plain(), indent=2))
    else:
        show_comparison(Console(), setting, chosen, found)


def _recipe_text(recipe: Recipe, path: Path) -> str:
    return recipe.to_json() + "\n" if path.suffix == ".json" else recipe.to_toml()
