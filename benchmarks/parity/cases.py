"""What is compared: a kvpress press each, the share it removes, and whether kvthrift is to keep the very same entries.

Read by both environments: knows neither kvpress nor kvthrift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Spec = tuple[str, dict[str, Any]]  # a press's class and its options; a press among the options is a Spec itself

SNAP: Spec = ("SnapKVPress", {"window_size": 64, "kernel_size": 5})
RAW: Spec = ("SnapKVPress", {"window_size": 64, "kernel_size": 1})
EXPECTED: Spec = ("ExpectedAttentionPress", {})


@dataclass(frozen=True)
class Case:
    """One press on one text.

    Attributes:
        name: unique; the removed share is its last word.
        press: class and options.
        ratio: share that is removed.
        tokens: of the text.
        rivals: which entries compete for the same room: those of a head, a layer or the whole model.
        differs: why the two are known to keep other entries; empty if they are to keep the same.
        attention: transformers' attention function that the press runs with.
    """

    name: str
    press: Spec
    ratio: float
    tokens: int = 1040
    rivals: Literal["head", "layer", "model"] = "head"
    differs: str = ""
    attention: str = "sdpa"

    @property
    def method(self) -> str:
        """The name without the removed share."""
        return self.name.rpartition(" ")[0]


def _both(name: str, press: Spec, ratios: tuple[float, float] = (0.75, 0.9), **more: Any) -> list[Case]:
    return [Case(f"{name} {ratio:.4g}", press, ratio, **more) for ratio in ratios]


WHOLE = (0.75, 0.875)  # of a model: what is left is a whole number of entries a head, as kvthrift's budgets are


CASES: tuple[Case, ...] = (
    *_both("Knorm", ("KnormPress", {})),
    *_both("KeyDiff", ("KeyDiffPress", {})),
    *_both("TOVA", ("TOVAPress", {})),
    *_both("StreamingLLM", ("StreamingLLMPress", {})),
    *_both("SnapKV", SNAP),
    *_both("Expected Attention", EXPECTED),
    *_both("AdaKV(SnapKV)", ("AdaKVPress", {"press": SNAP}), rivals="layer"),
    *_both("AdaKV(Expected Attention)", ("AdaKVPress", {"press": EXPECTED}), rivals="layer"),
    *_both("CriticalKV(SnapKV)", ("CriticalKVPress", {"press": SNAP})),
    *_both("CriticalAdaKV(SnapKV)", ("CriticalAdaKVPress", {"press": SNAP}), rivals="layer"),
    *_both("Observed attention", ("ObservedAttentionPress", {}), attention="eager"),
    Case("LagKV, whole ranks 0.754", ("LagKVPress", {}), 1 - 284.5 / 1156, tokens=1156),
    Case(
        "LagKV, split ranks 0.75", ("LagKVPress", {}), 0.75,
        differs="every partition has an entry of each rank, and there is room for a part of the last rank only: "
        "kvpress leaves the choice to an unordered top-k, kvthrift takes the lowest positions",
    ),
    *_both("PyramidKV, kvpress's counts", ("PyramidKVPress", {"window_size": 64, "kernel_size": 5})),
    *_both(
        "PyramidKV, the paper's counts", ("PyramidKVPress", {"window_size": 64, "kernel_size": 5}),
        differs="kvpress's ramp counts the window among a layer's entries and rounds each layer; the paper's is over "
        "the entries before the window, and kvthrift's adds up to the budget exactly. Same scores",
    ),
    *_both("ChunkKV, whole chunks", ("ChunkKVPress", {"press": RAW, "chunk_length": 16})),
    *_both(
        "ChunkKV, chunks of 20", ("ChunkKVPress", {"press": SNAP, "chunk_length": 20}),
        differs="64 is no multiple of 20: kvpress ranks the window's chunks among the others and keeps what stands "
        "beside the window in its first chunk; in the paper chunks end where the window begins, and as many are kept "
        "as fit into the budget beside it",
    ),
    *_both("KVzip", ("KVzipPress", {"chunk_size": 512}), WHOLE, rivals="model"),
    Case("KVCompose 0.75", ("KVComposePress", {}), 0.75, attention="eager"),
    Case(
        "KVCompose, tight 0.875", ("KVComposePress", {}), 0.875, attention="eager",
        differs="a layer that wins nothing keeps one entry a head all the same: kvpress adds it to the whole, kvthrift "
        "takes it from the others",
    ),
    *_both(
        "KVCompose, unstructured", ("KVComposePress", {"structured": False}), WHOLE, rivals="model", attention="eager"
    ),
    Case(
        "Knorm by share 0.9", ("KnormPress", {}), 0.9, tokens=1000,
        differs="int(1000 * (1 - 0.9)) is 99 in floating point; kvthrift's share of 10% is exact, 100",
    ),
    *_both(
        "SnapKV, each by its defaults", ("SnapKVPress", {}),
        differs="window 64 and average pooling over 5 there, window 32 and maximum pooling over 7 here "
        "(the paper's pooling); both are published",
    ),
)  # fmt: skip
