"""``kvthrift eval``: a grid of methods, budgets and tasks, run to the end or gone on with, and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvthrift.cli import options as o
from kvthrift.cli.grid_bar import GridBar
from kvthrift.cli.progress import Bars
from kvthrift.errors import OptionError
from kvthrift.eval import tasks as registry
from kvthrift.eval.arm import arms as arms_of
from kvthrift.eval.bench import Bench
from kvthrift.eval.config import Grid, read_config
from kvthrift.eval.folder import RunFolder, check_folder, read_run
from kvthrift.eval.formats import FORMATS
from kvthrift.eval.metrics.answers import SCORERS
from kvthrift.eval.prompt import NO_TEMPLATE
from kvthrift.eval.provenance import session
from kvthrift.eval.record import Score
from kvthrift.eval.runner import Runner
from kvthrift.eval.table import tables
from kvthrift.eval.worker import load_bench
from kvthrift.eval.workers import Crew
from kvthrift.integrations.transformers.loading import load_model

RUN = "Run"
WHAT = "What is compared"
INTERRUPTED = 130


def _names(help: str, *flags: str, panel: str = WHAT) -> Any:
    return typer.Option(*flags, metavar="A,B,...", help=help, rich_help_panel=panel)


Out = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER", help="Where rows go; one that is there already is gone on with.", rich_help_panel=RUN
    ),
]
Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A grid in TOML; flags override it.", rich_help_panel=RUN)
]
Methods = Annotated[
    str | None, _names("Methods; full, random and streamingllm are always there. [dim]\\[snapkv][/dim]")
]
Recipes = Annotated[str | None, _names("Recipe files (TOML or JSON).")]
Budgets = Annotated[str | None, _names("Entries a KV head (512), shares (10%) or bytes (64MiB). [dim]\\[512][/dim]")]
Tasks = Annotated[str | None, _names("Tasks, groups of tasks, or patterns (ruler.niah_*).")]
Length = Annotated[
    int | None, typer.Option(min=1, help="Tokens of a sample. [dim]\\[4096][/dim]", rich_help_panel=WHAT)
]
Samples = Annotated[int | None, typer.Option(min=1, help="Of each task. [dim]\\[20][/dim]", rich_help_panel=WHAT)]
Hide = Annotated[
    bool, typer.Option("--hide-question", help="Compress before the question is seen.", rich_help_panel=WHAT)
]
Question = Annotated[
    str | None, typer.Option(help="visible, hidden or both. [dim]\\[visible][/dim]", rich_help_panel=WHAT)
]
Seed = Annotated[int | None, typer.Option(help="Another one makes other samples.", rich_help_panel=WHAT)]
Data = Annotated[str | None, typer.Option(metavar="FOLDER", help="Local data sets.", rich_help_panel=WHAT)]
Pairs = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="METHOD.KEY=VALUE",
        help="An option of one method; again for more.",
        rich_help_panel=WHAT,
    ),
]
TaskPairs = Annotated[
    list[str] | None,
    typer.Option("--task-option", metavar="KEY=VALUE", help="Set on every task that has it.", rich_help_panel=WHAT),
]
Model = Annotated[
    str | None,
    typer.Option(help="Folder or hub id. [dim]\\[the embedded SmolLM2-135M][/dim]", rich_help_panel=o.MODEL),
]
Dtype = Annotated[str | None, typer.Option(help="auto, bfloat16 or float32.", rich_help_panel=o.MODEL)]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.", rich_help_panel=o.MODEL)]
Page = Annotated[int | None, typer.Option(min=1, help="Entries a page. [dim]\\[64][/dim]", rich_help_panel=o.MODEL)]
Alone = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="On so many samples a task each arm reads by itself, and is timed. [dim]\\[1][/dim]",
        rich_help_panel=RUN,
    ),
]
Snapshots = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="On so many samples a task, keep what each cache held after compression. [dim]\\[1][/dim]",
        rich_help_panel=RUN,
    ),
]
Separate = Annotated[
    bool, typer.Option("--separate-prefill", help="Each arm reads every sample by itself.", rich_help_panel=RUN)
]
Retry = Annotated[
    bool, typer.Option("--retry-failed", help="Measure again what failed in an earlier start.", rich_help_panel=RUN)
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Cut answers there, where a task allows more.", rich_help_panel=WHAT)
]
NoAgreement = Annotated[
    bool,
    typer.Option(
        "--no-agreement", help="Do not follow the full cache's answers: about twice as fast.", rich_help_panel=RUN
    ),
]
NoPhysics = Annotated[
    bool, typer.Option("--no-physics", help="Do not look up what eviction did to the tokens.", rich_help_panel=RUN)
]
Workers = Annotated[
    int,
    typer.Option(
        min=1,
        help="Processes that measure at once, each with its own copy of the model. Timed samples come first, alone.",
        rich_help_panel=RUN,
    ),
]
Batch = Annotated[
    int,
    typer.Option(
        min=1,
        help="Samples of a task answered together; needs --no-agreement and --no-physics. Fills a GPU.",
        rich_help_panel=RUN,
    ),
]
Shown = Annotated[str, typer.Option("--format", help=f"Of the tables: {', '.join(FORMATS)}.", rich_help_panel=o.OUTPUT)]


def eval(
    out: Out,
    config: Config = None,
    model: Model = None,
    dtype: Dtype = None,
    device: Device = None,
    page: Page = None,
    methods: Methods = None,
    recipes: Recipes = None,
    budgets: Budgets = None,
    option: Pairs = None,
    tasks: Tasks = None,
    task_option: TaskPairs = None,
    length: Length = None,
    samples: Samples = None,
    hide_question: Hide = False,
    question: Question = None,
    seed: Seed = None,
    data: Data = None,
    alone: Alone = None,
    snapshots: Snapshots = None,
    separate_prefill: Separate = False,
    retry_failed: Retry = False,
    max_new_tokens: MaxNewTokens = None,
    no_agreement: NoAgreement = False,
    no_physics: NoPhysics = False,
    workers: Workers = 1,
    batch: Batch = 1,
    format: Shown = "md",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the tables.")] = False,
    debug: o.Debug = False,
) -> None:
    """Run methods at several budgets on several tasks, all on the same samples, and compare them.

    The full cache, random eviction and sinks with recent entries are always among them. A run that is cut short goes
    on where it was when it is started again with the same settings. What fails is counted, not left out.
    """
    flags = {
        "model": model, "dtype": dtype, "device": device, "page": page, "methods": methods, "recipes": recipes,
        "budgets": budgets, "tasks": tasks, "length": length, "samples": samples, "seed": seed, "data": data,
        "question": one_question(question, hide_question), "alone": -1 if separate_prefill else alone,
        "max_new_tokens": max_new_tokens, "snapshots": snapshots,
        "agreement": False if no_agreement else None, "physics": False if no_physics else None,
    }  # fmt: skip
    show = format_of(format)
    grid = grid_of(config, flags, option or [], task_option or [])
    check_workers(workers, grid)
    arms = arms_of(grid)
    chosen = registry.find(grid.tasks, **grid.task_options)
    check_folder(out, grid, arms)
    console = Console(stderr=True, quiet=quiet)
    with Bars(shown=not quiet) as bars:
        where = None if grid.device == "auto" else grid.device
        llm, tokenizer = load_model(grid.model or None, dtype=grid.dtype, device=where, progress=bars.stage)
    if not tokenizer.chat_template:
        console.print(f"note: {NO_TEMPLATE}.")
    with GridBar(console) as bar:
        crew = crew_of(workers, grid)
        bench = Bench(llm, tokenizer, grid.page, grid.agreement, grid.physics)
        runner = Runner(bench, grid, arms, chosen, SCORERS, bar.tell, retry_failed, crew, batch)
        runner.check()
        with RunFolder.open(out, grid, arms, session(llm)) as folder:
            _run(runner, folder, console)
    run = read_run(out)
    typer.echo(show([(run, tables(run))]), nl=False)


def _run(runner: Runner, folder: RunFolder, console: Console) -> None:
    try:
        runner.run(folder)
    except KeyboardInterrupt:
        console.print(
            f"interrupted: {folder.rows.count} rows are kept; the same command goes on from there.", soft_wrap=True
        )
        raise typer.Exit(INTERRUPTED) from None


def grid_of(config: Path | None, flags: dict[str, Any], options: Sequence[str], task_options: Sequence[str]) -> Grid:
    """The grid of a config file as flags change it.

    Raises:
        KvthriftError: either cannot be read.
    """
    values = {} if config is None else read_config(config)
    values |= {key: value for key, value in flags.items() if value is not None}
    if options:
        values["options"] = _merged(values.get("options", {}), options)
    if task_options:
        values["task_options"] = {**values.get("task_options", {}), **dict(_pair(text) for text in task_options)}
    return Grid.build(values)


def check_workers(count: int, grid: Grid) -> None:
    """Refuse workers where they could do nothing.

    Raises:
        OptionError: every sample is to be timed.
    """
    if count > 1 and grid.alone < 0:
        raise OptionError(
            f"--workers {count} and --separate-prefill (alone = -1) contradict each other: every sample would be "
            "timed, and seconds mean nothing while other workers run. Leave one of them out."
        )


def crew_of(count: int, grid: Grid) -> Crew | None:
    """Workers that load what this process has loaded; None for one, which is this process."""
    return None if count == 1 else Crew(count, partial(_ready, grid))


def _ready(grid: Grid, number: int) -> tuple[Bench, dict[str, Score]]:
    return load_bench(grid, number), SCORERS


def one_question(question: str | None, hidden: bool) -> str | None:
    """``--question``, or what ``--hide-question`` means.

    Raises:
        OptionError: they contradict each other.
    """
    if hidden and question not in (None, "hidden"):
        raise OptionError(f"--hide-question and --question {question} contradict each other. Give one of them.")
    return "hidden" if hidden else question


def format_of(name: str) -> Any:
    """A format by name.

    Raises:
        OptionError: there is none.
    """
    if name not in FORMATS:
        raise OptionError(f"--format {name!r} is not one there is. Valid: {', '.join(FORMATS)}.")
    return FORMATS[name]


def _merged(known: dict[str, Any], pairs: Sequence[str]) -> dict[str, Any]:
    out = {name: dict(table) for name, table in known.items()}
    for text in pairs:
        key, value = _pair(text)
        method, dot, option = key.partition(".")
        if not dot:
            raise OptionError(f"--option {text!r} does not say whose it is. Write it as method.key=value.")
        out.setdefault(method, {})[option] = value
    return out


def _pair(text: str) -> tuple[str, Any]:
    """``key=value``, numbers as numbers."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise OptionError(f"option {text!r} has no value, so it sets nothing. Write it as key=value.")
    value = value.strip()
    return key.strip().replace("-", "_"), int(value) if value.lstrip("-").isdigit() else value
