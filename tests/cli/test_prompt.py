"""Where a question begins, in tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cli.conftest import POSITIONS, TEMPLATE, byte_tokenizer
from tests.models import build, config
from transformers import PreTrainedTokenizerFast

from kvthrift import ContextError, UnsupportedModelError
from kvthrift.cli.prompt import build_prompt, check_fits, cut, room, tokenize

BYTES = byte_tokenizer()
MERGING = byte_tokenizer(("Ċ", "Ċ"), ("ĊĊ", "w"), ("l", "l"), ("?", "["))  # Ċ is a line break
TEMPLATED = byte_tokenizer(("Ċ", "w"), ("d", "]"))
TEMPLATED.chat_template = TEMPLATE

TOKENIZERS = pytest.mark.parametrize("tokenizer", [BYTES, MERGING, TEMPLATED], ids=["bytes", "merging", "templated"])
WORDS = st.text("wl?\n[] é", min_size=1).filter(str.strip)


@TOKENIZERS
@given(context=WORDS, question=WORDS)
def test_what_comes_before_a_question_holds_nothing_of_it(
    tokenizer: PreTrainedTokenizerFast, context: str, question: str
) -> None:
    prompt = build_prompt(tokenizer, context, question)
    other = build_prompt(tokenizer, context, "something else")
    head, ids = prompt.ids[0, : prompt.before_question], prompt.ids[0]
    before = tokenizer.decode(head)
    assert tokenizer.decode(ids).startswith(before)
    assert f"{tokenizer.decode(other.ids[0])}".startswith(before)
    assert context.strip() in tokenizer.decode(ids)
    assert question.strip() in tokenizer.decode(ids)[len(before) :]


def test_a_token_across_the_seam_goes_to_the_question() -> None:
    prompt = build_prompt(MERGING, "hall", "why")
    assert MERGING.convert_ids_to_tokens(prompt.ids[0].tolist()) == ["h", "a", "ll", "ĊĊw", "h", "y", "Ċ"]
    assert prompt.before_question == 3
    assert prompt.context_tokens == 3


def test_a_question_that_the_template_says_too_is_found() -> None:
    prompt = build_prompt(TEMPLATED, "text", "answer")
    assert TEMPLATED.decode(prompt.ids[0, : prompt.before_question]) == "[user]text\n\n"


def test_a_template_that_rewrites_the_message_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] | upper }}{% endfor %}"
    with pytest.raises(UnsupportedModelError, match="rewrites the message"):
        build_prompt(tokenizer, "text", "why?")


@TOKENIZERS
@pytest.mark.parametrize("tokens", [1, 5, 63, 1000])
def test_a_text_is_cut_at_its_end(tokenizer: PreTrainedTokenizerFast, tokens: int) -> None:
    text = "hall? wall\n\nwe wéll\n" * 5
    short = cut(tokenizer, text, tokens)
    assert text.startswith(short)
    assert len(tokenize(tokenizer, short)) <= max(tokens, 2)  # a cut inside é keeps it whole
    assert tokens < 1000 or short == text


def test_what_fits_is_what_room_says() -> None:
    model = build(config("llama", vocab_size=len(BYTES), max_position_embeddings=POSITIONS))
    space = room(model, BYTES, "why?", 10)
    assert POSITIONS - 40 < space < POSITIONS
    check_fits(model, build_prompt(BYTES, "x" * space, "why?"), 10)
    with pytest.raises(ContextError, match="reads at most 1024"):
        check_fits(model, build_prompt(BYTES, "x" * (space + 20), "why?"), 10)
