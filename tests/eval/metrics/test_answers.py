"""Scorers by worked examples: containment, sets, words, sentences."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvthrift.errors import DataError
from kvthrift.eval.metrics.answers import SCORERS
from kvthrift.eval.metrics.rouge import common_subsequence, rouge_l, rouge_l_sentences
from kvthrift.eval.metrics.text import chinese_words, cleaned, first_line, normalised
from kvthrift.eval.sample import Sample, Turn


def score(name: str, answer: str, *gold: str, **meta: object) -> float:
    turn = Turn("What?", gold)
    return SCORERS[name](answer, Sample("0", "toy", "context", (turn,), name, meta=dict(meta)), turn)


def test_normal_form_drops_case_punctuation_and_articles() -> None:
    assert normalised("  The U.S.A.'s  an-swer,\n a theory!") == "usas answer theory"
    assert normalised("A, an; the.") == ""
    assert normalised("anthem a b") == "anthem b"  # articles are whole words


def test_control_characters_are_line_ends() -> None:
    assert cleaned("\x00 One\x07two \t") == "one\ntwo"
    assert first_line("\n\nfirst\nsecond") == "first"
    assert first_line("") == ""


@pytest.mark.parametrize(
    "name", sorted(set(SCORERS) - {"choice", "classification", "only_label", "qa_f1_zh", "rouge_l_zh"})
)
@settings(max_examples=25)
@given(
    answer=st.text(max_size=40),
    gold=st.lists(st.sampled_from(["7", "Paris", "a b", "\\frac{1}{2}"]), min_size=1, max_size=3),
)
def test_scores_are_shares(name: str, answer: str, gold: list[str]) -> None:
    assert 0 <= score(name, answer, *gold) <= 1
    assert 0 <= score(name, "", *gold) <= 1


# -- containment -----------------------------------------------------------------------------------------------------


def test_all_is_the_share_that_occurs() -> None:
    assert score("ruler_all", "They are ABCDE and fghij.", "ABCDE", "FGHIJ") == 1
    assert score("ruler_all", "1234567, 999", "1234567", "7654321") == 0.5
    assert score("ruler_all", "", "1") == 0
    assert score("ruler_all", "the word is cardboard", "card") == 1  # substrings count, as in the published scorer


def test_part_is_whether_any_occurs() -> None:
    assert score("ruler_part", "in NEW\x0cYork, i think", "Boston", "i think") == 1
    assert score("ruler_part", "Rome", "Boston", "New York") == 0


def test_sets_punish_lists_of_everything() -> None:
    assert score("exact_set", " 1234567, 7654321 and nothing else", "7654321", "1234567") == 1
    assert score("exact_set", "1234567 7654321 1111111", "7654321", "1234567") == 0
    assert score("exact_set", "1234567", "7654321", "1234567") == 0
    assert score("exact_set", "They are: ABCDE, XYZZY.", "XYZZY", "ABCDE") == 1
    assert score("exact_set", "ABCDE XYZZY QQQQQ", "XYZZY", "ABCDE") == 0
    uuid = "487b77d2-37e3-4578-a0a1-01bad9825174"
    assert score("exact_set", f"It is {uuid}.", uuid) == 1
    assert score("exact_set", f"It is {uuid} or {uuid[::-1]}", uuid) == 1  # the other is no uuid
    assert score("exact_set", "1. fish 2. tower and 3. calm-otter", "fish", "tower", "calm-otter") == 1
    assert score("exact_set", "1. fish 2. tower 3. river", "fish", "tower") == 0


def test_sets_of_other_answers_are_the_whole_answer() -> None:
    assert score("exact_set", "the Denver Broncos.", "Denver Broncos", "Broncos of Denver") == 1
    assert score("exact_set", "Denver Broncos and others", "Denver Broncos") == 0


def test_substrings_and_spans() -> None:
    assert score("substring", "Value: 12AB", "12ab") == 1
    assert score("substring", "it is New-York", "New York") == 0
    assert score("subspan", "it is New, York!", "the New York") == 1
    assert score("subspan", "anything", "the") == 0  # nothing is left of it
    assert score("exact", "The Answer.", "answer") == 1


# -- words and sentences ---------------------------------------------------------------------------------------------


def test_f1_of_words() -> None:
    assert score("qa_f1", "the cat sat", "a cat") == pytest.approx(2 / 3)
    assert score("qa_f1", "cat cat", "cat") == pytest.approx(2 / 3)  # bags, not sets
    assert score("qa_f1", "Paris", "Rome", "paris!") == 1  # the best reference
    assert score("qa_f1", "", "a") == 0
    assert score("qa_f1", "\nParis\nand much else", "Paris", first_line=True) == 1
    assert score("qa_f1", "\nParis\nand much else", "Paris") == pytest.approx(0.4)


def test_rouge_1_is_overlap_and_rouge_l_is_order() -> None:
    assert score("rouge_1", "The dog bit the man.", "the man bit the dog") == 1
    assert score("rouge_l", "The dog bit the man.", "the man bit the dog") == pytest.approx(0.6)
    assert score("rouge_l", "police killed the gunman", "police kill the gunman") == pytest.approx(0.75)
    assert score("rouge_1", "", "x") == 0


def test_rouge_l_by_sentences_joins_what_all_sentences_share() -> None:
    # worked by hand: the union of two subsequences, over different words
    assert rouge_l_sentences("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5") == pytest.approx(2 * 4 / (8 + 5))
    assert rouge_l_sentences("a a a b", "a b b") == 1  # each word once
    assert rouge_l_sentences("The cat", "the cat") == 0.5  # case counts
    assert rouge_l_sentences("...", "a") == 0


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_the_common_subsequence_is_common_and_longest(left: list[str], right: list[str]) -> None:
    found = common_subsequence(left, right)
    for side in (left, right):
        rest = iter(side)
        assert all(word in rest for word in found)
    table = {(0, 0): 0}
    for i in range(len(left) + 1):
        for j in range(len(right) + 1):
            if i and j and left[i - 1] == right[j - 1]:
                table[i, j] = table[i - 1, j - 1] + 1
            else:
                table[i, j] = max(table.get((i - 1, j), 0), table.get((i, j - 1), 0))
    assert len(found) == table[len(left), len(right)]


def test_rouge_is_symmetric_and_one_for_the_same() -> None:
    text = "One sentence here. Another one there."
    assert rouge_l(text, text) == rouge_l_sentences(text, text) == 1
    assert rouge_l("a b c", "c d") == rouge_l("c d", "a b c")


def test_chinese_needs_jieba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jieba", None)
    with pytest.raises(DataError, match="jieba, which is not installed"):
        chinese_words("你好")


def test_chinese_words_are_cut_by_jieba() -> None:
    pytest.importorskip("jieba", reason="needs the extra chinese")
    assert chinese_words("我来到北京清华大学") == ["我", "来到", "北京", "清华大学"]
    assert score("qa_f1_zh", "在清华大学。", "清华大学") == pytest.approx(2 / 3)
    assert score("rouge_l_zh", "北京 清华大学", "北京清华大学") > 0.5


def test_chinese_words_are_compared_without_punctuation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Jieba:
        @staticmethod
        def lcut(text: str) -> list[str]:
            return list(text)

    monkeypatch.setitem(__import__("sys").modules, "jieba", Jieba)
    assert score("qa_f1_zh", "北京！", "北京。") == 1
    assert score("qa_f1_zh", "北京", "南京") == 0.5
    assert score("rouge_l_zh", "北京", "北平") == 0.5
