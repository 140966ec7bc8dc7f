"""ROUGE, in the two forms that published tables use.

Written here because the two libraries would bring heavy dependencies (rouge-score: nltk, absl) or are no longer kept
(rouge), for what is one table of a longest common subsequence.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence

Words = Sequence[Hashable]


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits."""
    return re.findall(r"[a-z0-9]+", text.lower())


def f1(common: float, predicted: float, wanted: float) -> float:
    """Harmonic mean of precision and recall; 0 where nothing is shared."""
    return 2 * common / (predicted + wanted) if common else 0.0


def overlap_f1(predicted: Words, wanted: Words) -> float:
    """F1 of two bags of words: ROUGE-1, and the F1 of question answering."""
    common = (Counter(predicted) & Counter(wanted)).total()
    return f1(common, len(predicted), len(wanted))


def rouge_1(predicted: str, wanted: str) -> float:
    """ROUGE-1 F1, without stemming."""
    return overlap_f1(words(predicted), words(wanted))


def rouge_l(predicted: str, wanted: str) -> float:
    """ROUGE-L F1: the longest common subsequence of the two texts, without stemming."""
    left, right = words(predicted), words(wanted)
    return f1(len(common_subsequence(left, right)), len(left), len(right))


def rouge_l_sentences(predicted: str, wanted: str) -> float:
    """ROUGE-L F1 as LongBench's tables have it: by sentences, and of different words.

    Sentences end at full stops; every sentence's longest common subsequence with every sentence of the other text is
    joined into one set, which is weighed against the sets of all words. Words are split at white space, case counts.
    """
    left, right = _sentences(predicted), _sentences(wanted)
    shared = {word for ours in left for theirs in right for word in common_subsequence(theirs, ours)}
    return f1(len(shared), len(set().union(*left)), len(set().union(*right)))


def _sentences(text: str) -> list[list[str]]:
    return [part.split() for part in text.split(".") if part]


def common_subsequence(left: Words, right: Words) -> list[Hashable]:
    """The longest common subsequence; of several the one that steps back along ``right`` first."""
    rows, columns = len(left), len(right)
    table = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(rows):
        above, row = table[i], table[i + 1]
        for j in range(columns):
            row[j + 1] = above[j] + 1 if left[i] == right[j] else max(above[j + 1], row[j])
    found: list[Hashable] = []
    i, j = rows, columns
    while i and j:
        if left[i - 1] == right[j - 1]:
            found.append(left[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]
