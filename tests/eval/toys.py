"""A tokenizer of single characters, tasks that need no data, and a run of a small grid over a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from tests.models import VOCABULARY, tiny
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvthrift.eval.arm import arms
from kvthrift.eval.bench import Bench
from kvthrift.eval.config import Grid
from kvthrift.eval.folder import ROWS, RunFolder
from kvthrift.eval.provenance import session
from kvthrift.eval.rows import read_rows
from kvthrift.eval.runner import Runner
from kvthrift.eval.sample import Sample, Task, Turn

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@cache
def toy_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a character; ids that no character has are odd words, so that any answer decodes."""
    characters = ["\n", *map(chr, range(32, 127))]
    words = [f"<{number}>" for number in range(VOCABULARY - len(characters) - 1)]
    vocabulary = {word: number for number, word in enumerate(["?!", *characters, *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?!"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?!", clean_up_tokenization_spaces=False)
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer


@dataclass(frozen=True)
class Toy(Task):
    """Random letters, among which a word is hidden."""

    name = "toy.word"
    group = "toy"
    mode: str = "single"
    turns: int = 1
    scorer: str = "letters"
    new_tokens: int = 6
    chat: bool = True

    def samples(self, tokenizer: Any, *, length: int, count: int, seed: int, data: Path | None) -> Iterator[Sample]:
        for number in range(count):
            draw = Random(f"{seed}/{self.name}/{number}")
            words = ["".join(draw.choices(LETTERS, k=7)) for _ in range(length // 8)]
            golds = draw.sample(words, self.turns)
            turns = tuple(Turn(f" Where is {gold[:2]}?", (gold,), "Here:", self.new_tokens) for gold in golds)
            yield Sample(f"{number:03d}", self.name, " ".join(words), turns, self.scorer, self.chat, self.mode)


@dataclass(frozen=True)
class OtherToy(Toy):
    """The same under another name, so that there are two tasks."""

    name = "toy.other"


def letters(text: str, sample: Sample, turn: Turn) -> float:
    """A score that any change of the answer changes."""
    return sum(place * ord(letter) for place, letter in enumerate(text, 1)) % 101 / 100


SCORERS = {"letters": letters, "half": lambda text, sample, turn: 0.5}


def grid(**changes: Any) -> Grid:
    """A small grid over toy tasks."""
    values: dict[str, Any] = {
        "tasks": ["toy.word"], "methods": ["snapkv", "h2o"], "budgets": ["48"], "length": 160, "samples": 2,
        "options": {"snapkv": {"window": 8}},
    }  # fmt: skip
    return Grid.build(values | changes)


def bench(*, chat: bool = True, model: str = "llama") -> Bench:
    """A tiny model with the toy tokenizer."""
    return Bench(tiny(model), toy_tokenizer(chat=chat), page=16)


def runner(made: Grid, *tasks: Task, **changes: Any) -> Runner:
    """A runner of that grid; the toy task by default."""
    return Runner(**{
        "bench": bench(), "grid": made, "arms": arms(made), "tasks": tasks or (Toy(),), "scorers": SCORERS, **changes
    })  # fmt: skip


def run(path: Path, made: Grid, *tasks: Task, **changes: Any) -> list[dict[str, Any]]:
    """Run a grid in a folder, and give back its rows."""
    one = runner(made, *tasks, **changes)
    with RunFolder.open(path, made, one.arms, session(one.bench.model)) as folder:
        one.run(folder)
    return read_rows(path / ROWS)
