"""Reading a context twice: where it is refused, what is fed, padded batches, what it holds, and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.conftest import byte_tokenizer, save_model
from tests.fitted import CALIBRATED
from tests.live import live_bytes
from tests.models import build, config, text, tiny
from tests.reading import TWICE, held
from typer.testing import CliRunner

import kvthrift
from kvthrift import Cache, method, prefill
from kvthrift.cli import app
from kvthrift.core import SecondPass
from kvthrift.errors import ContextError, MaskError, MissingSignalError, RecipeError
from kvthrift.eval.decode import read
from kvthrift.integrations.transformers.second_pass import FIRST, Words

N = 150


def test_the_methods_that_look_twice_are_known() -> None:
    assert set(TWICE) == {n for n in kvthrift.methods() if n not in CALIBRATED and method(n).needs.second_pass}


# -- refused where it is impossible --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("budget", [40, 4 * N])
def test_a_plain_generate_is_refused_before_anything_is_read(name: str, budget: int) -> None:
    model, ids = tiny("llama"), text(1, N)
    past = Cache(model.config, name, budget=budget)
    with pytest.raises(MissingSignalError, match=r"Read the context with kvthrift\.prefill"):
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=past, max_new_tokens=4)  # type: ignore[operator]
    assert past.get_seq_length() == 0
    assert past.report().entries == 0


def test_an_emptied_cache_is_refused_again() -> None:
    model, ids = tiny("llama"), text(1, N)
    past = prefill(model, ids, "kvzip", budget=40)
    past.reset()
    with pytest.raises(MissingSignalError, match="second pass"):
        model(input_ids=ids, past_key_values=past)


def test_compressing_while_decoding_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"every=8 cannot be honoured\. Leave every out"):
        prefill(tiny("llama"), text(1, N), "kvzip", budget=40, every=8)


def test_a_pass_that_was_not_made_or_does_not_reach_the_end_is_refused() -> None:
    model, ids = tiny("llama"), text(1, N)
    only_read = Cache(model.config, observe=["kvzip"])
    model(input_ids=ids, past_key_values=only_read)
    with pytest.raises(MissingSignalError, match="none was made"):
        only_read.compressed("kvzip", budget=40)
    with pytest.raises(MissingSignalError, match="observe="):
        prefill(model, ids, observe=["kvzip"]).compressed("kvcompose", budget=40)
    whole = prefill(model, ids, observe=["kvzip"])
    model(input_ids=ids[:, :5], past_key_values=whole)
    with pytest.raises(MissingSignalError, match="all that is held"):
        whole.compressed("kvzip", budget=40)
    whole.crop(-5)
    assert held(whole.compressed("kvzip", budget=40)) == held(prefill(model, ids, "kvzip", budget=40))


def test_a_repetition_beyond_the_models_positions_is_refused() -> None:
    model = build(config("llama", max_position_embeddings=200))
    prefill(model, text(1, 120), "kvzip", budget=40, repeat=60)
    with pytest.raises(ContextError, match="the text has 240 tokens, but the model reads at most 200"):
        prefill(model, text(1, 120), "kvcompose", budget=40)


# -- what is fed ---------------------------------------------------------------------------------------------------


def test_words_are_the_recipes_own_or_the_tokenizers_or_none() -> None:
    tokenizer = byte_tokenizer()
    assert Words.of(SecondPass(), None) == Words()
    assert Words.of(SecondPass(instructed=False), tokenizer) == Words()
    assert Words.of(SecondPass(first=(1,), reply=(2,)), tokenizer) == Words((1,), (), (2,))
    plain = Words.of(SecondPass(), tokenizer)
    assert tokenizer.decode(list(plain.first)) == FIRST
    assert tokenizer.decode(list(plain.reply)) == "\n\n"
    tokenizer.chat_template = "{% for turn in messages %}[user]{{ turn['content'] }}[end]{% endfor %}[answer]"
    assert tokenizer.decode(list(Words.of(SecondPass(), tokenizer).reply)) == "[end][answer]"


def test_a_tokenizer_changes_what_is_fed() -> None:
    model, ids = build(config("llama", vocab_size=300)), text(1, N)
    tokenizer = byte_tokenizer()
    words = Words.of(SecondPass(), tokenizer)
    asked = prefill(model, ids, "kvzip", budget=40, repeat=60, tokenizer=tokenizer)
    by_ids = prefill(
        model, ids, "kvzip", budget=40, repeat=60, first=words.first, later=words.later, reply=words.reply
    )  # fmt: skip
    assert held(asked) == held(by_ids)
    assert held(asked) != held(prefill(model, ids, "kvzip", budget=40, repeat=60))


# -- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("wanted", TWICE)
def test_a_row_of_a_padded_batch_keeps_what_it_does_alone(name: str, side: str, wanted: str) -> None:
    model, rows = tiny(name), [text(1, n, seed=n) for n in (150, 97, 60)]
    ids, mask = torch.zeros(3, 150, dtype=torch.long), torch.zeros(3, 150, dtype=torch.long)
    for b, row in enumerate(rows):
        place = slice(150 - row.shape[1], None) if side == "left" else slice(0, row.shape[1])
        ids[b, place], mask[b, place] = row[0], 1
    recipe = method(wanted, budget=30, **({"repeat": 40} if wanted == "kvzip" else {}))
    if (name, side) == ("gemma3", "right"):
        with pytest.raises(MaskError, match="Pad on the left"):
            prefill(model, ids, recipe, attention_mask=mask)
        return
    together = prefill(model, ids, recipe, attention_mask=mask)
    together.check_integrity()
    for b, row in enumerate(rows):
        alone = prefill(model, row, recipe)
        for ours, theirs in zip(together.state.layers, alone.state.layers, strict=True):
            assert ours.store is not None
            assert theirs.store is not None
            assert (ours.store.lengths[b] == theirs.store.lengths[0]).all()
            for h, n in enumerate(theirs.store.lengths[0]):
                assert ours.store.positions()[b, h, :n].tolist() == theirs.store.positions()[0, h, :n].tolist()


# -- what is held --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", TWICE)
def test_bytes_are_those_of_live_tensors_before_and_after(wanted: str, tmp_path: Path) -> None:
    model, ids = tiny("llama"), text(2, N)
    whole = prefill(model, ids, observe=[wanted], page=16)
    assert whole.report().bytes == live_bytes(whole)
    cut = prefill(model, ids, wanted, budget=40, page=16)
    report = cut.report()
    assert report.bytes == live_bytes(cut)
    assert report.entries == 40 * 2 * 2 * 2
    assert report.peak_bytes > report.full_bytes  # all of it was held, and said so
    assert held(whole.compressed(wanted, budget=40)) == held(cut)
    cut.save(tmp_path / "context.kv")
    again = kvthrift.load(tmp_path / "context.kv", model)
    assert held(again) == held(cut)
    more = text(2, 3)
    with torch.inference_mode():
        left, right = (model(input_ids=more, past_key_values=c).logits for c in (again, cut.fork()))
    torch.testing.assert_close(left, right)


def test_sharing_a_reading_keeps_what_reading_alone_does() -> None:
    model, ids, tokenizer = build(config("llama", vocab_size=300)), text(1, N)[0].tolist(), byte_tokenizer()
    recipes = [method("kvzip", budget=40, repeat=60), method("kvcompose", budget=40), method("snapkv", budget=40)]
    shared = read(model, ids, method("full"), page=16, observe=recipes, tokenizer=tokenizer)
    for recipe in recipes:
        alone = read(model, ids, recipe, page=16, tokenizer=tokenizer)
        assert held(shared.cache.compressed(recipe)) == held(alone.cache)
        torch.testing.assert_close(shared.logits, alone.logits)


# -- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_model(tmp_path_factory.mktemp("tiny"), "llama")
    (made / "text.txt").write_text("The cat sat on the mat. " * 8)
    return made


def command(verb: str, folder: Path, *more: str) -> Any:
    words = [verb, "--model", folder, "--context", folder / "text.txt", "--question", "Who sat?", *more]
    return CliRunner().invoke(app, [str(word) for word in words])


def test_run_with_the_question_hidden(folder: Path) -> None:
    more = ("--method", "kvzip", "--budget", "40", "--max-new-tokens", "3")
    done = command("run", folder, *more, "--hide-question", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["entries_after"] < found["entries_before"]
    refused = command("run", folder, *more, "--json")
    assert refused.exit_code == 2
    assert "--hide-question" in refused.output.replace("\n", " ")


def test_inspect_with_the_question_hidden(folder: Path) -> None:
    done = command("inspect", folder, "--methods", "kvzip,snapkv", "--budget", "40", "--hide-question", "--json")
    assert done.exit_code == 0, done.output
    names = [arm["arm"] for arm in json.loads(done.stdout)["arms"]]
    assert names == ["kvzip@40", "snapkv@40"]
