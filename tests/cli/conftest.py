"""A tiny model with a tokenizer whose tokens are bytes, saved as a folder; and the command, run in-process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.models import build, config
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from kvthrift.cli import app

TEMPLATE = "{% for turn in messages %}[user]{{ turn['content'] | trim }}[end]{% endfor %}[answer]"
POSITIONS = 1024

Run = Callable[..., Result]


def byte_tokenizer(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """One token a byte, but for the given merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate([*alphabet, *map("".join, merges)])}
    inner = Tokenizer(BPE(vocabulary, list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def save_model(folder: Path, architecture: str) -> Path:
    """A tiny model of that architecture and its tokenizer, as a folder."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    made = config(architecture, vocab_size=len(tokenizer), max_position_embeddings=POSITIONS)
    build(made).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture
def kvthrift(monkeypatch: pytest.MonkeyPatch) -> Run:
    """``kvthrift(*words, input=...)``, 80 columns wide and without colours."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*words: object, input: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words], input=input)

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"line {n} of a text about nothing much\n" for n in range(16)), encoding="utf-8")
    return file


@pytest.fixture
def ask(kvthrift: Run, model_folder: Path, text: Path) -> Run:
    """``kvthrift run`` on the tiny model and text, with a few tokens of answer."""

    def run(*words: object) -> Result:
        common = ("--model", model_folder, "--context", text, "--max-new-tokens", 8, "--page", 16)
        return kvthrift("run", *common, "--question", "why?", *words)

    return run
