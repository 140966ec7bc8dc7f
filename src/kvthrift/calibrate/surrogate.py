"""A linear map from an entry's key and value to the logarithm of its score, one a head (2601.07891). No model library.

Ridge regression from running sums, so that texts are read one by one and forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvthrift.calibrate.artefact import Artefact
from kvthrift.errors import CalibrationError

KIND = "score_surrogate"
RIDGE = 1e-3  # share of a feature's mean square that is added to it
SMALLEST = 1e-8  # scores below count as this


@dataclass
class Sums:
    """What ridge regression needs, for every layer and head; float64.

    Attributes:
        texts: how many are in.
        count: entries ``[L]``.
        gram: ``[L, H, F, F]`` sums of products of features.
        moment: ``[L, H, F]`` sums of features times targets.
        total, square: ``[L, H]`` sums of targets and of their squares.
    """

    texts: int
    count: Tensor
    gram: Tensor
    moment: Tensor
    total: Tensor
    square: Tensor

    @classmethod
    def zeros(cls, layers: int, heads: int, features: int) -> Sums:
        """Nothing read yet."""
        sizes = ((layers,), (layers, heads, features, features), (layers, heads, features), (layers, heads))
        return cls(0, *(torch.zeros(size, dtype=torch.float64) for size in (*sizes, sizes[-1])))

    def add(self, layer: int, features: Tensor, scores: Tensor) -> None:
        """One layer of one text: ``features [H, N, F]``, ``scores [H, N]`` above 0."""
        x, y = features.double().cpu(), scores.double().clamp(min=SMALLEST).log().cpu()
        self.count[layer] += x.shape[1]
        self.gram[layer] += x.transpose(1, 2) @ x
        self.moment[layer] += torch.einsum("hnf,hn->hf", x, y)
        self.total[layer] += y.sum(dim=1)
        self.square[layer] += y.square().sum(dim=1)

    def solve(self, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
        """Weights ``[L, H, F]``, and the share of the targets' variance they explain, ``[L, H]``.

        Raises:
            CalibrationError: a layer was not read, or has fewer entries than features.
        """
        features = self.gram.shape[-1]
        if bool((self.count <= features).any()):
            raise CalibrationError(
                f"{int(self.count.min())} entries were read of some layer, too few to fit {features} weights a head. "
                "Give more samples, or longer ones."
            )
        scale = self.gram.diagonal(dim1=-2, dim2=-1).clamp(min=1e-12)
        weights = torch.linalg.solve(self.gram + torch.diag_embed(ridge * scale), self.moment)
        fitted = torch.einsum("lhf,lhfg,lhg->lh", weights, self.gram, weights)
        error = self.square - 2 * (weights * self.moment).sum(dim=-1) + fitted
        spread = self.square - self.total.square() / self.count[:, None]
        return weights, 1 - error / spread.clamp(min=1e-12)

    def save(self, path: Path) -> None:
        """Write them, whole or not at all.

        Raises:
            CalibrationError: they cannot be written.
        """
        part = path.with_name(f"{path.name}.part")
        held = {name: value for name, value in self.__dict__.items() if isinstance(value, Tensor)}
        try:
            save_file(held, part, metadata={"texts": str(self.texts)})
            part.replace(path)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"{path} cannot be written: {error}.") from error

    @classmethod
    def load(cls, path: Path) -> Sums:
        """Read what :meth:`save` wrote.

        Raises:
            CalibrationError: there is no such file, or it is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                held: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return cls(int((file.metadata() or {})["texts"]), **held)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"{path} is missing or damaged ({error}). Begin again with --force.") from error


def network_of(artefact: Artefact) -> tuple[Tensor, int] | None:
    """Packed networks ``[L, H, ...]`` of an artefact and their width; None if it holds linear maps.

    Raises:
        CalibrationError: they are not for every head of its model.
    """
    found, meta = artefact.tensors.get("network"), artefact.meta
    if found is None:
        return None
    if found.ndim != 3 or tuple(found.shape[:2]) != (meta.layers, meta.kv_heads) or not bool(found.isfinite().all()):
        raise CalibrationError(
            f"this calibration has no finite network for every head of {meta.layers} layers of {meta.kv_heads} KV "
            "heads. Calibrate again."
        )
    return found, int(meta.provenance["width"])


def weights_of(artefact: Artefact) -> Tensor:
    """Weights ``[L, H, F]`` of an artefact.

    Raises:
        CalibrationError: it has none for every head of its model.
    """
    found, meta = artefact.tensors.get("weights"), artefact.meta
    sizes = (meta.layers, meta.kv_heads)
    if found is None or found.ndim != 3 or tuple(found.shape[:2]) != sizes or not bool(found.isfinite().all()):
        raise CalibrationError(
            f"this calibration has no finite weights for every head of {meta.layers} layers of {meta.kv_heads} KV "
            "heads. Calibrate again."
        )
    return found
