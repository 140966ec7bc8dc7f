"""``kvthrift inspect``: what it says is what caches hold; what it refuses leaves nothing behind."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from tests.cli.conftest import save_model
from tests.cli.test_refusals import refused
from typer.testing import Result

from kvthrift import method
from kvthrift.cli.heat import Budgets, heat_maps
from kvthrift.cli.paint import GUTTER, painted
from kvthrift.cli.place import Place
from kvthrift.cli.shade import MARKS, bar, level
from kvthrift.errors import ContextError, KvthriftError

Run = Callable[..., Result]


@pytest.fixture
def look(kvthrift: Run, model_folder: Path, text: Path) -> Run:
    """``kvthrift inspect`` on the tiny model and text, with a few tokens of answer."""

    def run(*words: object) -> Result:
        common = ("--model", model_folder, "--context", text, "--max-new-tokens", 8, "--page", 16)
        return kvthrift("inspect", *common, "--question", "why?", *words)

    return run


def measured(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found: dict[str, Any] = json.loads(result.stdout)
    return found


# -- what is said ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--hide-question",), ("--chunk", 100), ("--chunk", 100, "--hide-question")])
def test_answers_and_sizes_are_those_of_run(look: Run, ask: Run, more: tuple[object, ...]) -> None:
    found = measured(look("--budget", 64, "--json", *more))
    other = measured(ask("--budget", 64, "--json", *more))
    (arm,) = found["arms"]
    assert found["full"]["tokens"] == other["full"]["tokens"]
    assert (arm["answer"], arm["tokens"]) == (other["compressed"]["answer"], other["compressed"]["tokens"])
    assert arm["agreement"] == other["agreement"]
    assert arm["recipe"] == other["recipe"]
    later = found["prompt_tokens"] - len(found["tokens"])  # what was not read before compression came on top
    assert later == {(): 0, ("--chunk", 100): 1}.get(more, len("why?[end][answer]"))
    assert arm["entries"] == other["entries_after"] - 4 * later == 4 * 64  # layers and heads
    if not later:
        assert (arm["bytes"], found["full"]["bytes"]) == (other["bytes_after"], other["bytes_before"])


@pytest.mark.parametrize("more", [(), ("--hide-question",), ("--chunk", 100)])
@pytest.mark.parametrize("name", ["snapkv", "adakv", "streamingllm", "cake"])
def test_budgets_and_kept_tokens_agree(look: Run, name: str, more: tuple[object, ...]) -> None:
    found = measured(look("--method", name, "--budget", 64, "--json", *more))
    (arm,) = found["arms"]
    lengths = np.array(arm["lengths"])
    assert lengths.sum() == arm["entries"]
    assert sum(arm["kept_share"]) * 4 == pytest.approx(lengths.sum(), abs=0.1)
    assert len(arm["kept_share"]) == len(found["tokens"])
    assert (lengths.min() < lengths.max()) == (name in ("adakv", "cake"))


def test_sinks_and_recent_are_what_is_held(look: Run) -> None:
    found = measured(look("--method", "streamingllm", "--budget", 64, "--json"))
    share = found["arms"][0]["kept_share"]
    assert share == [1.0] * 4 + [0.0] * (len(share) - 64) + [1.0] * 60


def test_a_layer_left_whole(look: Run) -> None:
    found = measured(look("-o", "skip=0", "--budget", 64, "--json"))
    (arm,) = found["arms"]
    assert arm["lengths"] == [[len(found["tokens"])] * 2, [64, 64]]
    assert min(arm["kept_share"]) == 0.5
    assert arm["entries"] == 2 * 64  # in the layer that is compressed
    said = look("-o", "skip=0", "--budget", 64).stdout
    assert f"{2 * 64 + 2 * len(found['tokens']):,}" in said.split("snapkv@64")[1].split()


def test_layers_of_transformers_own_are_left_out(look: Run, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "gemma3", "gemma3")
    (arm,) = measured(look("--model", folder, "--budget", 64, "--json"))["arms"]
    assert arm["layers"] == [1, 3]


def test_tokens_are_the_text_that_was_read(look: Run, text: Path) -> None:
    content = text.read_text(encoding="utf-8").strip()
    for more, end in (((), "why?[end][answer]"), (("--hide-question",), "")):
        assert "".join(measured(look("--json", *more))["tokens"]) == f"[user]{content}\n\n{end}"


def test_several_methods_share_one_reading(look: Run) -> None:
    found = measured(look("--methods", "snapkv, keydiff,adakv,snapkv", "--budget", 64, "--json"))
    assert [arm["arm"] for arm in found["arms"]] == ["snapkv@64", "keydiff@64", "adakv@64"]
    for arm in found["arms"]:
        name = arm["arm"].removesuffix("@64")
        assert arm["recipe"] == method(name, budget=64).plain()
        alone = measured(look("--method", name, "--budget", 64, "--json"))
        assert arm == alone["arms"][0]
        assert found["full"] == alone["full"]


def test_who_holds_a_text(look: Run) -> None:
    found = measured(look("--method", "streamingllm", "--budget", 64, "--json", "--find", "line 15  of a"))
    assert found["find"]["text"] == "line 15 of a"
    ((start, stop),) = found["find"]["spans"]
    assert "".join(found["tokens"][start:stop]) == "line 15 of a"
    assert found["arms"][0]["find"] == {"whole": [[True, True]] * 2, "part": [[True, True]] * 2}
    gone = measured(look("--method", "streamingllm", "--budget", 64, "--json", "--find", "line 3"))
    assert gone["arms"][0]["find"] == {"whole": [[False, False]] * 2, "part": [[False, False]] * 2}


def test_quiet_prints_the_answers_alone(look: Run) -> None:
    found = measured(look("--methods", "snapkv,knorm", "--budget", 64, "--json"))
    result = look("--methods", "snapkv,knorm", "--budget", 64, "--quiet")
    assert result.stdout == "".join(f"{arm['answer']}\n" for arm in found["arms"])
    assert result.stderr == ""


def test_it_fits_80_columns(look: Run) -> None:
    result = look("--methods", "snapkv,adakv,streamingllm", "--budget", 64, "--find", "a text")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert max(map(cell_len, result.stdout.split("\n"))) <= 80
    for words in (
        "the question in sight", "after compression", "full cache", "adakv@64", "0-1", "h1", "# to 100%",
        "The text, as snapkv@64 holds it", 'The text "a text" is at tokens', "and 13 more places",
        "kept by 4 of 4 heads, in every layer", "parts from the full cache after", "line 15 of a text",
    ):  # fmt: skip
        assert words in result.stdout


def test_a_long_text_is_shown_in_part_unless_asked_for(look: Run, text: Path) -> None:
    text.write_text("".join(f"l{n}\n" for n in range(180)), encoding="utf-8")
    short, whole = (look("--budget", 64, *more).stdout for more in ((), ("--full-text",)))
    assert "heads on average" in short
    assert "heads on average" not in whole
    assert sum(f" l{n}\n" in short for n in range(180)) < 40
    assert all(f" l{n}\n" in whole for n in range(1, 180))


def test_progress_stays_on_stderr(look: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    result = look("--budget", 64, "--json")
    json.loads(result.stdout)
    for words in ("Loading the model", "Reading", "Decoding, snapkv", "Decoding, full cache"):
        assert words in result.stderr
    assert look("--budget", 64, "--quiet").stderr == ""


def test_a_page_is_written(look: Run, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    page = tmp_path / "page.html"
    result = look("--methods", "snapkv,adakv", "--budget", 64, "--html", page)
    assert result.exit_code == 0, result.output
    content = page.read_text(encoding="utf-8")
    assert "<html" in content
    for words in ("snapkv@64", "adakv@64", "text.txt", "256 of 2,4"):
        assert words in content
    refused(look("--html", page), "is there already")
    assert look("--html", page, "--force", "--quiet").exit_code == 0


# -- what is refused ---------------------------------------------------------------------------------------------

REFUSALS = {
    "unknown method": (("--methods", "snapkv,snapkvv"), "unknown method 'snapkvv'. Did you mean 'snapkv'?"),
    "no method": (("--methods", " ,"), "--methods names none"),
    "one and several": (("--methods", "tova", "-m", "snapkv"), "--methods names several methods, and --method belongs"),
    "recipe and several": (("--methods", "tova", "--recipe", "x.toml"), "and --recipe belongs to one"),
    "option of several": (("--methods", "tova", "-o", "window=8"), "and --option belongs to one"),
    "budget below the window": (("--budget", "8"), "snapkv always keeps 0 sinks and 32 recent entries"),
    "bytes for less than an entry": (("--budget", "100B"), "budget 100B is too few bytes for 4 heads"),
    "layer that is not there": (("-o", "skip=9"), "skip=[9] names layers that a model of 2 layers does not have"),
    "text that is not there": (("--find", "elsewhere"), "'elsewhere', does not stand in what is read and compressed"),
    "text in a hidden question": (("--find", "why?", "--hide-question"), "'why?', does not stand in what is read"),
    "text that is empty": (("--find", " "), "the text to find is empty"),
    "page in no folder": (("--html", "no/such/page.html"), "lies in a folder that does not exist"),
    "context that is missing": (("--context", "gone.txt"), "context file 'gone.txt' cannot be read"),
    "empty question": (("--question", " "), "the question is empty"),
    "answer longer than the model": (("--max-new-tokens", "2000"), "the model reads at most 1024"),
    "window wider than the text": (("-o", "window=700", "--budget", "800"), "fewer than the window of 700 newest"),
}


@pytest.mark.parametrize(("words", "sentence"), REFUSALS.values(), ids=REFUSALS)
def test_bad_input_is_refused_in_a_sentence(look: Run, words: tuple[str, ...], sentence: str) -> None:
    refused(look(*words), sentence)


def test_a_refused_run_leaves_no_page(look: Run, tmp_path: Path, text: Path) -> None:
    pytest.importorskip("plotly")
    refused(look("--budget", "100B", "--html", tmp_path / "page.html"), "too few bytes")
    assert list(tmp_path.iterdir()) == [text]


def test_a_page_that_cannot_be_made_leaves_nothing(
    look: Run, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> str:
        raise KvthriftError("plotly is not installed, so no page can be made. Install it.")

    pytest.importorskip("plotly")
    monkeypatch.setattr("kvthrift.eval.report.inspect_page", fails)
    monkeypatch.setattr("kvthrift.cli.inspect.load_model", None)  # refused before anything is read
    refused(look("--budget", "64", "--html", tmp_path / "page.html"), "plotly is not installed")
    assert list(tmp_path.iterdir()) == [text]


# -- how it is shown ---------------------------------------------------------------------------------------------


def shown(*renderables: object, width: int = 80, colours: bool = False) -> str:
    console = console_of(width=width, colours=colours)
    for one in renderables:
        console.print(one)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def console_of(*, width: int = 80, colours: bool = False) -> Console:
    system: Any = "256" if colours else None
    return Console(file=io.StringIO(), width=width, color_system=system, force_terminal=colours, no_color=not colours)


@pytest.mark.parametrize("heads", [1, 3, 8, 12, 32, 64, 200])
@pytest.mark.parametrize("colours", [True, False])
def test_any_number_of_heads_fits(heads: int, colours: bool) -> None:
    lengths = [[1000 + head * layer for head in range(heads)] for layer in range(4)]
    console = console_of(colours=colours)
    out = shown(heat_maps(console, [Budgets("some", range(4), lengths), Budgets("other", range(4), lengths)]))
    assert max(map(cell_len, out.split("\n"))) <= 80
    assert "some" in out
    assert "other" in out


def test_layers_that_hold_the_same_are_one_line() -> None:
    lengths = [[5, 5], [5, 5], [5, 5], [7, 3], [5, 5]]
    lines = shown(heat_maps(console_of(), [Budgets("x", [0, 1, 2, 5, 9], lengths)])).splitlines()
    assert [line.split()[0] for line in lines] == ["x", "layer", "0-2", "5", "9"]
    assert lines[3].split() == ["5", "█", "7", "▄", "3"]


def test_shades() -> None:
    assert [level(share) for share in (0, 0.01, 0.1, 0.11, 0.5, 0.51, 1)] == [0, 1, 1, 2, 3, 4, 5]
    assert [bar(share) for share in (0, 0.001, 0.5, 1)] == [" ", "▁", "▄", "█"]


def test_marks_stand_below_their_tokens() -> None:
    tokens = ["ab", " 日本", "\t", "c\n", "", "d"]
    shares = np.array([1.0, 0.2, 0.0, 0.6, 1.0, 0.0])
    out = [line.plain for line in painted(console_of(), tokens, shares, [], whole=True)]
    assert out == [
        f"{0:>{GUTTER - 2}}  ab 日本 c",
        " " * GUTTER + MARKS[5] * 2 + MARKS[2] * 5 + " " + MARKS[4],
        f"{5:>{GUTTER - 2}}  d",
    ]


def test_what_would_move_the_cursor_is_not_printed() -> None:
    out = shown(*painted(console_of(colours=True), ["a\x1b[2Jb\r"], np.ones(1), [], whole=True), colours=True)
    assert "\x1b[2J" not in out
    assert "\r" not in out


def test_a_place_in_the_text_is_shown() -> None:
    tokens = [f"w{n}\n" for n in range(400)]
    shares = np.zeros(400)
    shares[[90, 310]] = 1.0
    out = "".join(line.plain + "\n" for line in painted(console_of(), tokens, shares, [(200, 201)], whole=False))
    for word in ("w0", "w3", "w90", "w200", "w310", "w399"):
        assert f" {word}\n" in out
    assert " w150\n" not in out


# -- where a text stands -----------------------------------------------------------------------------------------

TOKENS = ["The key", " is", " 74", "21", ".\nThe", " key is", " 742", "1", "9, ask", " Ann", "a B", "ell"]


def test_a_text_may_lie_across_tokens_and_line_breaks() -> None:
    assert Place.given_by("7421", TOKENS).spans == ((2, 4), (6, 8))
    assert Place.given_by("21. The", TOKENS).spans == ((3, 5),)
    assert Place.given_by("Anna", TOKENS).text == "Anna"
    with pytest.raises(ContextError, match="'anna', does not stand"):
        Place.given_by("anna", TOKENS)


def test_bytes_of_a_character_belong_to_it() -> None:
    assert Place.given_by("é", ["a", "", "é", "b"]).spans == ((1, 3),)
    assert Place.given_by("b", ["a", "", "é", "b"]).spans == ((3, 4),)


@pytest.mark.parametrize(
    ("answer", "question", "text"),
    [
        ("7421", "What is the key?", "7421"),
        ("The key is: `7421'.", "What is the key?", "7421"),
        ("You should ask Anna Bell.", "Whom?", "ask Anna Bell"),
        ("The key is known.", "What is the key?", None),
        ("742", "What is the key?", None),  # part of a longer number
        ("", "What is the key?", None),
        ("... , .", "What is the key?", None),
    ],
)
def test_the_most_telling_piece_of_an_answer_is_looked_for(answer: str, question: str, text: str | None) -> None:
    found = Place.of_answer(answer, question, TOKENS)
    assert (found.text if found else None) == text
