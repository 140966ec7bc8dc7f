"""How far a model with one cache says what it says with another, token by token (2012.01604, section on label flips).

The reference decodes greedily; the other is fed the reference's tokens one by one through its own decode path, so that
every step is compared after the same words. Knows nothing of caches or models, only logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

TOP = 5
ROWS = 16  # steps whose probabilities are in memory at once


@dataclass(frozen=True)
class Agreement:
    """Two caches on one reference answer.

    Step 0 is the first new token. It is reported apart, because methods that compress behind the prompt say it before
    anything is gone.

    Attributes:
        steps: tokens of the reference answer.
        mismatches: steps where another token is likelier than the reference's.
        kl: nats by which each step's distribution departs from the reference's, KL(reference || other).
        top5: share of the reference's five likeliest tokens that are among the other's five, mean over steps.
        cut: the answer was cut at its limit, so more steps might have differed.
    """

    steps: int
    mismatches: tuple[int, ...]
    kl: tuple[float, ...]
    top5: float
    cut: bool = False

    @property
    def first_token(self) -> bool:
        """Whether the first new token is the reference's."""
        return 0 not in self.mismatches

    @property
    def first_divergence(self) -> int | None:
        """Step where free greedy answers part; None if they never do."""
        return self.mismatches[0] if self.mismatches else None

    @property
    def later(self) -> tuple[int, int]:
        """Mismatches among the steps behind the first token, and those steps."""
        return len([step for step in self.mismatches if step]), max(self.steps - 1, 0)

    @property
    def top1(self) -> float:
        """Share of all steps whose likeliest token is the reference's."""
        return 1 - len(self.mismatches) / self.steps if self.steps else 1.0

    def plain(self) -> dict[str, Any]:
        """As plain data, KL to six digits."""
        return asdict(self) | {
            "mismatches": list(self.mismatches),
            "kl": [float(f"{value:.6g}") for value in self.kl],
            "top5": round(self.top5, 6),
        }

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> Self:
        """Rebuild from :meth:`plain`."""
        return cls(**{**data, "mismatches": tuple(data["mismatches"]), "kl": tuple(data["kl"])})


def compare(reference: Tensor, other: Tensor, tokens: Sequence[int], *, cut: bool = False) -> Agreement:
    """Compare the logits of two caches behind the same words.

    A step is a mismatch only if some token's logit, in float32, is above that of the reference's token: ties agree.

    Args:
        reference, other: ``[S, V]`` logits; row ``s`` is of the distribution that token ``s`` is drawn from.
        tokens: the S tokens of the reference's answer.
        cut: the answer was cut at its limit.
    """
    mismatches: list[int] = []
    kl: list[float] = []
    shared = 0.0
    for start in range(0, len(tokens), ROWS):
        a, b = (logits[start : start + ROWS].float() for logits in (reference, other))
        said = torch.tensor(list(tokens[start : start + ROWS]), device=b.device)[:, None]
        above = (b.amax(dim=-1) > b.gather(-1, said)[:, 0]).nonzero()[:, 0] + start
        mismatches += above.tolist()
        kl += divergence(a, b).tolist()
        shared += float(overlap(a, b).sum())
    return Agreement(len(tokens), tuple(mismatches), tuple(kl), shared / len(tokens) if len(tokens) else 1.0, cut)


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) of logits ``[S, V]``, in nats, ``[S]``; never below 0."""
    p, q = reference.log_softmax(dim=-1), other.log_softmax(dim=-1)
    terms = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0)  # a token that the reference rules out adds nothing
    return terms.sum(dim=-1).clamp(min=0)


def overlap(reference: Tensor, other: Tensor, count: int = TOP) -> Tensor:
    """Share of the reference's ``count`` likeliest tokens among the other's, ``[S]``, for logits ``[S, V]``."""
    count = min(count, reference.shape[-1])
    a, b = (logits.topk(count, dim=-1).indices for logits in (reference, other))
    return (a[:, :, None] == b[:, None, :]).any(dim=-1).float().mean(dim=-1)


def survival(divergences: Sequence[int | None], lengths: Sequence[int], step: int) -> float | None:
    """Share of answers that still agree behind ``step`` steps, of those that are as long; None if none is."""
    long = [found is None or found >= step for found, n in zip(divergences, lengths, strict=True) if n >= step]
    return sum(long) / len(long) if long else None
