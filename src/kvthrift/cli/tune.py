"""``kvthrift tune``: a search over a recipe's numbers and its budgets by layer, and the recipe file it ends in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvthrift.cli import options as o
from kvthrift.cli.choose import choose_recipe
from kvthrift.cli.progress import Bars
from kvthrift.cli.tune_bar import TuneBar, said
from kvthrift.cli.tune_page import LivePage
from kvthrift.errors import OptionError, RecipeError
from kvthrift.eval import tasks as registry
from kvthrift.eval.bench import Bench
from kvthrift.eval.config import Grid
from kvthrift.eval.metrics.answers import SCORERS
from kvthrift.eval.prompt import build_prompt
from kvthrift.eval.provenance import session
from kvthrift.eval.record import Score
from kvthrift.eval.worker import load_bench
from kvthrift.integrations.transformers.loading import load_model
from kvthrift.runtime.compress import check_floor
from kvthrift.tune.aim import Aim
from kvthrift.tune.plan import plan
from kvthrift.tune.probe import Asked, Probes, prompts_of
from kvthrift.tune.sample import check_optuna
from kvthrift.tune.search import ENGINES, Progress, Search
from kvthrift.tune.shards import Shards
from kvthrift.tune.space import Space
from kvthrift.tune.study import BEST, FRONT, Study, check_study

SEARCH = "Search"
ON = "What it is measured on"
INTERRUPTED = 130

Tell = Callable[[Progress], None]


def _option(help: str, *flags: str, panel: str = SEARCH, **more: Any) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=panel, **more)


Out = Annotated[
    Path, _option("Where trials and the result go; a study that is there is gone on with.", metavar="FOLDER")
]
Objective = Annotated[
    str, _option("score or agreement (with the full cache), at the budget; bytes, at a floor; or score,bytes both.")
]
Quality = Annotated[str, _option("What the floor of 'bytes' is of: agreement or score.")]
Floor = Annotated[float, _option("Least share of tokens that agree, or of the full cache's score.")]
Trials = Annotated[int, _option("Recipes to measure, at most.", min=2)]
Engine = Annotated[str, _option("cma (EvolKV's groups of layers, one after another) or optuna.")]
Vary = Annotated[
    list[str] | None,
    _option(
        "layers, options, or one option (scorer.kernel, scorer.kernel=3:15); again for more. \\[cma: layers]",
        metavar="WHAT",
    ),
]
Group = Annotated[int, _option("Layers searched together (cma), or that share a weight (optuna).", min=1)]
Population = Annotated[int | None, _option("Recipes of a generation of cma.", min=2)]
Sigma = Annotated[float, _option("First step of cma, in multiples of the budget.", min=0.001)]
Lam = Annotated[float, _option("How much keeping to the budget counts.", "--lambda")]
Gamma = Annotated[float, _option("How much of that is lost by spending nothing.")]
Tasks = Annotated[str, _option("Tasks, groups of tasks, or patterns.", metavar="A,B,...", panel=ON)]
Length = Annotated[int, _option("Tokens of a sample.", min=1, panel=ON)]
Samples = Annotated[int, _option("Of each task; all are held in memory, read.", min=1, panel=ON)]
Seed = Annotated[int, _option("Of the samples and of the search.", panel=ON)]
Data = Annotated[str, _option("Local data sets.", metavar="FOLDER", panel=ON)]
MaxNew = Annotated[int, _option("Cut answers there; 0 for the tasks' own limits.", min=0, panel=ON)]
TaskPairs = Annotated[
    list[str] | None, _option("Set on every task that has it.", "--task-option", metavar="KEY=VALUE", panel=ON)
]
Workers = Annotated[int, _option("Processes that share the prompts, each with its own copy of the model.", min=1)]


def tune(
    out: Out,
    model: o.Model = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    method: o.MethodName = None,
    option: o.Pairs = None,
    recipe: o.RecipeFile = None,
    budget: o.BudgetText = None,
    every: o.Every = None,
    merge: o.Merge = None,
    page: o.Page = 64,
    tasks: Tasks = "niah.number",
    task_option: TaskPairs = None,
    length: Length = 1024,
    samples: Samples = 4,
    hide_question: o.HideQuestion = False,
    data: Data = "",
    max_new_tokens: MaxNew = 0,
    objective: Objective = "score",
    quality: Quality = "agreement",
    floor: Floor = 0.99,
    vary: Vary = None,
    trials: Trials = 40,
    engine: Engine = "cma",
    group: Group = 8,
    population: Population = None,
    sigma: Sigma = 0.3,
    lam: Lam = 0.3,
    gamma: Gamma = 0.2,
    seed: Seed = 0,
    workers: Workers = 1,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the file's name.")] = False,
    debug: o.Debug = False,
) -> None:
    """Search for a better recipe: budgets by layer and numeric options, by what a model answers with them.

    The result is a recipe file for 'run --recipe' and 'eval --recipes'. A search that is cut short goes on where it was
    when it is started again with the same settings.
    """
    aim = Aim(objective, quality, floor, lam, gamma)
    if engine not in ENGINES:
        raise OptionError(f"--engine {engine!r} is not one there is. Valid: {', '.join(ENGINES)}.")
    if aim.trades and engine == "cma":
        raise OptionError(f"--objective {objective} has two values, and cma takes one. Give --engine optuna.")
    if engine == "optuna":
        check_optuna()
    start = choose_recipe(name=method, options=option or [], file=recipe, budget=budget, every=every, merge=merge)
    if start.budget is None:
        raise RecipeError(f"recipe {start.name} has no budget, so there is nothing to tune. Give --budget.")
    if start.budget.unit == "entries":
        import torch

        check_floor(start, torch.tensor([int(start.budget.amount)]))
    grid = Grid.build({
        "tasks": tasks, "model": model or "", "methods": [], "length": length, "samples": samples, "seed": seed,
        "question": "hidden" if hide_question else "visible", "data": data, "dtype": dtype, "device": device,
        "page": page, "max_new_tokens": max_new_tokens, "task_options": dict(map(_pair, task_option or [])),
    })  # fmt: skip
    chosen = registry.find(grid.tasks, **grid.task_options)
    console = Console(stderr=True, quiet=quiet)
    with Bars(shown=not quiet) as bars:
        where = None if device == "auto" else device
        llm, tokenizer = load_model(model, dtype=dtype, device=where, progress=bars.stage)
    bench = Bench(llm, tokenizer, page)
    asked = prompts_of(grid, bench, chosen, SCORERS)
    bench.check_length(grid.length, "a sample")
    space = plan(
        llm, start, aim, vary or (["layers"] if engine == "cma" else []),
        longest=_longest(bench, asked), page=page, group=group, free=engine == "cma",
    )  # fmt: skip
    settings: dict[str, Any] = {
        "recipe": start.plain(), "objective": objective, "quality": aim.judges, "floor": floor, "vary": vary or [],
        "engine": engine, "trials": trials, "group": group, "population": population or 0, "sigma": sigma,
        "lambda": lam, "gamma": gamma, "seed": seed, "weights": session(llm)["weights"],
        "grid": {key: value for key, value in grid.plain().items() if key not in ("device", "methods", "budgets")},
    }  # fmt: skip
    check_study(out, settings)
    with (
        TuneBar(console, aim) as bar,
        Study.open(out, settings) as study,
        _interruptible(console, study),
        _measuring(workers, grid, bench, asked, space, follows=aim.judges == "agreement") as measures,
    ):
        watched = LivePage(out, console)
        tell = partial(_both, bar.tell, watched.tell)
        search = Search(space, aim, measures, study, engine, trials, sigma, population, seed, tell)
        best = search.run()
        watched.finish()
    first = search.seen[min(search.seen)]
    for label, measured in (("full cache", search.full), ("at first", first.measured), ("best", best.measured)):
        if measured is not None:
            console.print(f"{label:10}  {said(aim, measured)}", soft_wrap=True, highlight=False)
    console.print(
        f"{len(search.seen)} recipes measured on {len(asked)} prompts; see {out / FRONT if aim.trades else out}"
    )
    typer.echo(str(out / BEST))


def _both(one: Tell, other: Tell, progress: Progress) -> None:
    one(progress)
    other(progress)


def _longest(bench: Bench, asked: list[Asked]) -> int:
    prompts = (build_prompt(bench.tokenizer, one.sample, visible=one.visible) for one in asked)
    return max(len(reading.ids) for prompt in prompts for reading in prompt.readings)


@contextmanager
def _measuring(
    workers: int, grid: Grid, bench: Bench, asked: list[Asked], space: Space, *, follows: bool
) -> Iterator[Probes | Shards]:
    found: Probes | Shards
    if workers == 1:
        found = Probes(bench, SCORERS, asked, space.corners, follows=follows)
    else:
        found = Shards(workers, partial(_ready, grid), asked, space.corners, follows=follows)
    try:
        yield found
    finally:
        found.close()


@contextmanager
def _interruptible(console: Console, study: Study) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console.print(
            f"interrupted: {study.count} trials are kept; the same command goes on from there.", soft_wrap=True
        )
        raise typer.Exit(INTERRUPTED) from None


def _ready(grid: Grid, number: int) -> tuple[Bench, dict[str, Score]]:
    return load_bench(grid, number), SCORERS


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise OptionError(f"--task-option {text!r} has no value, so it sets nothing. Write it as key=value.")
    value = value.strip()
    return key.strip().replace("-", "_"), int(value) if value.lstrip("-").isdigit() else value
