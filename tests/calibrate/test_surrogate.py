"""Ridge regression from running sums, and the file they stand in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvthrift import CalibrationError
from kvthrift.calibrate import Artefact, Meta
from kvthrift.calibrate.surrogate import KIND, SMALLEST, Sums, weights_of
from kvthrift.score.surrogate import features

L, H, N, D = 2, 3, 400, 4
F = 2 * D + 3


def planted(noise: float = 0.0) -> tuple[Sums, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(L, H, F, generator=draw, dtype=torch.float64) / 4
    sums = Sums.zeros(L, H, F)
    for _ in range(2):
        for layer in range(L):
            k, v = torch.randn(2, H, N, D, generator=draw)
            x = features(k, v)
            y = torch.einsum("hnf,hf->hn", x.double(), weights[layer])
            sums.add(layer, x, (y + noise * torch.randn(H, N, generator=draw)).exp())
        sums.texts += 1
    return sums, weights


def test_a_planted_map_is_found() -> None:
    sums, weights = planted()
    found, explained = sums.solve(ridge=1e-9)
    torch.testing.assert_close(found, weights, rtol=1e-3, atol=1e-3)
    assert bool((explained > 0.9999).all())


def test_noise_is_not_explained() -> None:
    spread = float(planted()[0].solve()[1].mean())
    noisy = float(planted(noise=3.0)[0].solve()[1].mean())
    assert noisy < 0.5 < spread


def test_explained_is_one_minus_the_residuals_share() -> None:
    draw = torch.Generator().manual_seed(1)
    x, y = features(*torch.randn(2, 1, N, D, generator=draw)), torch.rand(1, N, generator=draw) + 0.1
    sums = Sums.zeros(1, 1, F)
    sums.add(0, x, y)
    weights, explained = sums.solve()
    target = y.double().log()
    residual = target - torch.einsum("hnf,hf->hn", x.double(), weights[0])
    wanted = 1 - residual.square().sum() / (target - target.mean()).square().sum()
    assert float(explained) == pytest.approx(float(wanted), abs=1e-6)


def test_nothing_counts_as_something_very_small() -> None:
    sums = Sums.zeros(1, 1, F)
    sums.add(0, torch.ones(1, 5, F), torch.zeros(1, 5))
    assert float(sums.total) == pytest.approx(5 * torch.log(torch.tensor(SMALLEST)).item(), rel=1e-6)


def test_too_few_entries_are_refused() -> None:
    sums = Sums.zeros(1, 1, F)
    sums.add(0, torch.ones(1, F, F), torch.ones(1, F))
    with pytest.raises(CalibrationError, match="too few to fit 11 weights"):
        sums.solve()


def test_sums_are_kept(tmp_path: Path) -> None:
    sums, _ = planted()
    sums.save(tmp_path / "sums")
    again = Sums.load(tmp_path / "sums")
    assert again.texts == 2
    for name in ("count", "gram", "moment", "total", "square"):
        assert torch.equal(getattr(again, name), getattr(sums, name))
    assert [path.name for path in tmp_path.iterdir()] == ["sums"]


@pytest.mark.parametrize("content", [None, b"", b"nothing of the kind"])
def test_missing_or_damaged_sums_are_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "sums").write_bytes(content)
    with pytest.raises(CalibrationError, match="missing or damaged"):
        Sums.load(tmp_path / "sums")


@pytest.mark.parametrize(
    "weights", [None, torch.zeros(L, F), torch.zeros(L + 1, H, F), torch.full((L, H, F), torch.nan)]
)
def test_weights_of_another_shape_are_refused(weights: torch.Tensor | None) -> None:
    meta = Meta(KIND, "kvzap", "x", "llama", L, H, {})
    with pytest.raises(CalibrationError, match="Calibrate again"):
        weights_of(Artefact(meta, {} if weights is None else {"weights": weights}))
