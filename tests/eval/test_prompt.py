"""Prompts: the context's tokens do not depend on the question, and nothing is lost at the seam."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from tests.eval.toys import TEMPLATE, toy_tokenizer
from tokenizers.processors import TemplateProcessing

from kvthrift.errors import ContextError, UnsupportedModelError
from kvthrift.eval.prompt import NO_TEMPLATE, Prompt, build_prompt, find_spans, first_tokens
from kvthrift.eval.sample import Sample, Turn

TURNS = (Turn("\nWhere is it?\n", ("the harbour",), "It is in", 5), Turn("\nWho?\n", ("Ann", "Anna"), "", 7))


def sample(mode: str = "single", *, context: str = "The boat is in the harbour.", **changes: Any) -> Sample:
    turns = TURNS[:1] if mode == "single" else TURNS
    return Sample("7", "toy", context, changes.pop("turns", turns), "letters", mode=mode, **changes)


def built(made: Sample, *, visible: bool, chat: bool = True) -> Prompt:
    return build_prompt(toy_tokenizer(chat=chat), made, visible=visible)


def text(ids: tuple[int, ...]) -> str:
    return str(toy_tokenizer().decode(list(ids)))


HEAD = "[user]The boat is in the harbour."


def test_hidden() -> None:
    found = built(sample(), visible=False)
    (reading,) = found.readings
    assert text(reading.ids) == HEAD
    assert [text(ask.ids) for ask in reading.asks] == ["\nWhere is it?[end][assistant]It is in"]
    assert found.context == len(reading.ids)
    assert found.longest == len(reading.ids) + len(reading.asks[0].ids) + 5


def test_visible() -> None:
    hidden, found = (built(sample(), visible=visible) for visible in (False, True))
    (reading,) = found.readings
    assert text(reading.ids) == HEAD + "\nWhere is it?[end][assistant]It is in"
    assert reading.ids[: found.context] == hidden.readings[0].ids
    assert [ask.ids for ask in reading.asks] == [()]
    assert found.digest == hidden.digest  # the same tokens, read otherwise


def test_follow_ups_see_gold_answers() -> None:
    first = "\nWhere is it?[end][assistant]It is in"
    second = " the harbour[end][user]Who?[end][assistant]"
    hidden, visible = (built(sample("multi_turn"), visible=visible).readings for visible in (False, True))
    assert [text(ask.ids) for ask in hidden[0].asks] == [first, first + second]
    assert text(visible[0].ids) == HEAD + first
    assert [text(ask.ids) for ask in visible[0].asks] == ["", second]


def test_requests_come_alone() -> None:
    hidden, visible = (built(sample("multi_request"), visible=visible).readings for visible in (False, True))
    tails = ["\nWhere is it?[end][assistant]It is in", "\nWho?[end][assistant]"]
    assert [text(ask.ids) for ask in hidden[0].asks] == tails
    assert [text(reading.ids) for reading in visible] == [HEAD + tail for tail in tails]
    assert [ask.turn for reading in visible for ask in reading.asks] == [0, 1]


@pytest.mark.parametrize("chat", [True, False])
def test_plain_text_where_there_is_no_template(chat: bool) -> None:
    found = built(sample("multi_turn", chat=chat), visible=False, chat=not chat)
    assert text(found.readings[0].ids) == "The boat is in the harbour."
    assert [text(ask.ids) for ask in found.readings[0].asks] == [
        "\nWhere is it?\nIt is in",
        "\nWhere is it?\nIt is in the harbour\n\n\nWho?\n",
    ]
    assert found.note == (NO_TEMPLATE if chat else "")


def test_all_answers_stand_in_the_history_where_all_are_asked_for() -> None:
    turns = (Turn("?", ("one", "two"), "They are:", 5), Turn("!", ("x",)))
    made = Sample("7", "toy", "text", turns, "ruler_all", chat=False, mode="multi_turn")
    assert "They are: one, two" in text(built(made, visible=False).readings[0].asks[1].ids)


def test_special_tokens_come_first_in_plain_text() -> None:
    made = deepcopy(toy_tokenizer(chat=False))
    assert first_tokens(made) == ()
    made.backend_tokenizer.post_processor = TemplateProcessing(single="?! $A", special_tokens=[("?!", 0)])
    assert first_tokens(made) == (0,)
    found = build_prompt(made, sample(), visible=False)
    assert found.readings[0].ids[0] == 0
    assert found.readings[0].asks[0].ids[0] != 0
    assert found.relevant[0] == 1 + len("The boat is in ")


def test_relevant_tokens_are_those_of_gold_answers() -> None:
    found = built(sample(context="the harbour? A harbourmaster of the harbour"), visible=True)
    ids = found.readings[0].ids
    assert text(tuple(ids[place] for place in found.relevant)) == "the harbourthe harbour"
    assert max(found.relevant) < found.context


def test_spans_are_whole_words() -> None:
    assert find_spans("art", "art cart arts (art) art") == [(0, 3), (15, 18), (20, 23)]
    assert find_spans("港口", "在港口边") == [(1, 3)]
    assert find_spans("a.c", "abc a.c") == [(4, 7)]


def test_short_answers_are_not_looked_for() -> None:
    assert built(sample(turns=(Turn("?", ("is",)),)), visible=False).relevant == ()


def test_a_template_that_rewrites_is_refused() -> None:
    tokenizer = deepcopy(toy_tokenizer())
    tokenizer.chat_template = TEMPLATE.replace("| trim", "| upper")
    with pytest.raises(UnsupportedModelError, match="rewrites"):
        build_prompt(tokenizer, sample(), visible=False)
    tokenizer.chat_template = TEMPLATE.replace("[end]", "[{{ messages | length }}]")
    with pytest.raises(UnsupportedModelError, match="cannot go on"):
        build_prompt(tokenizer, sample("multi_turn"), visible=True)
    build_prompt(tokenizer, sample("multi_turn"), visible=False)


@pytest.mark.parametrize("broken", [{"context": " \n"}, {"turns": ()}])
def test_nothing_to_ask(broken: dict[str, Any]) -> None:
    with pytest.raises(ContextError, match="sample 7 of toy"):
        built(sample(**broken), visible=True)
