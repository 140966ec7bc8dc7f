"""The page in headless Chromium: filters, sorting, painted tokens, themes, a phone's width and paper."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tests.eval.report.conftest import Open
from tests.eval.report.pages import keep, page, run, snapshot

from kvthrift.eval.report import inspect_page

CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")
FOCUSED = "(({id, className, name}) => id || className || name)(document.activeElement)"
MOVED = """new Promise((done) => {
  const sum = (list) => done(list.getEntries().reduce((total, one) => total + one.value, 0));
  new PerformanceObserver(sum).observe({ type: "layout-shift", buffered: true });
  setTimeout(() => done(0), 500);
})"""
AA = 4.5


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = keep(tmp_path_factory.mktemp("runs") / "first", snapshot("snapkv@48"), snapshot("h2o@48"))
    return page(run(folder))


def arms(page: Page, group: int = 0, section: int = 0) -> list[str]:
    """Names of the rows that can be seen, in order."""
    table = page.locator(f'table[data-group="group-{group}"][data-section="{section}"]')
    return table.locator("tbody tr:visible th").all_inner_texts()


def traces(page: Page, plot: str = "group-0-quality") -> list[str]:
    names: list[str] = page.evaluate("id => document.getElementById(id).data.map((trace) => trace.name)", plot)
    return names


def heights(page: Page, plot: str) -> list[str]:
    names: list[str] = page.evaluate("id => document.getElementById(id).data[0].y", plot)
    return names


def test_a_method_is_filtered_from_tables_and_plots(show: Open, text: str) -> None:
    page = show(text)
    assert len(arms(page)) == 9
    assert "h2o" in traces(page)
    page.get_by_role("checkbox", name="h2o").click()
    for section in range(4):
        assert not [name for name in arms(page, 0, section) if "h2o" in name]
    assert len(arms(page, 1)) == 7
    assert "h2o" not in traces(page)
    assert not [name for name in heights(page, "group-0-agreement") if "h2o" in name]
    assert page.locator("#pick-arm option").all_inner_texts() == ["snapkv@48"]
    assert page.locator(".failures li:visible").count() == 0
    expect(page.locator("#count")).to_have_text("7 of 9 arms shown")
    page.get_by_role("button", name="Show everything").click()
    assert len(arms(page)) == 9


def test_filters_are_in_the_address(show: Open, text: str) -> None:
    page = show(text)
    page.get_by_role("checkbox", name="48").press("Space")
    page.get_by_role("checkbox", name="hidden").press("Space")
    page.locator("#filter-task").select_option("toy.other")
    assert page.url.endswith("#no-question=hidden&no-budget=48&task=toy.other")
    again = show(text, hash="#no-question=hidden&no-budget=48&task=toy.other")
    assert not again.locator("#group-0").is_visible()
    assert arms(again, 1) == ["full", "random@96", "streamingllm@96", "snapkv@96", "h2o@96"]


def test_a_task_has_its_own_numbers(show: Open, text: str) -> None:
    page = show(text)
    row = page.locator('table[data-group="group-0"][data-section="0"] tbody tr').nth(5)
    own = row.locator('[data-of="toy.other"]').inner_text()
    assert row.locator("td").nth(3).inner_text() != own
    page.locator("#filter-task").select_option("toy.other")
    assert row.locator("td").nth(3).inner_text() == own
    assert not row.locator('[data-of="toy.other"]').is_visible()
    expect(page.locator('table[data-group="group-0"] .task-name').first).to_have_text("toy.other")


def test_columns_are_sorted_by_keyboard(show: Open, text: str) -> None:
    page = show(text)
    head = page.locator('table[data-group="group-0"][data-section="0"] thead th').nth(2)
    button = head.get_by_role("button")
    button.focus()
    button.press("Enter")
    expect(head).to_have_attribute("aria-sort", "descending")
    down = arms(page)
    assert down[0] == "full"
    button.press("Space")
    expect(head).to_have_attribute("aria-sort", "ascending")
    assert arms(page)[-1] == "full"
    assert sorted(arms(page)) == sorted(down)
    assert page.locator("[aria-sort]").count() == 1


def test_rows_are_sorted_by_method_and_budget(show: Open, text: str) -> None:
    page = show(text)
    heads = page.locator('table[data-group="group-1"][data-section="3"] thead th')
    heads.nth(0).get_by_role("button").click()
    order = ["full", "h2o@48", "h2o@96", "random@48", "random@96", "snapkv@48", "snapkv@96"]
    assert arms(page, 1, 3) == [*order, "streamingllm@48", "streamingllm@96"]
    heads.nth(1).get_by_role("button").click()
    assert [name.partition("@")[2] for name in arms(page, 1, 3)] == ["48"] * 4 + ["96"] * 4 + [""]


def test_tokens_say_who_keeps_them(show: Open, text: str) -> None:
    page = show(text)
    said, painted = page.locator("#detail-said"), page.locator("#painted")
    painted.locator(".token").nth(3).hover()
    expect(said).to_have_text("Kept by all 6 heads.")
    painted.locator(".token").nth(10).click()
    expect(said).to_have_text("Kept by 1 of 6 heads (17%), in layers 2.")
    assert page.locator("#detail-grid .head.on").count() == 1
    page.mouse.move(0, 0)
    painted.focus()
    painted.press("End")
    expect(said).to_have_text("Gone from every head of every layer.")
    painted.press("Home")
    painted.press("ArrowRight")
    expect(page.locator("#detail-token")).to_contain_text("token 1")
    painted.press("ArrowDown")
    assert page.locator(".token.now").count() == 1
    assert painted.locator(".gold .token").count() == 3
    assert painted.inner_text().count("<script>") == 10
    assert page.title() == "first"
    page.locator("#pick-arm").select_option("h2o@48")
    painted.locator(".token").nth(21).hover()
    expect(said).to_have_text("Kept by 3 of 6 heads (50%), in layers 2, 5.")


def test_needles_follow_the_choice_of_arm(show: Open, text: str) -> None:
    page = show(text)
    before = page.locator("#needle-own-table").text_content()
    page.locator("#needle-arm").select_option("random@48")
    assert page.locator("#needle-own-table").text_content() != before
    assert heights(page, "needle-own") == ["0%", "50%", "100%"]


def test_everything_is_reached_by_keyboard(show: Open, text: str) -> None:
    page = show(text)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(160):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(FOCUSED))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert page.evaluate("document.activeElement === document.body") or outline != "none"
    assert {"filter-task", "method", "budget", "filters-reset", "sort", "scroll", "painted", "pick-arm"} <= reached


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_can_be_read(show: Open, text: str, theme: str) -> None:
    page = show(text, color_scheme=theme)
    dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (theme == "dark")
    found = page.evaluate(CONTRAST)
    assert len(found) > 300
    assert [one for one in found if one["ratio"] < AA] == []


def test_plots_change_with_the_theme(show: Open, text: str) -> None:
    page = show(text, color_scheme="light")
    colour = "document.getElementById('group-0-quality').layout.font.color"
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(300)
    assert page.evaluate(colour) != light


@pytest.mark.parametrize("width", [390, 768])
def test_narrow_screens_do_not_scroll_sideways(show: Open, text: str, width: int) -> None:
    page = show(text, width=width, height=844)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not page.get_by_role("checkbox", name="h2o").is_visible()
    page.locator("#filters-box summary").click()
    page.get_by_role("checkbox", name="h2o").click()
    assert len(arms(page)) == 7
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_nothing_moves_once_it_is_there(show: Open, text: str) -> None:
    page = show(text)
    assert page.evaluate(MOVED) < 0.1


def test_paper_is_light_and_has_no_controls(show: Open, text: str) -> None:
    page = show(text, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    page.wait_for_selector("html.paper")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.getElementById('group-0-quality').layout.font.color") == "#4b535d"
    for gone in ("#filters", ".detail", ".picks"):
        assert page.locator(gone).count() == 0 or not page.locator(gone).first.is_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_tables_need_no_script(show: Open, text: str) -> None:
    page = show(text, java_script_enabled=False)
    assert page.locator('table[data-group="group-0"] tbody tr').first.is_visible()
    assert not page.locator("#filters").is_visible()
    assert page.get_by_text("scripts are switched off").first.is_visible()


def test_snapshots_alone(show: Open) -> None:
    page = show(inspect_page([snapshot("snapkv@48"), snapshot("full")], title="Held", facts={"model": "tiny"}))
    assert page.locator("#pick-arm option").all_inner_texts() == ["snapkv@48", "full"]
    assert page.evaluate("document.getElementById('budgets').data[0].z.length") == 2
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
