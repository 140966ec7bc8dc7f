"""How far two answers agree."""

from __future__ import annotations

import pytest

from kvthrift.cli.compare import Agreement


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((1, 2, 3), (1, 2, 3), Agreement(3, 3, 1.0)),
        ((1, 2, 3, 4), (1, 9, 3, 4), Agreement(4, 1, 0.75)),
        ((1, 2), (1, 2, 3, 4), Agreement(4, 2, 0.5)),
        ((1,), (2,), Agreement(1, 0, 0.0)),
    ],
)
def test_agreement(a: tuple[int, ...], b: tuple[int, ...], expected: Agreement) -> None:
    assert Agreement.of(a, b) == Agreement.of(b, a) == expected
