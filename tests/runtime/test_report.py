"""A report in words and numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from kvthrift.runtime import CacheReport, LayerReport
from kvthrift.runtime.meter import Meter
from kvthrift.runtime.report import show_bytes

REPORT = CacheReport(
    recipe="snapkv: window_attention | budget=512",
    tokens=(3000, 2000),
    entries=1024,
    full_entries=10_000,
    bytes=3 * 2**20,
    metadata_bytes=512,
    full_bytes=12 * 2**20,
    peak_bytes=5 * 2**20,
    compressions=2,
    compression_seconds=0.125,
    layers=(
        LayerReport(0, 2, 10, 20.5, 31, 2**20),
        LayerReport(1, 2, 7, 7.0, 7, 2 * 2**20, "left whole: the recipe skips it"),
    ),
)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1536 * 1024, "1.50 MiB"), (5 * 2**30, "5.00 GiB")],
)
def test_bytes_are_shown_in_the_unit_that_fits(count: int, shown: str) -> None:
    assert show_bytes(count) == shown


def test_the_share_is_of_the_uncompressed_cache() -> None:
    assert REPORT.share == 0.25
    assert replace(REPORT, full_bytes=0).share == 1.0


def test_the_text_has_every_number() -> None:
    lines = str(REPORT).splitlines()
    assert lines[0] == REPORT.recipe
    for number in ("3000, 2000", "1,024 of 10,000", "3.00 MiB of 12.00 MiB (25.0%)", "512 B metadata", "peak 5.00 MiB"):
        assert number in lines[1]
    assert "2 layer compressions in 0.12 s" in lines[1]
    assert lines[3].split() == ["0", "10", "/", "20.5", "/", "31", "1.00", "MiB"]
    assert lines[4].endswith("left whole: the recipe skips it")


def test_plain_data_survives_json() -> None:
    plain = json.loads(json.dumps(REPORT.plain()))
    assert plain["share"] == 0.25
    assert plain["layers"][1]["note"].startswith("left whole")


def test_the_meter_remembers_the_most_and_adds_up_time() -> None:
    meter = Meter()
    for held in (5, 9, 3):
        meter.saw(held)
    assert meter.peak == 9
    with meter.compressing(torch.device("cpu")):
        pass
    once = meter.seconds
    with meter.compressing(torch.device("cpu")):
        sum(range(10_000))
    assert meter.seconds > once > 0
