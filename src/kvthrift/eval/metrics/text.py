"""Cutting answers into what is compared: normalised words, first lines, numbers, Chinese words.

Knows nothing of samples or scorers.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from fractions import Fraction
from importlib import import_module

from kvthrift.errors import DataError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CONTROL = re.compile(r"[\x00-\x1f]")
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?![\d])", re.ASCII)


def normalised(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def cleaned(text: str) -> str:
    """RULER's normal form: control characters become line ends, white space at both ends goes, lower case."""
    return _CONTROL.sub("\n", text).strip().lower()


def first_line(text: str) -> str:
    """The first line that is not empty before it."""
    return text.lstrip("\n").split("\n")[0]


def numbers(text: str) -> Iterator[Fraction]:
    """The numbers of a text in order; thousands may be parted by commas, signs count, words with digits do not."""
    for match in _NUMBER.finditer(text):
        digits = match[0].replace(",", "")
        if any(letter.isdigit() for letter in digits):
            yield Fraction(digits)


def number(text: str) -> Fraction | None:
    """The only number of a reference answer; None where it is not one."""
    found = list(numbers(text))
    return found[0] if len(found) == 1 else None


def chinese_words(text: str) -> list[str]:
    """Words of a Chinese text as jieba cuts them.

    Raises:
        DataError: jieba is not installed.
    """
    try:
        jieba = import_module("jieba")
    except ImportError as error:
        raise DataError(
            "answers in Chinese are cut into words by jieba, which is not installed, so they have no score. Install "
            "kvthrift[chinese]."
        ) from error
    return [str(word) for word in jieba.lcut(text)]
