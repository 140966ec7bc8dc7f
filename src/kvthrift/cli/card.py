"""What there is to say of a method, read off its code. Knows nothing of how it is shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvthrift.errors import CalibrationError
from kvthrift.methods import Method
from kvthrift.methods.registry import Option
from kvthrift.part import parts
from kvthrift.recipe import Recipe

COMMON = (
    Option("budget", None, "size", "512 (entries a KV head), 25% (of the prompt) or 64MiB (in all)."),
    Option("every", None, "int", "compress again after so many decoded tokens."),
    Option("merge", "evict", " | ".join(sorted(parts()["merge"])), "what becomes of the entries that go."),
    Option("skip", "", "list of int", "layers to leave whole; negative counts from the top."),
    Option("codec", None, " | ".join(sorted(parts()["codec"])), "how the numbers of what stays are written."),
)


@dataclass(frozen=True)
class Card:
    """One method.

    Attributes:
        needs: what it must see of a model.
        recipe: that of its defaults, or None where these need a calibration that is not there.
    """

    method: Method
    needs: str
    recipe: Recipe | None

    @classmethod
    def of(cls, method: Method) -> Card:
        """Build the method with its defaults and look."""
        try:
            recipe = method.build()
        except CalibrationError as error:
            return cls(method, f"{error}", None)
        return cls(method, str(recipe.needs), recipe)

    @property
    def options(self) -> list[Option]:
        """The method's own options and those that every method takes; the full cache takes only a codec."""
        return [*self.method.options, *(COMMON if self.method.name != "full" else COMMON[-1:])]

    def plain(self) -> dict[str, Any]:
        """This card as plain data."""
        method = self.method
        return {
            "name": method.name,
            "title": method.title,
            "paper": method.paper or None,
            "summary": method.summary,
            "text": method.text,
            "needs": self.needs,
            "options": [asdict(option) for option in self.options],
            "recipe": None if self.recipe is None else self.recipe.plain(),
        }
