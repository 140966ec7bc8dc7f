"""What an engine's additional config may ask for, and what is refused with a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvthrift
from kvthrift.allocate import BudgetLayers
from kvthrift.errors import BudgetError, KvthriftError, OptionError, RecipeError, UnsupportedModelError
from kvthrift.integrations.vllm.contract import check_version
from kvthrift.integrations.vllm.plan import Policy
from kvthrift.integrations.vllm.serving import Shape, command, flag, forecast, outlook
from kvthrift.integrations.vllm.settings import Settings, read_settings
from kvthrift.recipe import Trigger

LATE = kvthrift.method("keydiff", budget=64).with_options(trigger=Trigger(prompt=False, every=8))
NEVER = LATE.with_options(trigger=Trigger(prompt=False))
ONE_LAYER = kvthrift.method("snapkv", budget=64).with_options(layers=BudgetLayers((64, 64)))


def read(asked: Any) -> Settings | None:
    return read_settings({"kvthrift": asked}, layers=30, kv_heads=3, entry_bytes=256)


def policy(asked: Any) -> Policy:
    found = read(asked)
    assert found is not None
    return found.policy


def test_without_kvthrift_nothing_is_asked() -> None:
    assert read_settings({"other": 1}, layers=1, kv_heads=1, entry_bytes=1) is None


def test_budgets_in_every_unit() -> None:
    assert policy({"method": "snapkv", "budget": 512}) == Policy(entries=512, least=32)
    assert policy({"method": "snapkv", "budget": "25%"}) == Policy(share=0.25, least=32)
    assert policy({"method": "streamingllm", "budget": "2MiB"}).entries == 2 * 2**20 // (30 * 3 * 256)


def test_a_recipe_file_and_its_contents(tmp_path: Path) -> None:
    recipe = kvthrift.method("adakv", budget=128)
    recipe.save(tmp_path / "r.toml")
    for asked in ({"recipe": str(tmp_path / "r.toml")}, {"recipe": recipe.plain()}):
        found = read(asked)
        assert found is not None
        assert found.recipe == recipe
    assert policy({"recipe": recipe.plain(), "budget": 256}).entries == 256


def test_when_it_is_seen_to() -> None:
    often = policy({"method": "snapkv", "budget": 64, "every": 32, "chunks": True})
    assert (often.at_end, often.every, often.chunk) == (True, 32, 2048)
    recipe = kvthrift.method("keydiff", budget=64).with_options(trigger=Trigger(prompt=False, every=16))
    late = policy({"recipe": recipe.plain()})
    assert (late.at_end, late.every, late.chunk) == (False, 16, None)


def test_unequal_layers_are_classes_with_the_mean_of_theirs() -> None:
    found = read({"method": "pyramidkv", "budget": 256, "groups": 5})
    assert found is not None
    assert len(found.policies) == 30
    assert len(found.classes) == 5
    kept = [one.blocks(100_000, 16) for one in found.policies]
    assert kept == sorted(kept, reverse=True)
    assert [kept.count(n) for n in dict.fromkeys(kept)] == [6] * 5
    assert 30 * 256 <= 16 * sum(kept) < 30 * (256 + 16)
    assert [one.blocks(300, 16) for one in found.policies] == [16] * 30  # published: short prompts flatten it

    listed = kvthrift.method("snapkv", budget=192, window=8).with_options(layers=BudgetLayers((256, 128) * 15))
    asked = read({"recipe": listed.plain()})
    assert asked is not None
    assert [one.blocks(9_000, 16) for one in asked.policies] == [16, 8] * 15


@pytest.mark.parametrize(
    ("asked", "error", "word"),
    [
        ({"method": "snapvk", "budget": 64}, KvthriftError, "snapkv"),
        ({"method": "snapkv", "budget": 64, "windo": 3}, KvthriftError, "windo"),
        ({"method": "h2o", "budget": 64}, RecipeError, "column sums"),
        ({"method": "headkv", "budget": 64}, RecipeError, "heads of all layers"),
        ({"method": "expected_attention", "budget": 64}, RecipeError, "query mean"),
        ({"method": "cake", "budget": 64}, RecipeError, "never sees"),
        ({"method": "snapkv"}, RecipeError, "no budget"),
        ({"method": "chunkkv", "budget": 64, "every": 32}, RecipeError, "one compression only"),
        ({"method": "chunkkv", "budget": 64, "chunks": True}, RecipeError, "one compression only"),
        ({"method": "snapkv", "budget": 64, "codec": "int8"}, RecipeError, "fewer bits"),
        ({"method": "pyramidkv", "budget": 64}, OptionError, "groups"),
        ({"method": "pyramidkv", "budget": 64, "groups": 4}, OptionError, "divide 30 layers: 1, 2, 3, 5, 6"),
        ({"method": "pyramidkv", "budget": 64, "groups": "3"}, OptionError, "neighbouring"),
        ({"method": "snapkv", "budget": 64, "groups": 3}, OptionError, "equal"),
        ({"recipe": ONE_LAYER.plain()}, KvthriftError, "2 layers"),
        ({"recipe": NEVER.plain()}, RecipeError, "never compresses"),
        ({"recipe": LATE.plain(), "chunks": True}, RecipeError, "chunks would not"),
        ({"method": "snapkv", "budget": 64, "merge": "fold"}, RecipeError, "folds"),
        ({"method": "snapkv", "budget": 0}, BudgetError, "nothing"),
        ({"method": "snapkv", "budget": "100%"}, RecipeError, "keeps the whole prompt"),
        ({"method": "kvzip", "budget": 64}, RecipeError, "a second pass"),
        ({"method": "sablock", "budget": 64}, RecipeError, "segments of the text"),
        ({"method": "snapkv", "budget": 8}, OptionError, "always keeps 32"),
        ({"method": "snapkv", "budget": "1KiB"}, OptionError, "always keeps 32"),
        ({"budget": 64}, OptionError, "method"),
        ({"method": "snapkv", "recipe": "x.toml"}, OptionError, "either"),
        ({"recipe": "nowhere.toml"}, RecipeError, "nowhere"),
        ("snapkv", OptionError, "object"),
        ({"method": "snapkv", "budget": 64, "check": "yes"}, OptionError, "check"),
        ({"method": "snapkv", "budget": 64, "chunks": 512}, OptionError, "chunks"),
    ],
)
def test_what_a_server_cannot_do_is_refused(asked: Any, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        read(asked)


def test_what_a_start_says() -> None:
    found = read({"method": "adakv", "budget": 512, "every": 64})
    assert found is not None
    assert str(found) == (
        "adakv, 512 entries a head, in whole blocks, at the end of a prompt and every 64 decoded tokens"
    )
    assert outlook(found, 2048, 16) == (128, 32)
    assert outlook(found, 300, 16) == (19, 19)
    share = read({"method": "pyramidkv", "budget": "25%", "groups": 3, "chunks": True})
    assert share is not None
    assert str(share) == (
        "pyramidkv, 25% of the prompt a head, 3 classes of layers, in whole blocks, at the end of a prompt and after "
        "every step that reads a part of it"
    )
    assert outlook(share, 4096, 16) == (256, 65)  # a quarter, and each class rounded up to whole blocks


def test_a_budget_that_no_request_outgrows_is_known() -> None:
    def idle(length: int, **asked: Any) -> bool:
        found = read({"method": "snapkv", **asked})
        assert found is not None
        return found.idle(length, 16)

    assert idle(2048, budget=2048)
    assert idle(2063, budget=2048)
    assert not idle(2064, budget=2048)
    assert not idle(2048, budget="50%")
    assert not idle(2048, budget="100%", every=64)  # an answer grows
    assert idle(2048, budget=2048, every=64, chunks=True)


def test_what_is_expected_of_a_pool() -> None:
    shape = Shape(30, 3, 256)
    small = ["--num-gpu-blocks-override=131"]
    assert shape.pool(small, "", 32, 1) == 131
    assert shape.pool(small, "", 32, 3) == 43
    assert shape.pool([], "1", 32, 1) == 2**30 // (30 * 3 * 256 * 32)
    for text, size in (("1G", 2**30), ("1g", 10**9), ("0.5g", 5 * 10**8), ("1000000", 10**6)):
        assert shape.pool(["--kv-cache-memory-bytes", text], "", 16, 1) == size // (30 * 3 * 256 * 16)
    assert shape.pool(["-tp", "3", "--kv-cache-memory-bytes", "1G"], "", 16, 1) == 2**30 // (30 * 256 * 16)
    assert shape.pool(["--kv-cache-memory-bytes", "much"], "", 16, 1) is None
    assert shape.pool([], "", 16, 1) is None
    found = read({"method": "adakv", "budget": 256})
    assert found is not None
    assert forecast(found, shape, 1503, 32, 131) == (
        "a prompt of 1,503 tokens keeps 9 of 47 blocks of 32: 5.2 times as many decode in the same memory, about 14 at "
        "a time instead of 2"
    )
    assert forecast(found, shape, 1503, 32, None).endswith("in the same memory")
    assert forecast(found, shape, 200, 32, 131) == "a prompt of 200 tokens keeps 7 of 7 blocks of 32: all is kept"
    assert forecast(found, Shape(30, 3, 256, 25), 1503, 32, 131).endswith(
        "in 5 of 30 layers; the others stay as they are"
    )


def test_only_tested_versions_are_served() -> None:
    for version in ("0.32.0+cpu", "0.32.1", "0.27.1"):
        check_version(version)
    for version in ("0.26.0", "0.33.0", "1.0.0"):
        with pytest.raises(UnsupportedModelError, match=version):
            check_version(version)


def test_the_servers_command() -> None:
    asked = {"method": "snapkv", "budget": 64}
    words = command("m", asked, ["--port", "8001", "--additional-config", '{"a": 1}', "--seed=3"])
    assert words[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", "m"]
    assert words[5:7] == ["--additional-config", '{"a": 1, "kvthrift": {"method": "snapkv", "budget": 64}}']
    assert words[7:] == ["--port", "8001", "--seed=3"]
    joined = command("m", asked, ['--additional-config={"a": 1}'])
    assert joined[5:] == words[5:7]
    for wrong in ('{"kvthrift": {}}', "nonsense", "[1]"):
        with pytest.raises(OptionError):
            command("m", asked, ["--additional-config", wrong])


@pytest.mark.parametrize(
    ("passed", "value"),
    [
        (["--port", "1", "--kv-cache-dtype", "fp8"], "fp8"),
        (["--kv-cache-dtype=fp8_e5m2", "--port", "1"], "fp8_e5m2"),
        (["--kv-cache-dtype-skip-layers", "0"], ""),
        (["--kv-cache-dtype"], ""),
        ([], ""),
    ],
)
def test_a_flag_that_is_handed_on_is_read(passed: list[str], value: str) -> None:
    assert flag(passed, "--kv-cache-dtype") == value
