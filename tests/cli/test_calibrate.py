"""``kvthrift calibrate``: writes a file that ``headkv`` takes, or says in a line why not."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.knowing import Letters, Spelling, know, knows
from tests.models import config, tiny
from typer.testing import CliRunner, Result

from kvthrift import Cache, CalibrationError, method
from kvthrift.cli import app
from kvthrift.cli import calibrate as verb


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "load_model", lambda *_, **__: (tiny("llama"), Letters()))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["calibrate", *arguments])


def test_the_file_is_what_headkv_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    know(monkeypatch)
    out = str(tmp_path / "heads.safetensors")
    found = run("headkv", "--out", out, "--samples", "2", "--length", "700")
    assert found.exit_code == 0, found.output
    assert "The 4 most important of 4 KV heads" in found.output
    assert f"-m headkv -o calibration={out}" in found.output
    Cache(config("llama"), method("headkv", budget=64, calibration=out))
    again = run("headkv", "--out", out, "--samples", "2", "--length", "700")
    assert again.exit_code == 2
    assert "exists and was left as it is" in again.stderr
    forced = run("headkv", "--out", out, "--samples", "2", "--length", "700", "--force")
    assert forced.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("otherkv", "--out", "x"), "unknown method to calibrate for 'otherkv'."),
        (("headkv", "--out", "no/such/folder/x"), "not a file in an existing folder"),
        (("headkv", "--out", "x", "--length", "50"), "too short"),
        (("headkv", "--out", "x", "--length", "50000"), "reads at most"),
        (("headkv", "--out", "x", "--text", "nowhere.txt"), "cannot be read"),
        (("headkv", "--out", "x", "--form", "mlp"), "headkv has no forms"),
        (("headkv", "--out", "x", "--samples", "1", "--length", "700"), "no token of the answer"),
    ],
)
def test_bad_input_is_a_line_and_two(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(*arguments)
    assert found.exit_code == 2
    assert said in found.stderr
    assert not (tmp_path / "x").exists()


def test_other_methods_are_measured_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "load_model", lambda *_, **__: (tiny("llama"), Spelling()))
    knows(monkeypatch)
    for name, shown in (
        ("compresskv", "The 2 of 2 layers that suffer most"),
        ("uncomp", "Query entropy of 4 heads"),
        ("kvzap", "log scores explained in 4 KV heads"),
        ("kvzap-plus", "KVzip+'s log scores explained in 4 KV heads"),
        ("kvzip", "The 4 most important of 4 KV heads"),
        ("triattention", "How far queries point one way, from 0 to 1, in 4 heads of 2 layers"),
    ):
        out = str(tmp_path / f"{name}.safetensors")
        found = run(name, "--out", out, "--samples", "2", "--length", "700")
        name = name.removesuffix("-plus")
        assert found.exit_code == 0, found.output
        assert shown in found.output
        assert f"-m {name} -o calibration={out}" in found.output
        Cache(config("llama"), method(name, budget=64, calibration=out))
        assert run(name, "--out", out, "--length", "700").exit_code == 2
        short = run(name, "--out", str(tmp_path / "x"), "--length", "50")
        assert short.exit_code == 2
        assert "too short" in short.stderr


def test_a_calibration_for_another_method_is_refused(tmp_path: Path) -> None:
    out = str(tmp_path / "x.safetensors")
    assert run("uncomp", "--out", out, "--samples", "1", "--length", "200").exit_code == 0
    for name in ("compresskv", "headkv"):
        with pytest.raises(CalibrationError, match="holds a calibration of kind 'query_entropy'"):
            method(name, calibration=out)


def test_networks_are_measured_beside_linear_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "load_model", lambda *_, **__: (tiny("llama"), Spelling()))
    out = str(tmp_path / "x.safetensors")
    found = run("kvzap", "--form", "mlp", "--out", out, "--samples", "2", "--length", "300")
    assert found.exit_code == 0, found.output
    assert "On 1 of the passages, which it was not fitted to; a linear map explains" in found.output
    assert "Fitted on 1 passages of 300 tokens" in found.output
    Cache(config("llama"), method("kvzap", budget=64, calibration=out))
