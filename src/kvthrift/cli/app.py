"""The ``kvthrift`` command with its verbs.

A verb is a function in a module of the same name. Adding one touches its file and the list in ``kvthrift_command``.
"""

from __future__ import annotations

from importlib import import_module

import kvthrift
from kvthrift.cli.guard import guarded
from kvthrift_command import VERBS, command

__all__ = ["VERBS", "app"]

app = command(kvthrift.__version__)

for _verb in VERBS:
    _module = import_module(f"kvthrift.cli.{_verb}")
    app.command(context_settings=getattr(_module, "CONTEXT", None))(guarded(getattr(_module, _verb)))
