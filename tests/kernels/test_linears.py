"""Products with several matrices: the operator, how a launch is cut, and Triton's kernel against float64.

The kernel is interpreted where there is no GPU; numpy has no bfloat16, so there numbers are in float16.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvthrift.errors import OptionError
from kvthrift.kernels.linears import Device, Setting, launched, linears, setting_of, tiles_of, unfit_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16
GPUS = [Device(80, 99 * 2**10), Device(108, 163 * 2**10), Device(132, 227 * 2**10), Device(148, 227 * 2**10)]

CASES: dict[str, tuple[int, int, tuple[int, ...], str, Setting]] = {  # rows, inner size, columns, biased, setting
    "one of each": (1, 32, (16,), "n", Setting(columns=64)),
    "chosen": (5, 96, (48,), "y", Setting()),
    "one column": (2, 64, (1, 40), "yn", Setting(columns=32, depth=32)),
    "inner size in no steps": (3, 272, (80, 16, 48), "yny", Setting(columns=64, depth=128, run=1)),
    "a tile each": (33, 512, (128, 256, 64, 16), "nyyn", Setting(columns=64, depth=64, run=1)),
    "columns in no tiles": (17, 128, (72, 200, 8), "nny", Setting(columns=64, run=2)),
    "runs over several matrices": (32, 64, (320, 33, 65), "yny", Setting(columns=32, depth=64, run=5)),
    "a run of all": (64, 128, (256, 256), "yy", Setting(columns=128, run=4)),
    "a run longer than all": (63, 144, (200,), "y", Setting(columns=128, depth=64, run=7)),
    "wide": (16, 64, (264, 512), "ny", Setting(columns=256, warps=8)),
}


def given(rows: int, depth: int, sizes: tuple[int, ...], biased: str, dtype: torch.dtype = HALF) -> tuple[
    Tensor, list[Tensor], list[Tensor | None]
]:  # fmt: skip
    """An input that lies within another, so that what is read beside it is noticed; weights; biases."""
    wide = torch.full((rows + 2, depth + 16), torch.nan, dtype=dtype, device=DEVICE)
    wide[1:-1, :depth] = torch.randn(rows, depth)
    weights = [torch.randn(n, depth).mul(depth**-0.5).to(DEVICE, dtype) for n in sizes]
    biases = [torch.randn(n).to(DEVICE, dtype) if b == "y" else None for n, b in zip(sizes, biased, strict=True)]
    return wide[1:-1, :depth], weights, biases


def wanted(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    return [
        x.double() @ w.double().T + (0 if b is None else b.double()) for w, b in zip(weights, biases, strict=True)
    ]  # fmt: skip


def compare() -> None:
    """Triton's kernel against float64."""
    torch.manual_seed(1)
    for name, (rows, depth, sizes, biased, setting) in CASES.items():
        asked = given(rows, depth, sizes, biased)
        for found, want in zip(launched(*asked, setting), wanted(*asked), strict=True):
            torch.testing.assert_close(found.double(), want, atol=3e-3, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def same_bits() -> None:
    """What a column comes to does not depend on runs, tiles, or what else is in the launch."""
    torch.manual_seed(2)
    x, weights, _ = given(19, 320, (64, 96), "nn")
    cuts = [Setting(columns=32, depth=64, run=1), Setting(columns=32, depth=64, run=3), Setting(columns=64, depth=64)]
    found = [launched(x, weights, [None, None], cut) for cut in cuts]
    found.append([launched(x, [w], [None], cuts[0])[0] for w in weights])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("name", ["compare", "same_bits"])
def test_the_kernel(name: str) -> None:
    pytest.importorskip("triton")
    if DEVICE == "cuda":
        globals()[name]()
        return
    words = [sys.executable, "-c", f"from tests.kernels.test_linears import {name}; {name}()"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_is_one_product_after_another(dtype: torch.dtype) -> None:
    x, weights, biases = given(3, 48, (16, 40, 1), "yny", dtype)
    for found, want in zip(linears(x, weights, biases), wanted(x, weights, biases), strict=True):
        assert found.is_contiguous()
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), want, atol=2e-2, rtol=2e-2)


def test_the_operator_is_what_it_says_to_the_compiler() -> None:
    torch.library.opcheck(linears, given(3, 48, (16, 40), "yn", torch.float32), test_utils="test_schema")
    torch.library.opcheck(linears, given(3, 48, (16, 40), "yn", torch.float32), test_utils="test_faketensor")


def test_what_the_kernel_does_not_take() -> None:
    x, weights, _ = given(4, 64, (32, 32), "nn")
    assert unfit_for(x, weights) is None
    assert "5 matrices" in str(unfit_for(x, [weights[0]] * 5))
    assert "float32" in str(unfit_for(x.float(), [w.float() for w in weights]))
    assert "[65, 64]" in str(unfit_for(x.new_zeros(65, 64), weights))
    assert "[1, 4, 64]" in str(unfit_for(x[None], weights))
    assert "72" in str(unfit_for(x.new_zeros(4, 72), [x.new_zeros(8, 72)]))
    assert "[32, 32]" in str(unfit_for(x, [weights[0], weights[0][:, :32]]))
    assert "strides [1, 32]" in str(unfit_for(x, [x.new_zeros(64, 32).T]))
    assert "bfloat16" in str(unfit_for(x, [weights[0].bfloat16()]))


def test_a_bias_that_does_not_fit_is_refused() -> None:
    x, weights, _ = given(4, 64, (32,), "n")
    for bias in (x.new_zeros(31), x.new_zeros(32).float()):
        with pytest.raises(OptionError, match="32 columns"):
            launched(x, weights, [bias])


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("sizes", [(4096, 1024, 1024), (14336, 14336), (2048, 512, 512), (16, 16), (48,), (128256,)])
def test_how_a_launch_is_cut(device: Device, sizes: tuple[int, ...]) -> None:
    cut = setting_of(4096, sizes, device, Setting())
    tiles, cores = tiles_of(sizes, cut.columns), device.multiprocessors
    assert (cut.run - 1) * cores < tiles <= cut.run * cores  # no run is longer than it has to be
    assert cut.columns in (32, 64, 128)
    assert cut.depth == (64 if cut.columns == 128 else 128)
    assert 2 <= cut.stages <= 8
    assert cut.stages * (cut.columns + 64) * cut.depth * 2 <= min(device.room, 128 * 2**10)
    assert setting_of(48, sizes, device, Setting()).depth == 64  # no deeper than it has to be
    asked = Setting(64, 32, 3, 8, 5)
    assert setting_of(4096, sizes, device, asked) == asked


def test_tiles_are_as_wide_as_keeps_multiprocessors_busy() -> None:
    """What was measured to be best on a GPU with 132 of them, and narrow tiles only where they are worth it."""
    h200 = GPUS[2]
    assert setting_of(4096, (4096, 1024, 1024), h200, Setting()) == Setting(64, 128, 4, 4, 1)
    assert setting_of(4096, (14336, 14336), h200, Setting()) == Setting(128, 64, 5, 4, 2)
    assert setting_of(2048, (2048, 512, 512), h200, Setting()).columns == 32  # 96 are busy, and would be 48
    assert setting_of(4096, (128 * 132,), h200, Setting()).columns == 128  # all are busy in any case
