"""A calibration file is read back as it was written, or refused with the reason."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kvthrift import CalibrationError
from kvthrift.calibrate import Artefact, Meta, artefact, load, load_named, save

META = Meta("head_importance", "headkv", "0123456789abcdef", "llama", 2, 3, {"samples": 4, "seed": 0})


def tensors() -> dict[str, Tensor]:
    return {"importance": torch.rand(2, 3), "retrieval": torch.rand(2, 6, dtype=torch.float64)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    target = tmp_path / "heads.safetensors"
    save(target, tensors(), META)
    return target


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    held = tensors() | {"scalar": torch.tensor(3), "empty": torch.zeros(0, 2), "half": torch.ones(3).bfloat16()}
    save(tmp_path / "a", held, META)
    found = load(tmp_path / "a", kind="head_importance")
    assert found.meta == META
    assert found.tensors.keys() == held.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in held.items())


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    wide = torch.arange(12.0).view(3, 4)
    save(tmp_path / "a", {"turned": wide.t(), "part": wide[:, 1:3]}, META)
    found = load(tmp_path / "a", kind="head_importance").tensors
    assert torch.equal(found["turned"], wide.t())
    assert torch.equal(found["part"], wide[:, 1:3])


def test_the_same_content_makes_the_same_bytes(tmp_path: Path) -> None:
    held = tensors()
    for name in ("a", "b"):
        save(tmp_path / name, held, META)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_that_is_there_stays_unless_forced(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(CalibrationError, match="exists and was left as it is"):
        save(file, tensors(), META)
    assert file.read_bytes() == before
    save(file, {"importance": torch.ones(2, 3)}, META, force=True)
    assert torch.equal(load(file, kind="head_importance").tensors["importance"], torch.ones(2, 3))


@pytest.mark.parametrize("place", ["", "no/such/folder"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(CalibrationError, match="not a file in an existing folder"):
        save(tmp_path / place, tensors(), META)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artefact, "save_file", full)
    with pytest.raises(CalibrationError, match="No space left"):
        save(file, tensors(), META, force=True)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_every_flipped_bit_is_noticed(file: Path) -> None:
    whole = file.read_bytes()
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CalibrationError):
            load(file, kind="head_importance")


def test_every_missing_end_is_noticed(file: Path) -> None:
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(CalibrationError, match="damaged"):
            load(file, kind="head_importance")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2)}, file)
    with pytest.raises(CalibrationError, match="not a kvthrift calibration"):
        load(file, kind="head_importance")
    for text in ("[1, 2]", '{"format": 1}', "null", "{"):
        save_file({"weight": torch.ones(2)}, file, metadata={"kvthrift": text})
        with pytest.raises(CalibrationError, match=r"not a kvthrift calibration|damaged"):
            load(file, kind="head_importance")
    file.write_text("a poem")
    with pytest.raises(CalibrationError, match="damaged or not a safetensors file"):
        load(file, kind="head_importance")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CalibrationError, match="cannot be read"):
            load(path, kind="head_importance")


def test_another_kind_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", tensors(), replace(META, kind="layer_error"))
    with pytest.raises(CalibrationError, match="kind 'layer_error', but 'head_importance' is needed"):
        load(tmp_path / "a", kind="head_importance")


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefact, "FORMAT", 2)
    save(tmp_path / "a", tensors(), META)
    monkeypatch.undo()
    with pytest.raises(CalibrationError, match="format 2, not 1"):
        load(tmp_path / "a", kind="head_importance")


def test_a_name_is_a_shipped_artefact_or_a_file(file: Path) -> None:
    shipped = load_named("smollm2", method="headkv", kind="head_importance")
    assert isinstance(shipped, Artefact)
    assert (shipped.meta.layers, shipped.meta.kv_heads) == (30, 3)
    assert load_named(str(file), method="headkv", kind="head_importance").meta == META
    with pytest.raises(CalibrationError, match=r"neither a file nor shipped for headkv \(shipped: smollm2\)"):
        load_named("gpt5", method="headkv", kind="head_importance")
    with pytest.raises(CalibrationError, match="shipped: none"):
        load_named("smollm2", method="otherkv", kind="head_importance")
