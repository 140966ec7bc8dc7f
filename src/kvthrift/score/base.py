"""The scorer's contract."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvthrift.core import LayerView, Signals
from kvthrift.part import Part


@dataclass(frozen=True)
class Scorer(Part, kind="scorer"):
    """Importance of every entry of a layer.

    ``is_mass`` says that scores are non-negative and add up like attention: only then can heads be compared with one
    another and dropped entries be folded by weight.
    """

    is_mass: ClassVar[bool] = False

    @property
    def needs(self) -> Signals:
        """The signals :meth:`score` reads."""
        return Signals()

    @abstractmethod
    def score(self, view: LayerView) -> Tensor:
        """Importance ``[B, H, T]`` in float32, finite; where ``view.valid`` is false anything may stand."""
