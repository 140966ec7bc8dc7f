"""When two expressions of school mathematics are the same: LaTeX made plain, then compared as text and as numbers.

A small set of rules, not a computer algebra system: fractions, roots, degrees, percent, dollars, units, blanks.
"""

from __future__ import annotations

import re
from fractions import Fraction

_DROPPED = re.compile(
    r"\\left|\\right|\\[!,;: ]|\\quad|\\\$|\$|\\%|%|\^\{?\\circ\}?|\\degree|\\displaystyle|"
    r"(?<=[\d}] )\\(?:text|mathrm|mbox)\{[^{}]*\}(?:\^\{?[23]\}?)?$|"  # a unit behind a number
    r"(?<=[\d}])\\(?:text|mathrm|mbox)\{[^{}]*\}(?:\^\{?[23]\}?)?$"
)
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dt]?frac *(?:\{([^{}]*)\}|(\w)) *(?:\{([^{}]*)\}|(\w))")
_ROOT = re.compile(r"\\sqrt *(?:\{([^{}]*)\}|(\w))")
_BRACKETED = re.compile(r"(?<![\d)])\((-?\w+)\)(?![\w(])")
_PLAIN_NUMBER = re.compile(r"\(?(-?\d*\.?\d+)\)?(?:/\(?(-?\d*\.?\d+)\)?)?")


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} or \\fbox{...}, braces matched; None where it is missing or cut off."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for at in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin:at].strip()
    return None


def plain(expression: str) -> str:
    """An expression without what does not change its meaning."""
    text = expression.strip().rstrip(".")
    if re.fullmatch(r"[a-zA-Z] *(=|\\in) *.+", text):
        text = re.split(r"=|\\in", text, maxsplit=1)[1]
    text = _WRAPPED.sub(r"\1", _DROPPED.sub("", text.strip()))
    while (shorter := _ROOT.sub(r"sqrt(\1\2)", _FRACTION.sub(r"(\1\2)/(\3\4)", text))) != text:
        text = shorter
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = text.replace("\\cdot", "*").replace("\\times", "*").replace("{", "(").replace("}", ")")
    return re.sub(r"\s+", "", text).lower()


def value(text: str) -> Fraction | None:
    """A plain expression's value, if it is a number or a fraction of two."""
    match = re.fullmatch(rf"(-?){_PLAIN_NUMBER.pattern}", text)
    if not match:
        return None
    sign, top, bottom = match.groups()
    try:
        return (-1 if sign else 1) * Fraction(top) / Fraction(bottom or 1)
    except ZeroDivisionError:
        return None


def same(left: str, right: str) -> bool:
    """Whether two expressions mean the same."""
    ours, theirs = plain(left), plain(right)
    if _bare(ours) == _bare(theirs):
        return True
    mine, other = value(ours), value(theirs)
    return mine is not None and mine == other


def _bare(text: str) -> str:
    """Without brackets around single names and numbers: (a)/(b) and a/b are the same, 2(3) and 23 are not."""
    while (barer := _BRACKETED.sub(r"\1", text)) != text:
        text = barer
    return text
