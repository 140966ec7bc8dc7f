"""Pages: runs, or what caches held, as one HTML file that needs no network.

``html`` is a format of ``kvthrift report``; ``inspect_page`` shows snapshots without a run. Numbers come from
:mod:`kvthrift.eval.table`, and are the very ones that the Markdown shows.
"""

from kvthrift.eval.report.page import html, inspect_page

__all__ = ["html", "inspect_page"]
