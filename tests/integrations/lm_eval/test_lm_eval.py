"""The harness's model: same numbers as the plain model where everything is kept, others where it is not."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.eval.toys import toy_tokenizer
from tests.models import tiny

from kvthrift import method
from kvthrift.errors import BudgetError, KvthriftError, OptionError, UnknownNameError
from kvthrift.integrations.lm_eval import NAME, register

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness and its libraries have their own

CONTEXT = "the quick brown fox jumps over the lazy dog and the boat is in the harbour of a town, " * 2 + "then"


def ending_tokenizer() -> Any:
    """The toy tokenizer with an end token."""
    tokenizer = deepcopy(toy_tokenizer())
    tokenizer.eos_token = "<0>"
    return tokenizer


def model(name: str = "full", **options: Any) -> Any:
    """The harness's model around a tiny one."""
    from kvthrift.integrations.lm_eval.model import CompressedLM

    return CompressedLM(tiny("llama"), method=name, tokenizer=ending_tokenizer(), page=16, **options)


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def ids(text: str) -> list[int]:
    return list(toy_tokenizer()(text)["input_ids"])


def chances(context: list[int], said: list[int]) -> torch.Tensor:
    """Log-probabilities of ``said`` as transformers alone has them."""
    with torch.no_grad():
        logits = tiny("llama", "sdpa")(input_ids=torch.tensor([context + said])).logits[0, len(context) - 1 : -1]
    return logits.log_softmax(dim=-1)


def scored(lm: Any, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    return found


@pytest.mark.parametrize("name", ["full", "snapkv", "h2o"])
def test_with_room_for_all_it_is_the_plain_model(name: str) -> None:
    lm = model(name, **({} if name == "full" else {"budget": 4000}))
    pairs = [(CONTEXT, "yes"), (CONTEXT, "no, never"), ("", "alone")]
    for (context, said), (value, greedy) in zip(pairs, scored(lm, *pairs), strict=True):
        before = ids(context) or [lm.prefix_token_id]
        table = chances(before, ids(said))
        expected = table.gather(-1, torch.tensor(ids(said))[:, None]).sum()
        assert value == pytest.approx(float(expected), abs=1e-3)
        assert greedy == (table.argmax(dim=-1).tolist() == ids(said))


def test_greedy_continuations_are_known() -> None:
    context = ids(CONTEXT)
    said = int(chances(context, [1])[0].argmax())
    found = model()._loglikelihood_tokens([(None, context, [said]), (None, context, [said + 1])], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_even_a_single_token_is_said_by_the_compressed_cache() -> None:
    kept, cut = (scored(model("random", budget=budget), (CONTEXT, "y")) for budget in (4000, 40))
    assert kept[0][0] != cut[0][0]


def test_answers_of_one_context_share_its_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    import kvthrift.integrations.lm_eval.model as module

    pairs = [(CONTEXT, said) for said in ("yes", "no", "perhaps", "yes")]
    apart = [scored(model("snapkv", budget=48), pair)[0] for pair in pairs]
    reads: list[int] = []
    real = module.prefill
    monkeypatch.setattr(module, "prefill", lambda *a, **o: reads.append(1) or real(*a, **o))
    lm = model("snapkv", budget=48)
    assert scored(lm, *pairs) == apart
    assert len(reads) == 1


def test_a_text_in_chunks() -> None:
    text = CONTEXT * 2
    requests = instances("loglikelihood_rolling", (text,), ("short",))
    full = model(chunk=50).loglikelihood_rolling(requests, disable_tqdm=True)
    for (said,), found in zip((one.args for one in requests), full, strict=True):
        table = chances([model().prefix_token_id], ids(said))
        assert found == pytest.approx(float(table.gather(-1, torch.tensor(ids(said))[:, None]).sum()), rel=1e-4)
    small = model("streamingllm", budget=60, chunk=50).loglikelihood_rolling(requests, disable_tqdm=True)
    assert small[0] != pytest.approx(full[0], rel=1e-4)
    assert small[1] == pytest.approx(full[1], rel=1e-4)


def test_a_text_beyond_the_model_is_read_in_windows() -> None:
    lm = model(max_length=64, chunk=16)
    (found,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (CONTEXT,)), disable_tqdm=True)
    expected, given = 0.0, ids(CONTEXT)
    for start in range(0, len(given), 64):
        said = given[start : start + 64]
        before = [lm.prefix_token_id] if not start else given[: start + len(said)][-65 : -len(said)]
        expected += float(chances(before, said).gather(-1, torch.tensor(said)[:, None]).sum())
    assert found == pytest.approx(expected, rel=1e-4)


def generated(lm: Any, **wanted: Any) -> str:
    (found,) = lm.generate_until(instances("generate_until", (CONTEXT, wanted)), disable_tqdm=True)
    return str(found)


def test_generation_is_that_of_the_plain_model() -> None:
    out = tiny("llama", "sdpa").generate(
        torch.tensor([ids(CONTEXT)]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    expected = toy_tokenizer().decode(out[0, len(ids(CONTEXT)) :], skip_special_tokens=True)
    assert generated(model(), until=[], max_gen_toks=12) == expected
    assert generated(model("snapkv", budget=4000), max_gen_toks=12) == expected
    stop = expected[4:6]
    assert generated(model(), until=[stop], max_gen_toks=12) == expected[: expected.index(stop)]
    assert generated(model(), until=stop, max_gen_toks=12) == expected[: expected.index(stop)]


def test_more_of_a_prompt_may_be_held_back() -> None:
    lm = model("streamingllm", budget=40, tail=30)
    cache, tail = lm._context(ids(CONTEXT))
    assert tail == ids(CONTEXT)[-30:]
    assert cache.report().entries == 40 * 4


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"name": "snapvk"}, UnknownNameError, "snapkv"),
        ({"name": "snapkv", "budget": 4}, BudgetError, "4 entries"),
        ({"tail": 0}, OptionError, "tail=0"),
        ({"chunk": 1}, OptionError, "chunk=1"),
        ({"name": "knorm", "recipe": "x.toml"}, OptionError, "complete recipe"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[KvthriftError], said: str) -> None:
    with pytest.raises(error, match=said):
        model(**options)


def test_sampling_is_refused() -> None:
    for wanted in ({"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(OptionError, match="greedy"):
            generated(model(), **wanted)


def test_a_recipe_file(tmp_path: Path) -> None:
    method("knorm", budget=48).save(tmp_path / "mine.toml")
    assert model(recipe=str(tmp_path / "mine.toml")).recipe == method("knorm", budget=48)
    assert model(recipe=str(tmp_path / "mine.toml"), budget="50%").recipe == method("knorm", budget="50%")


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
doc_to_text: "{{{{text}}}}"
{rest}
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: ["red", "green"]
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
OPEN = """
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_the_harness_runs_a_local_task(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    data = tmp_path / "data.jsonl"
    docs = [{"text": CONTEXT + str(n), "label": n % 2, "answer": "blue"} for n in range(4)]
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, rest in (("toy_choice", CHOICE), ("toy_open", OPEN)):
        text = TASK.format(name=name, data=data, cache=tmp_path / "cache", rest=rest)
        (tmp_path / f"{name}.yaml").write_text(text)
    tiny("llama").save_pretrained(tmp_path / "model")
    ending_tokenizer().save_pretrained(tmp_path / "model")
    register()
    register()  # twice is fine
    found = lm_eval.simple_evaluate(
        model=NAME,
        model_args=f"pretrained={tmp_path / 'model'},method=snapkv,budget=48,window=8,dtype=float32,device=cpu",
        tasks=["toy_choice", "toy_open"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert 0 <= found["results"]["toy_choice"]["acc,none"] <= 1
    assert found["results"]["toy_open"]["exact_match,none"] == 0
    assert found["config"]["kvthrift_recipe"] == method("snapkv", budget=48, window=8).plain()
    for sample in found["samples"]["toy_choice"]:
        pairs = [(sample["doc"]["text"], f" {color}") for color in ("red", "green")]
        expected = scored(model("snapkv", budget=48, window=8), *pairs)
        assert [one[0][0] for one in sample["resps"]] == pytest.approx([one[0] for one in expected], rel=1e-4)
