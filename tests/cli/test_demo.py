"""The demo, on the embedded model and the beginning of its text."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from typer.testing import Result

from kvthrift.integrations.transformers.embedded import is_available

Run = Callable[..., Result]

pytestmark = pytest.mark.skipif(not is_available(), reason="the embedded model is not installed")


def test_the_demo_answers_with_a_fraction_of_the_cache(kvthrift: Run) -> None:
    result = kvthrift("run", "--tokens", 768, "--budget", 192, "--max-new-tokens", 8, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["bytes_after"] < 0.35 * found["bytes_before"]
    assert found["entries_after"] == 192 * 30 * 3
    assert found["full"]["answer"]
    assert found["compressed"]["answer"]
