"""A budget in the units its owner has: entries per KV head, bytes in all, or a share of the prompt.

Knows nothing of layers, heads or models beyond the few integers it is resolved with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from kvthrift.errors import BudgetError

Unit = Literal["entries", "share", "bytes"]

_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_PATTERN = re.compile(r"^\s*([+-]?\d+(?:\.\d+)?)\s*(%|[a-zA-Z]+)?\s*$")
_HOW = "Give entries per KV head (512), a share of the prompt (25%) or bytes in all (64MiB)."


@dataclass(frozen=True)
class Budget:
    """How much of a cache may be kept.

    ``unit`` says what ``amount`` counts: entries per KV head, a share of the prompt in (0, 1], or bytes in all.
    The entries that a recipe protects (sinks, recent window) count towards it.
    """

    amount: Fraction
    unit: Unit

    def __post_init__(self) -> None:
        if self.amount <= 0:
            raise BudgetError(f"budget {self} would leave nothing in the cache. {_HOW}")
        if self.unit == "share" and self.amount > 1:
            raise BudgetError(f"budget {self} is more than the whole prompt. A share lies between 0% and 100%.")
        if self.unit != "share" and self.amount.denominator != 1:
            raise BudgetError(f"budget {self} is not a whole number of {self.unit}. {_HOW}")

    @classmethod
    def parse(cls, value: int | str | Budget) -> Budget:
        """Read ``512``, ``"512"``, ``"25%"`` or ``"64MiB"``.

        Raises:
            BudgetError: the text is none of these, is zero or negative, or is a share above 100%.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise BudgetError(f"budget {value!r} has no unit that kvthrift knows. {_HOW}")
        match = _PATTERN.match(str(value))
        if match is None:
            raise BudgetError(f"budget {value!r} cannot be read. {_HOW}")
        number, unit = Fraction(match[1]), (match[2] or "").lower()
        if unit == "%":
            return cls(number / 100, "share")
        if unit in _BYTES:
            return cls(Fraction(int(number * _BYTES[unit])), "bytes")
        if unit:
            raise BudgetError(f"budget {value!r} has the unknown unit {match[2]!r}. {_HOW}")
        return cls(number, "entries")

    def __str__(self) -> str:
        if self.unit == "share":
            percent = self.amount * 100
            return f"{Decimal(percent.numerator) / percent.denominator:f}%"  # exact, so that it reads back the same
        if self.unit == "bytes":
            for name in ("GiB", "MiB", "KiB"):
                scale = _BYTES[name.lower()]
                if self.amount and self.amount % scale == 0:
                    return f"{int(self.amount / scale)}{name}"
            return f"{int(self.amount)}B"
        return f"{float(self.amount):g}" if self.amount.denominator != 1 else str(int(self.amount))

    def entries(
        self, length: int, *, heads: int, entry_bytes: int, page: int, head_bytes: int = 0, least: int | None = None
    ) -> int:
        """Entries per KV head for one sequence, the mean over its heads.

        Of bytes they are whole pages, unless the pages of the whole sequence fit, or heads may differ: then they are
        what the whole pages of all heads together come to, and fewer than ``length``.

        Args:
            length: tokens of the sequence so far.
            heads: KV heads of all compressed layers and all sequences that share the bytes.
            entry_bytes: bytes of one entry of one head, its metadata included.
            page: entries per page of the store; bytes are handed out in whole pages.
            head_bytes: bytes of one head besides its entries.
            least: entries that every head must be able to hold, if heads may hold unequal numbers of pages; None if
                all hold as many.

        Raises:
            BudgetError: the bytes are too few for one page a head.
        """
        if self.unit == "entries":
            return int(self.amount)
        if self.unit == "share":
            return max(1, int(self.amount * length))
        entries = (int(self.amount) - heads * head_bytes) // (heads * entry_bytes)
        if entries >= -(-length // page) * page:
            return entries
        if entries < page:
            fewest = heads * (entry_bytes * page + head_bytes)
            raise BudgetError(
                f"budget {self} is too few bytes for {heads} heads: one page of {page} entries a head, the least the "
                f"store can hold, takes {fewest} bytes. Give at least that, or use a smaller page."
            )
        if least is not None:
            pages = (int(self.amount) - heads * head_bytes) // (entry_bytes * page)
            mean = min(pages * page // heads, length - 1)
            if mean >= -(-least // page) * page:
                return mean
        return entries // page * page
