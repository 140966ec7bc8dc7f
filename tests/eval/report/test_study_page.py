"""The page of a search in headless Chromium: its plots, its table, themes and a phone's width."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.eval.report.conftest import Open
from tests.tune.pages import BUDGETS, write_study

from kvthrift.tune.report import html, read_study


@pytest.fixture
def text(tmp_path: Path) -> str:
    return html([read_study(write_study(tmp_path / "study"))])


def test_points_front_and_result_are_drawn(show: Open, text: str) -> None:
    page = show(text)
    front, others, best = page.evaluate("document.getElementById('study-0-front').data.map(({x, y}) => [x, y])")
    small, middle, large = (size / 2**20 for size in (3000, 4000, 5000))
    assert front == [[small, middle, large], [40, 75, 75]]
    assert sorted(others[0]) == [small, middle, large]
    assert best == [[middle], [75]]
    course = page.evaluate("document.getElementById('study-0-course').data[0].y")
    assert course == [50, 50, 75, 75]
    assert page.evaluate("document.getElementById('study-0-layers').data[0].y") == list(BUDGETS)


def test_every_trial_is_in_the_table(show: Open, text: str) -> None:
    page = show(text)
    page.get_by_text("All 6 trials as a table").click()
    assert page.locator("tbody tr").count() == 6
    assert "best" in page.locator("tbody tr").nth(3).inner_text()
    assert "no room" in page.locator("tbody tr").nth(2).inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(show: Open, text: str, scheme: str) -> None:
    page = show(text, width=360, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
