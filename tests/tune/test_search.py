"""A search from end to end: what it finds, that it repeats, goes on after any cut, and says no where it must."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.eval.test_killed import HOME
from tests.eval.toys import SCORERS
from tests.tune.toys import BASE, TRIALS, prompts, toy_bench, tune

from kvthrift import Cache, Recipe, RecipeError, RunError, method
from kvthrift.eval.rows import read_rows
from kvthrift.tune.aim import Aim
from kvthrift.tune.probe import Probes, combined
from kvthrift.tune.search import Progress
from kvthrift.tune.shards import Shards
from kvthrift.tune.study import Study, check_study


def rows(folder: Path) -> list[dict[str, Any]]:
    return [{**row, "seconds": 0} for row in read_rows(folder / "trials.jsonl")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search."""
    folder = tmp_path_factory.mktemp("finished") / "study"
    tune(folder)
    return folder


def test_the_best_is_no_worse_than_the_start_and_keeps_to_the_budget(tmp_path: Path) -> None:
    search, best = tune(tmp_path / "study")
    assert best.measured is not None
    assert search.seen[0].measured is not None
    assert best.measured.agreement >= search.seen[0].measured.agreement
    found = Recipe.load(tmp_path / "study" / "best.toml")
    assert found.name == "snapkv-tuned"
    assert sum(found.layers.entries) <= 4 * 48
    Cache(toy_bench().model.config, found)


def test_a_trial_measures_what_an_evaluation_would(finished: Path) -> None:
    """The uniform list is the recipe itself, and one shared reading gives what a reading by itself gives."""
    alone = Probes(toy_bench(), SCORERS, prompts(), [BASE], follows=True)
    found = combined(alone.measure(BASE))
    first = rows(finished)[0]["measured"]
    assert (found.agreement, found.bytes, found.entries) == (first["agreement"], first["bytes"], first["entries"])


def test_the_same_seed_finds_the_same(finished: Path, tmp_path: Path) -> None:
    tune(tmp_path / "study")
    assert rows(tmp_path / "study") == rows(finished)


def test_processes_find_what_one_does(finished: Path, tmp_path: Path) -> None:
    tune(tmp_path / "study", workers=2)
    assert rows(tmp_path / "study") == rows(finished)
    assert (tmp_path / "study" / "best.toml").read_text() == (finished / "best.toml").read_text()


class Stop(Exception):
    pass


@pytest.mark.parametrize("engine", ["cma", "optuna"])
def test_a_search_that_was_cut_short_ends_as_if_it_was_not(engine: str, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == 7:
            raise Stop

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tune(whole, engine=engine)
    with pytest.raises(Stop):
        tune(cut, engine=engine, tell=stop)
    assert (cut / "best.toml").exists()
    assert 0 < len(rows(cut)) < len(rows(whole))
    with (cut / "trials.jsonl").open("ab") as file:
        file.write(b'{"number": 7, "val')  # as a kill leaves it
    tune(cut, engine=engine)
    assert rows(cut) == rows(whole)
    assert (cut / "best.toml").read_text() == (whole / "best.toml").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_search_goes_on_and_leaves_no_process(workers: int, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    environment = {**os.environ, "PYTHONPATH": f"{HOME / 'src'}:{HOME}", "TOKENIZERS_PARALLELISM": "false"}
    words = [sys.executable, "-m", "tests.tune.toys", str(folder), str(workers)]
    running = subprocess.Popen(words, cwd=HOME, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(read_rows(folder / "trials.jsonl")) < 3:
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.005)
    running.kill()
    running.wait()
    while _group(running.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tune(folder)
    assert rows(folder) == rows(finished)


def _group(leader: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(group) == leader and state != "Z":
                found.append(int(entry.name))
    return found


def test_fewer_bytes_at_a_floor(tmp_path: Path) -> None:
    search, best = tune(tmp_path / "study", aim=Aim("bytes", floor=0.2))
    assert best.measured is not None
    assert search.seen[0].measured is not None
    assert best.measured.agreement >= 0.2
    assert best.measured.bytes <= search.seen[0].measured.bytes
    kept = [t.measured.bytes for t in search.seen.values() if t.measured and t.measured.agreement >= 0.2]
    assert best.measured.bytes == min(kept)


def test_a_floor_that_nothing_keeps_is_said(tmp_path: Path) -> None:
    tiny = method("knorm", budget=2)
    with pytest.raises(
        RunError, match=r"no recipe of \d+ keeps 100% of the full cache's agreement within the budget 2"
    ):
        tune(tmp_path / "study", recipe=tiny, aim=Aim("bytes", floor=1.0), engine="optuna", trials=4)
    assert not (tmp_path / "study" / "best.toml").exists()


def test_two_values_give_a_front(tmp_path: Path) -> None:
    search, best = tune(
        tmp_path / "study", aim=Aim("agreement,bytes", floor=0.2), engine="optuna", vary=("layers", "scorer.kernel")
    )
    front = search.front()
    pairs = [search.aim.values(trial.measured) for trial in front if trial.measured]
    assert pairs == sorted(pairs, key=lambda pair: (pair[1], pair[0]))
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(pairs))
    files = sorted((tmp_path / "study" / "front").iterdir())
    assert len(files) == len(front)
    assert {Recipe.load(file).name for file in files} == {"snapkv-tuned"}
    assert best.measured is not None


def test_the_score_is_the_tasks_own(tmp_path: Path) -> None:
    search, best = tune(tmp_path / "study", aim=Aim("score"), engine="optuna", vary=("scorer.window",), trials=5)
    assert {math.isnan(trial.measured.agreement) for trial in search.seen.values() if trial.measured} == {True}
    assert best.measured is not None
    assert best.measured.score >= search.seen[0].measured.score  # type: ignore[union-attr]


def test_options_that_look_at_more_are_measured_as_by_themselves(tmp_path: Path) -> None:
    """A wider window than the recipe's own: the shared reading gathered it."""
    search, _ = tune(tmp_path / "study", engine="optuna", vary=("scorer.window=4:32",), trials=6)
    widest = max(search.seen.values(), key=lambda trial: trial.values["scorer.window"])
    assert widest.values["scorer.window"] > 8
    alone = Probes(toy_bench(), SCORERS, prompts(), [widest.recipe], follows=True)
    for probe in alone.probes:
        probe.works = [(work.__class__(**{**work.__dict__, "shared": None}), said) for work, said in probe.works]
    found = combined(alone.measure(widest.recipe))
    assert widest.measured is not None
    assert (found.agreement, found.entries) == (widest.measured.agreement, widest.measured.entries)


def test_a_score_that_is_not_a_number_is_refused_at_once(tmp_path: Path) -> None:
    bad = {**SCORERS, "letters": lambda text, sample, turn: math.nan}
    with pytest.raises(RunError, match=r"full cache's score is not a number \(NaN\)"):
        tune(tmp_path / "study", aim=Aim("score"), scorers=bad)
    assert rows(tmp_path / "study") == []


def test_a_trial_that_is_not_a_number_is_the_worst(tmp_path: Path) -> None:
    calls = [0]

    def sometimes(*_: object) -> float:
        calls[0] += 1
        return math.nan if calls[0] > 6 and calls[0] % 2 else 0.5

    search, best = tune(tmp_path / "study", aim=Aim("score"), scorers={**SCORERS, "letters": sometimes})
    failed = [trial for trial in search.seen.values() if trial.error]
    assert failed
    assert all("not a number (NaN)" in trial.error and trial.fitness == -2 for trial in failed)
    assert not best.error
    assert all(math.isfinite(trial.fitness) for trial in search.seen.values())


def test_a_start_that_cannot_be_measured_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RecipeError("this cannot be.")

    monkeypatch.setattr("kvthrift.tune.probe.Probe.measure", refuse)
    with pytest.raises(RunError, match=r"cannot be searched from: RecipeError: this cannot be\."):
        tune(tmp_path / "study")


def test_another_study_and_a_strange_folder_are_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds another study \(it differs in engine\)"):
        check_study(finished, {"recipe": BASE.plain(), "engine": "optuna"})
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match=r"holds letter\.txt but no study\.toml"):
        check_study(tmp_path, {})
    (tmp_path / "study.toml").write_text("[[[")
    with pytest.raises(RunError, match="cannot be read"):
        check_study(tmp_path, {})


def test_two_cannot_write_to_one_study(tmp_path: Path) -> None:
    with Study.open(tmp_path / "study", {}), pytest.raises(RunError, match="another process is writing"):
        Study.open(tmp_path / "study", {})


def test_rows_say_everything(finished: Path) -> None:
    first = rows(finished)[0]
    assert Recipe.from_plain(first["recipe"]).layers.entries == (48,) * 4
    assert len(first["prompts"]) == 3
    assert len(rows(finished)) <= TRIALS + 1
    json.dumps(first, allow_nan=False)


def test_a_byte_budget_is_kept_by_every_result(tmp_path: Path) -> None:
    limit = 64 * 1024
    _, best = tune(tmp_path / "study", recipe=method("snapkv", budget="64KiB", window=8))
    assert best.measured is not None
    assert best.measured.most_bytes <= limit
    found = Recipe.load(tmp_path / "study" / "best.toml")
    assert all(count % 16 == 0 for count in found.layers.entries)
    again = combined(Probes(toy_bench(), SCORERS, prompts(), [found], follows=True).measure(found))
    assert (again.bytes, again.agreement) == (best.measured.bytes, best.measured.agreement)


def fatal(number: int) -> Any:
    """What a process does that is killed while it begins."""
    os.kill(os.getpid(), 9)


def broken(number: int) -> Any:
    """What a process does whose model cannot be loaded."""
    raise ValueError("no such model")


@pytest.mark.parametrize(("make", "said"), [(fatal, "died on the same work 2 times"), (broken, "no such model")])
def test_processes_that_cannot_work_end_the_search_with_a_sentence(make: Any, said: str) -> None:
    shards = Shards(2, make, prompts(), [BASE], follows=True)
    with pytest.raises(RunError, match=said):
        shards.full()
    shards.close()
