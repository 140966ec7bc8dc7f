"""KVzip's further forms: KVzip+ against a slow twin, whole heads, and KVCompose's task-aware probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tests.fitted import fitted_to
from tests.knowing import Spelling
from tests.models import config, text, tiny
from tests.reading import held, read
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvthrift import (
    BudgetError,
    Cache,
    CalibrationError,
    MissingSignalError,
    ModelMismatchError,
    OptionError,
    Recipe,
    method,
    methods,
    prefill,
)
from kvthrift.allocate import WholeHeads
from kvthrift.calibrate import Meta, load, save
from kvthrift.calibrate.heads import KIND
from kvthrift.integrations.transformers import second_pass
from kvthrift.integrations.transformers.facts import config_fingerprint
from kvthrift.integrations.transformers.head_scores import measure_head_scores
from kvthrift.score import SecondPassAttention

N, SINKS, WORD = 120, 4, 7
PROJECTIONS = ("o_proj", "dense", "out_proj")


def blocks(model: PreTrainedModel) -> list[Tensor]:
    """Of every layer, the output projection of each query head ``[HG, hidden, D]``, in float64."""
    found = []
    for module in model.modules():
        if "Attention" in type(module).__name__ and hasattr(module, "layer_idx"):
            linear = next(getattr(module, n) for n in PROJECTIONS if isinstance(getattr(module, n, None), nn.Linear))
            dim = getattr(module, "head_dim", None) or module.head_size
            found.append(linear.weight.detach().double().unflatten(1, (-1, dim)).transpose(0, 1))
    return found


@torch.inference_mode()
def slow(
    name: str, ids: Tensor, again: Tensor, start: int, stop: int, *, among: str = "chunk", mean: bool = False
) -> list[Tensor]:
    """Largest share ``[H, stop - start]`` that an entry has in any repeated token's hidden state, layer by layer."""
    model = tiny(name, "eager")
    inputs: list[Tensor] = []  # of each layer, as a hook sees them
    layers = [x for x in model.modules() if isinstance(x, nn.Module) and "Layer" in type(x).__name__]
    layers = [x for x in layers if any("Attention" in type(y).__name__ for y in x.children())]

    def see(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs.append((given[0] if given else named["hidden_states"])[0].double())

    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    both = torch.cat((ids, again), dim=1)
    out = model(input_ids=both, output_attentions=True, use_cache=True)
    for hook in hooks:
        hook.remove()
    scores = []
    for number, rows in enumerate(out.attentions):
        rows = rows[0, :, N:].double()  # [HG, Q, all]
        if among == "chunk":
            seen = [*range(SINKS), *range(start, stop), *range(N, both.shape[1])]
            rows = rows[..., seen] / rows[..., seen].sum(dim=-1, keepdim=True)
            rows = rows[..., SINKS : SINKS + stop - start]
        else:
            rows = rows[..., start:stop]
        values = out.past_key_values.layers[number].values[0, :, start:stop].double()  # [H, T, D]
        share = torch.zeros(rows.shape, dtype=torch.float64)
        group = rows.shape[0] // values.shape[0]
        for head, block in enumerate(blocks(model)[number]):
            added = (values[head // group] @ block.T).norm(dim=-1)  # [T]
            share[head] = rows[head] * added / inputs[number][N:].norm(dim=-1)[:, None]
        best = (share.mean(dim=1) if mean else share.amax(dim=1)).unflatten(0, (-1, group))
        scores.append(best.amax(dim=1).float())
    return scores


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("chunk", [2000, 50])
def test_kvzip_plus_is_the_share_of_the_hidden_state(name: str, chunk: int) -> None:
    model, ids = tiny(name), text(1, N)
    recipe = method("kvzip", plus=True, repeat=chunk, first=(WORD,), later=(WORD,), overlap=0, budget=40)
    assert isinstance(recipe.scorer, SecondPassAttention)
    found = [x.second_pass[recipe.scorer.look][0] for x in prefill(model, ids, observe=[recipe]).state.layers]
    for start in range(SINKS, N, chunk):
        stop = min(start + chunk, N)
        again = torch.cat((torch.tensor([[WORD]]), ids[:, start:stop]), dim=1)
        for ours, theirs in zip(found, slow(name, ids, again, start, stop), strict=True):
            torch.testing.assert_close(ours[:, start:stop], theirs, atol=1e-5, rtol=2e-3)
        assert all(not layer[:, :SINKS].any() for layer in found)


@pytest.mark.parametrize("queries", ["max", "mean"])
def test_the_same_over_all_that_was_read(queries: Literal["max", "mean"]) -> None:
    model, ids = tiny("gpt_neox"), text(1, N)
    recipe = Recipe("x", SecondPassAttention(0, "all", queries, instructed=False, relative=True))
    assert isinstance(recipe.scorer, SecondPassAttention)
    found = [x.second_pass[recipe.scorer.look][0] for x in prefill(model, ids, observe=[recipe]).state.layers]
    wanted = slow("gpt_neox", ids, ids, 0, N, among="all", mean=queries == "mean")
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=2e-3)


def test_one_chunk_that_is_the_whole_context_is_seen_alike() -> None:
    for chunk, alike in ((2000, True), (40, False)):
        recipes = [method("kvzip", plus=True, repeat=chunk, sees=sees) for sees in ("all", "chunk")]
        layer = prefill(tiny("llama"), text(1, N), observe=recipes).state.layers[1]
        one, other = layer.second_pass.values()
        assert torch.allclose(one, other, atol=1e-5) == alike


def test_kvzip_plus_keeps_the_highest_and_asks_for_a_pass_of_its_own() -> None:
    model, ids = tiny("llama"), text(2, N)
    plain, plus = method("kvzip", budget=30), method("kvzip", budget=30, plus=True)
    both = prefill(model, ids, observe=[plain, plus])
    assert len({x for layer in both.state.layers for x in layer.second_pass}) == 2
    kept = [held(both.compressed(recipe)) for recipe in (plain, plus)]
    assert kept == [held(prefill(model, ids, recipe)) for recipe in (plain, plus)]
    assert kept[0] != kept[1]
    assert sum(len(head) for layer in kept[1] for head in layer) == 30 * 4


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next"])
@torch.inference_mode()
def test_scoring_leaves_the_cache_as_it_was(name: str) -> None:
    model, ids = tiny(name), text(2, N)
    caches = [prefill(model, ids, observe=[method("kvzip", plus=True, repeat=40)]), prefill(model, ids)]
    for _ in range(2):
        ours, plain = (model(input_ids=ids[:, :1], past_key_values=c).logits for c in caches)
        assert torch.equal(ours, plain)
    caches[0].check_integrity()


def test_the_peak_counts_what_it_is_looked_at_with() -> None:
    model, ids = tiny("llama"), text(1, N)
    reports = [prefill(model, ids, "kvzip", budget=30, plus=x).report() for x in (False, True)]
    fed = N - SINKS
    hidden, queries = 3 * 64 * 4 * fed, 2 * 4 * (16 + 1) * 4 * fed  # two layers and the end; queries and their lse
    assert reports[1].peak_bytes >= reports[1].full_bytes + hidden + queries > reports[0].peak_bytes


def test_a_padded_row_scores_as_it_does_alone() -> None:
    model, ids = tiny("llama"), text(2, N)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    recipe = method("kvzip", plus=True, budget=30)
    assert isinstance(recipe.scorer, SecondPassAttention)
    both = prefill(model, ids, observe=[recipe], attention_mask=mask)
    alone = prefill(model, ids[1:, 30:], observe=[recipe])
    for ours, theirs in zip(both.state.layers, alone.state.layers, strict=True):
        one, other = (layer.second_pass[recipe.scorer.look] for layer in (ours, theirs))
        torch.testing.assert_close(one[1, :, : N - 30], other[0], atol=1e-5, rtol=1e-4)


def test_a_model_that_does_not_tell_its_hidden_states_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mute(second_pass.RelativeLook):
        def weigh(self, hidden: Any) -> None:
            super().weigh(())

    monkeypatch.setattr(second_pass, "RelativeLook", Mute)
    with pytest.raises(MissingSignalError, match="does not tell the hidden states of every layer"):
        prefill(tiny("llama"), text(1, N), "kvzip", plus=True, budget=30)


# -- whole heads ---------------------------------------------------------------------------------------------------


def table_file(folder: Path, *, kind: str = KIND, heads: int = 2) -> str:
    meta = Meta(kind, "kvzip", config_fingerprint(config("llama")), "llama", 2, heads, {})
    save(folder / "t", {"importance": torch.tensor([[0.5, 0.9], [0.7, 0.1]])[:, :heads]}, meta, force=True)
    return str(folder / "t")


def test_whole_heads_stay_and_others_keep_sinks_and_recent(tmp_path: Path) -> None:
    recipe = method("kvzip", budgets="heads", calibration=table_file(tmp_path), recent=6, budget=50)
    assert not recipe.needs.second_pass
    found = held(read(tiny("llama"), text(1, N), recipe))  # a plain forward pass
    assert [[len(head) for head in layer] for layer in found] == [[10, N], [60, 10]]
    assert found[0][0] == found[1][1] == [*range(4), *range(N - 6, N)]
    assert found[1][0] == [*range(4), *range(N - 56, N)]
    full = read(tiny("llama"), text(1, N), method("kvzip", budgets="heads", calibration=table_file(tmp_path), budget=N))
    assert full.report().entries == full.report().full_entries


def test_the_measured_table_is_the_most_that_any_entry_scores(tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    made = measure_head_scores(model, Spelling(), out, samples=2, length=150)  # type: ignore[arg-type]
    table = made.tensors["importance"]
    assert table.shape == (2, 2)
    assert bool(((table > 0) & (table <= 1)).all())
    assert len(set(table.flatten().tolist())) == 4
    assert torch.equal(load(out, kind=KIND).tensors["importance"], table)
    recipe = method("kvzip", budgets="heads", calibration=str(out), budget=60)
    assert isinstance(recipe.heads, WholeHeads)
    best = [int(n) for n in (table == table.max()).nonzero()[0]]
    found = held(read(model, text(1, N), recipe))
    assert len(found[best[0]][best[1]]) == N
    assert method("headkv", calibration=str(out), budget=60).heads is not None  # the two tables mean the same


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    file = table_file(tmp_path)
    with pytest.raises(ModelMismatchError, match="was calibrated for the model with fingerprint"):
        Cache(config("qwen3"), "kvzip", budgets="heads", calibration=file, budget=30)
    with pytest.raises(ModelMismatchError, match="was calibrated for the model with fingerprint"):
        Cache(config("llama"), "kvzip", budgets="heads", budget=30)
    with pytest.raises(CalibrationError, match="neither a file nor shipped for kvzip"):
        method("kvzip", budgets="heads", calibration="llama-9")
    with pytest.raises(CalibrationError, match="is needed here"):
        method("kvzip", budgets="heads", calibration=table_file(tmp_path, kind="query_entropy"))
    save(tmp_path / "odd", {"importance": torch.ones(2, 2)}, Meta(KIND, "kvzip", "x", "llama", 2, 1, {}))
    with pytest.raises(CalibrationError, match="one importance for each of 2 x 1 heads"):
        method("kvzip", budgets="heads", calibration=str(tmp_path / "odd"))
    with pytest.raises(OptionError, match="plus=True scores entries"):
        method("kvzip", budgets="heads", plus=True)
    with pytest.raises(BudgetError, match="always keeps 4 sinks and 6 recent"):
        Cache(config("llama"), "kvzip", budgets="heads", calibration=table_file(tmp_path), recent=6, budget=9)


def test_the_shipped_table_is_one_of_the_embedded_model() -> None:
    heads = method("kvzip", budgets="heads", budget="60%").heads
    assert isinstance(heads, WholeHeads)
    assert (len(heads.importance), len(heads.importance[0])) == (30, 3)
    assert str(heads) == "whole(30 x 3 heads)"
    assert {"plus", "recent", "calibration"} <= {option.name for option in methods()["kvzip"].options}


def test_made_up_tables_fit_any_model() -> None:
    recipe = fitted_to(method("kvzip", budgets="heads", budget=40), config("gpt_neox"))
    report = read(tiny("gpt_neox"), text(2, N), recipe).report()
    assert report.entries == 40 * 3 * 4 * 2


# -- probes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_a_probe_is_fed_in_place_of_the_context(name: str) -> None:
    model, ids, probe = tiny(name), text(1, N), tuple(text(1, 17, seed=5)[0].tolist())
    recipe = method("kvcompose", probe=probe, budget=30)
    assert isinstance(recipe.scorer, SecondPassAttention)
    context = prefill(model, ids, observe=[recipe, "kvcompose"])
    with torch.inference_mode():
        rows = tiny(name, "eager")(
            input_ids=torch.cat((ids, torch.tensor([probe])), dim=1), output_attentions=True
        ).attentions
    for layer, theirs in zip(context.state.layers, rows, strict=True):
        ours = layer.second_pass[recipe.scorer.look][0]
        most = theirs[0, :, N:, :N].amax(dim=1).unflatten(0, (len(ours), -1)).mean(dim=1)
        torch.testing.assert_close(ours, most, atol=1e-5, rtol=1e-3)
    assert held(context.compressed(recipe)) != held(context.compressed("kvcompose", budget=30))


def test_a_probe_is_refused_where_a_chunk_is_repeated() -> None:
    with pytest.raises(OptionError, match='a probe needs among="all"'):
        SecondPassAttention(probe=(3, 4))
    with pytest.raises(OptionError, match="must be 0 or more"):
        SecondPassAttention(among="all", probe=(-3,))
