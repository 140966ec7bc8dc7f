"""The options that verbs share: how each is spelled and explained. Their defaults are the verb's business."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvthrift.part import parts

MODEL = "Model"
COMPRESSION = "Compression"
TEXT = "Text"
OUTPUT = "Output"

Model = Annotated[
    str | None,
    typer.Option(help="Folder or hub id. [dim]\\[default: the embedded SmolLM2-135M][/dim]", rich_help_panel=MODEL),
]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16 or float32.", rich_help_panel=MODEL)]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=MODEL)]

MethodName = Annotated[
    str | None,
    typer.Option(
        "--method",
        "-m",
        metavar="NAME",
        help="One of 'kvthrift methods'. [dim]\\[default: snapkv][/dim]",
        rich_help_panel=COMPRESSION,
    ),
]
Pairs = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        help="An option of the method; can be given again.",
        rich_help_panel=COMPRESSION,
    ),
]
RecipeFile = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="A recipe (TOML or JSON) instead of a method.",
        rich_help_panel=COMPRESSION,
    ),
]
BudgetText = Annotated[
    str | None,
    typer.Option(
        "--budget",
        "-b",
        metavar="SIZE",
        help="Entries a KV head (512), a share (25%) or bytes in all (64MiB). [dim]\\[default: 512][/dim]",
        rich_help_panel=COMPRESSION,
    ),
]
Every = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Compress again after so many decoded tokens.", rich_help_panel=COMPRESSION),
]
Merge = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"What becomes of what goes: {' or '.join(sorted(parts()['merge']))}.",
        rich_help_panel=COMPRESSION,
    ),
]
Page = Annotated[
    int, typer.Option(min=1, metavar="N", help="Entries a page of the store.", rich_help_panel=COMPRESSION)
]
Chunk = Annotated[
    int | None,
    typer.Option(min=2, metavar="N", help="Read, and compress, so many tokens at a time.", rich_help_panel=COMPRESSION),
]

Context = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="The text; - for stdin. [dim]\\[default: Alice's Adventures in Wonderland][/dim]",
        rich_help_panel=TEXT,
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="How much of the text is read. [dim]\\[default: a file whole, Alice 4096][/dim]",
        rich_help_panel=TEXT,
    ),
]
Question = Annotated[str, typer.Option(help="What is asked after the text.", rich_help_panel=TEXT)]
HideQuestion = Annotated[
    bool, typer.Option("--hide-question", help="Compress before the question is seen.", rich_help_panel=TEXT)
]
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.", rich_help_panel=TEXT)]

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print nothing but the answer of the compressed cache.", rich_help_panel=OUTPUT),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.", rich_help_panel=OUTPUT)]
SaveRecipe = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Save the recipe (.toml or .json).", rich_help_panel=OUTPUT),
]
Force = Annotated[bool, typer.Option("--force", help="Let --save-recipe overwrite a file.", rich_help_panel=OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.", rich_help_panel=OUTPUT)]
