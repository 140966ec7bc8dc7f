"""What a cache holds and what was done to it, in numbers read off live tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One layer: entries a head (fewest, mean, most) and bytes held; ``note`` says why a layer was left whole."""

    layer: int
    heads: int
    fewest: int
    mean: float
    most: int
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class CacheReport:
    """A whole cache.

    Attributes:
        recipe: the recipe in one line.
        tokens: tokens of each sequence so far.
        entries: entries held in all compressed layers.
        full_entries: entries an uncompressed cache would hold in them.
        bytes: bytes of live tensors in all layers, metadata and observations included.
        metadata_bytes: those that are not keys and values (positions, tables, planes, observed queries).
        full_bytes: bytes of keys and values that an uncompressed cache would hold in all layers.
        peak_bytes: most bytes held at once, the layer in flight included.
        compressions: layer compressions so far.
        compression_seconds: seconds they took.
        layers: one report a layer.
    """

    recipe: str
    tokens: tuple[int, ...]
    entries: int
    full_entries: int
    bytes: int
    metadata_bytes: int
    full_bytes: int
    peak_bytes: int
    compressions: int
    compression_seconds: float
    layers: tuple[LayerReport, ...]

    @property
    def share(self) -> float:
        """Bytes held as a share of the uncompressed cache's."""
        return self.bytes / self.full_bytes if self.full_bytes else 1.0

    @property
    def kept(self) -> float:
        """Entries a head as a share of the tokens read, mean over layers, those left whole among them."""
        tokens = sum(self.tokens) / max(len(self.tokens), 1)
        means = [row.mean for row in self.layers if row.heads]
        return sum(means) / len(means) / tokens if means and tokens else 1.0

    def plain(self) -> dict[str, Any]:
        """This report as plain data."""
        return asdict(self) | {"share": self.share}

    def __str__(self) -> str:
        lines = [
            self.recipe,
            f"tokens {', '.join(map(str, self.tokens)) or 0}; entries {self.entries:,} of {self.full_entries:,}; "
            f"bytes {show_bytes(self.bytes)} of {show_bytes(self.full_bytes)} ({self.share:.1%}), of which "
            f"{show_bytes(self.metadata_bytes)} metadata; peak {show_bytes(self.peak_bytes)}; "
            f"{self.compressions} layer compressions in {self.compression_seconds:.2f} s",
            "layer  entries a head (fewest / mean / most)        bytes",
        ]
        for row in self.layers:
            span = f"{row.fewest} / {row.mean:.1f} / {row.most}"
            lines.append(f"{row.layer:5}  {span:36} {show_bytes(row.bytes):>14}  {row.note}".rstrip())
        return "\n".join(lines)


def show_bytes(count: float) -> str:
    """``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
