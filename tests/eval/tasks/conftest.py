"""Two tokenizers and the data folder: a toy, the embedded model's, and local data where there is any."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.eval.tasks.toy import Words
from transformers import AutoTokenizer

from kvthrift.eval.sample import Tokenizer
from kvthrift.integrations.transformers.embedded import embedded_path, is_available

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    return Words()


@pytest.fixture(scope="session")
def smol() -> Tokenizer:
    if not is_available():
        pytest.skip("the embedded model is not installed")
    tokenizer = AutoTokenizer.from_pretrained(embedded_path())
    tokenizer.model_max_length = 10**9  # texts are measured here, not read by a model
    return tokenizer


@pytest.fixture(params=["words", "smol"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def data() -> Path:
    folder = Path(os.environ.get("KVTHRIFT_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no local data: set KVTHRIFT_DATA")
    return folder


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nobody has any."""
    monkeypatch.delenv("KVTHRIFT_DATA", raising=False)
