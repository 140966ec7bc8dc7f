"""Names of vLLM's that are relied on, looked up in what is installed."""

from __future__ import annotations

import re
from importlib import import_module
from inspect import Parameter, getsource, isclass, signature
from typing import Any


def missing(path: str, wanted: tuple[str, ...]) -> set[str]:
    """What a function does not take of ``wanted``, or a class does not have.

    Raises:
        AttributeError: there is no such function or class.
    """
    module, _, name = path.partition(":")
    found: Any = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    given = signature(found).parameters
    if not isclass(found):
        return set() if _takes_all(given) else set(wanted) - set(given)
    there = {*given, *dir(found)}
    for one in found.__mro__:
        if one.__module__.startswith("vllm."):
            there |= {*re.findall(r"self\.(\w+)\b[^=\n(]*=[^=]", getsource(one)), *vars(one).get("__annotations__", ())}
    return set(wanted) - there


def _takes_all(given: Any) -> bool:
    return any(one.kind is Parameter.VAR_KEYWORD for one in given.values())
