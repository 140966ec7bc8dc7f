"""The shell of a page: templates, style, scripts and the plot library, all written into one file.

The page's own policy forbids it to fetch anything. Whatever is filled in is escaped, by the templates in markup and by
``tojson`` in data. Knows nothing of runs.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from kvthrift.errors import MissingPackageError

PARTS = ("base", "filters", "tables", "figure", "quality", "heat", "maps", "tokens", "inside", "study", "begin")


def fill(template: str, *, title: str, data: dict[str, Any], **values: Any) -> str:
    """A page from a template of this package.

    Args:
        template: name of a file that extends ``shell.html``.
        title: of the page.
        data: what the scripts read; plain data.
        values: what the template shows.

    Raises:
        MissingPackageError: a package that pages are made with is not installed.
    """
    found = _environment().get_template(template)
    page: str = found.render(
        title=title, data=data, style=_asset("style.css"), scripts=_scripts(PARTS), library=_library(), **values
    )
    return page


@cache
def _environment() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise _missing("jinja2") from error
    loader = PackageLoader("kvthrift.eval.report", "assets")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _asset(name: str) -> str:
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _scripts(names: Sequence[str]) -> str:
    """All scripts as one, which leaves no names behind."""
    return "(() => {\n" + "\n".join(_asset(f"{name}.js") for name in names) + "\nbegin();\n})();"


@cache
def _library() -> str:
    """The plot library, deflated and in base64: a third of its size, unpacked by the browser."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise _missing("plotly") from error
    return base64.b64encode(zlib.compress(get_plotlyjs().encode(), 9)).decode("ascii")


def _missing(name: str) -> MissingPackageError:
    return MissingPackageError(
        f"{name} is not installed, so no HTML page can be made. Install it with: pip install 'kvthrift[report]'."
    )
