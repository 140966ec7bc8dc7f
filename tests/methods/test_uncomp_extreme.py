"""UNComp's extreme forms: a lowest group of its window only, and heads given up whose output another head's stands for.

The slow truth is the model on its whole cache, with what was dropped hidden and outputs of heads copied.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import masked
from tests.models import config, text, tiny
from tests.reading import deep, held, read
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

import kvthrift
from kvthrift import Cache, Recipe, generate, method, prefill
from kvthrift.allocate import DeletedHeads, GroupHeads
from kvthrift.calibrate import Meta, save
from kvthrift.calibrate.entropy import KIND
from kvthrift.core import Signals
from kvthrift.integrations.transformers.facts import config_fingerprint
from kvthrift.integrations.transformers.graph import obstacle
from kvthrift.score import WindowAttention

N, W = 120, 8
NAME = "tests_stand_ins"
LABELS = ((0, 1, 1, 0), (1, 0, 0, 0), (0, 0, 0, 0))  # of three layers of four heads; the last keeps all of its own
_hidden: dict[int, Tensor] = {}
_owners: dict[int, Tensor] = {}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    number, group = int(module.layer_idx), query.shape[1] // key.shape[1]  # type: ignore[arg-type]
    logits = query @ key.repeat_interleave(group, dim=1).transpose(-1, -2) * query.shape[-1] ** -0.5
    total, length = key.shape[2], query.shape[2]
    steps = torch.arange(total)
    logits = logits.masked_fill(steps > steps[total - length :, None], float("-inf"))
    if number in _hidden:
        gone = torch.zeros(*_hidden[number].shape[:2], total, dtype=torch.bool)
        gone[..., : _hidden[number].shape[2]] = ~_hidden[number]
        logits = logits.masked_fill(gone.repeat_interleave(group, dim=1)[:, :, None], float("-inf"))
    out = logits.softmax(dim=-1) @ value.repeat_interleave(group, dim=1)
    if number in _owners:
        out = torch.stack(
            [
                torch.cat([out[b, int(o) * group : (int(o) + 1) * group] for o in row])
                for b, row in enumerate(_owners[number])
            ]
        )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def recipe(budget: int = 40, **changes: Any) -> Recipe:
    heads = DeletedHeads(LABELS, (1.0, 1.0), W)
    found = method("snapkv", window=W, budget=budget).with_options(heads=heads)
    return found.with_options(**changes)


def wide() -> Any:
    return deep(3, num_key_value_heads=4, num_attention_heads=8)


def owners_of(cache: Cache, keys: dict[int, Tensor]) -> dict[int, Tensor]:
    """Written out: of each head given up, the head with the most similar keys of the prompt's last tokens."""
    out = {}
    for number, labels in enumerate(LABELS[:2]):
        k = keys[number][:, :, N - W : N].double()
        table = []
        for row in k:
            best = []
            for h, label in enumerate(labels):
                others = [o for o, other in enumerate(labels) if other != 0]
                alike = {o: float(torch.cosine_similarity(row[h], row[o], dim=-1).mean()) for o in others}
                best.append(max(others, key=lambda o: alike[o]) if label == 0 else h)
            table.append(best)
        out[number] = torch.tensor(table)
    return out


# -- in a model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_answers_are_those_of_the_whole_cache_with_entries_hidden_and_outputs_copied(batch: int) -> None:
    model, ids = wide(), text(batch, N + 12)
    cache = read(model, ids[:, :N], recipe())
    assert [[len(head) for head in layer] for layer in held(cache)] == [[8, 72, 72, 8], [120, 8, 8, 8], [40] * 4]
    slow, past = wide(), DynamicCache(config=model.config)
    slow.set_attn_implementation(NAME)
    with torch.inference_mode():
        slow(input_ids=ids[:, :N], past_key_values=past)
        keys = {n: past.layers[n].keys.clone() for n in range(3)}
        try:
            _owners.update(owners_of(cache, keys))
            _hidden.update(masked.kept(cache))
            assert all(not torch.equal(x, torch.arange(4).expand_as(x)) for x in _owners.values())
            for n in range(N, N + 6):
                ours = model(input_ids=ids[:, n : n + 1], past_key_values=cache).logits
                theirs = slow(input_ids=ids[:, n : n + 1], past_key_values=past).logits
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
            for name in ("fork", "select", "crop"):
                other = cache.fork()
                if name == "select":
                    other.batch_select_indices(torch.arange(batch))
                if name == "crop":
                    with torch.inference_mode():
                        model(input_ids=ids[:, N + 6 : N + 9], past_key_values=other)
                    other.crop(-3)
                more = DynamicCache(config=model.config)
                for layer, old in zip(more.layers, past.layers, strict=True):
                    layer.update(old.keys.clone(), old.values.clone())
                ours = model(input_ids=ids[:, N + 6 :], past_key_values=other).logits  # several tokens at once
                theirs = slow(input_ids=ids[:, N + 6 :], past_key_values=more).logits
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
        finally:
            _owners.clear()
            _hidden.clear()


def test_without_copied_outputs_it_would_not_be_the_same() -> None:
    """The test above can fail: the same entries under plain groups say something else."""
    model, ids = wide(), text(1, N)
    ours, plain = (
        read(model, ids, recipe(heads=kind(LABELS[:1] * 3, sizes, W)))
        for kind, sizes in ((DeletedHeads, (1.0, 1.0)), (GroupHeads, (1e-9, 1.0)))
    )
    assert held(ours) == held(plain)
    with torch.inference_mode():
        one, other = (model(input_ids=ids[:, :1], past_key_values=cache).logits for cache in (ours, plain))
    assert (one - other).abs().max() > 1e-2


def test_a_graph_is_not_made_of_it() -> None:
    model = SimpleNamespace(device=torch.device("cuda"), parameters=list)
    cache = read(wide(), text(1, N), recipe())
    assert obstacle(model, cache) == "which heads' outputs stand for which is looked up on the host"  # type: ignore[arg-type]
    assert obstacle(model, read(wide(), text(1, N), method("snapkv", budget=40))) != obstacle(model, cache)  # type: ignore[arg-type]


def test_beams_and_saved_caches_go_on_alike(tmp_path: Path) -> None:
    model, ids = wide(), text(2, N)
    cache = read(model, ids, recipe())
    cache.save(tmp_path / "cache")
    loaded = kvthrift.load(tmp_path / "cache", model)
    turned = cache.fork()
    turned.reorder_cache(torch.tensor([1, 0]))
    more = text(2, 5, seed=3)
    with torch.inference_mode():
        for n in range(5):
            mine, theirs, swapped = (
                model(input_ids=x, past_key_values=c).logits
                for x, c in (
                    (more[:, n : n + 1], cache),
                    (more[:, n : n + 1], loaded),
                    (more.flip(0)[:, n : n + 1], turned),
                )
            )
            torch.testing.assert_close(theirs, mine)
            torch.testing.assert_close(swapped.flip(0), mine)


def test_padded_sequences_have_stand_ins_of_their_own() -> None:
    model, ids = wide(), text(2, N)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    both = prefill(model, ids, recipe(), attention_mask=mask)
    alone = prefill(model, ids[1:, 30:], recipe())
    with torch.inference_mode():
        ours = model(
            input_ids=ids[:, :1], past_key_values=both, attention_mask=torch.cat((mask, mask[:, -1:]), dim=1),
            position_ids=torch.tensor([[N], [N - 30]]),
        ).logits  # fmt: skip
        theirs = model(input_ids=ids[1:, :1], past_key_values=alone).logits
    torch.testing.assert_close(ours[1:], theirs, atol=1e-4, rtol=1e-3)


def test_where_nothing_is_dropped_every_head_has_its_own_output() -> None:
    model, ids = wide(), text(1, N)
    made = [
        generate(model, ids, Cache(model.config, found), max_new_tokens=8, do_sample=False).tolist()
        for found in (recipe(budget=N + 8), method("full"))
    ]
    assert made[0] == made[1]
    cache = prefill(model, ids, recipe(), page=256)  # one page a head, which stays
    with torch.inference_mode():
        model(input_ids=ids[:, :1], past_key_values=cache)
    cache.crop(-N - 1)  # emptied: nothing stands in for anything any more
    again = Cache(model.config)
    with torch.inference_mode():
        for found in (cache, again):
            model(input_ids=ids[:, :30], past_key_values=found)
        ours, plain = (model(input_ids=ids[:, 30:31], past_key_values=found).logits for found in (cache, again))
    torch.testing.assert_close(ours, plain)


def table_file(folder: Path) -> str:
    made = config("llama")
    table = torch.tensor([[[0.5, 0.6, 0.2, 0.3], [0.1, 0.1, 0.8, 0.9]]] * 3)
    save(
        folder / "t",
        {"entropy": table},
        Meta(KIND, "uncomp", config_fingerprint(made), "llama", 2, 2, {"head_dim": 16}),
        force=True,
    )
    return str(folder / "t")


@pytest.mark.parametrize("decode", [False, True])
def test_the_method_gives_its_lowest_group_up(decode: bool, tmp_path: Path) -> None:
    found = method("uncomp", calibration=table_file(tmp_path), deleted=True, decode=decode, budget=40)
    assert isinstance(found.heads, DeletedHeads)
    assert found.needs == Signals(window=W, stand_ins=True)
    assert Recipe.from_plain(found.plain()) == found
    cache = read(tiny("llama"), text(1, N), found)
    assert [[len(head) for head in layer] for layer in held(cache)] == [[72, 8], [8, 72]]
    with torch.inference_mode():
        for step in range(10):
            logits = tiny("llama")(input_ids=text(1, 1, seed=step), past_key_values=cache).logits
            assert logits.isfinite().all()
    grown = 1 if decode else 10
    assert [[len(head) for head in layer] for layer in held(cache)] == [
        [72 + grown, 8 + grown],
        [8 + grown, 72 + grown],
    ]
    cache.check_integrity()


def test_staged_and_decode_hold_both_at_every_step(tmp_path: Path) -> None:
    """Room by layer group and by head group, one entry out for each one in."""
    found = method("uncomp", calibration=table_file(tmp_path), staged=4096, decode=True, budget=40)
    cache = read(tiny("llama"), text(1, N), found)
    before = [[len(head) for head in layer] for layer in held(cache)]
    assert sum(map(sum, before)) == 40 * 4
    with torch.inference_mode():
        for step in range(6):
            tiny("llama")(input_ids=text(1, 1, seed=step), past_key_values=cache)
            assert [[len(head) - 1 for head in layer] for layer in held(cache)] == before
    cache.check_integrity()


def test_a_scorer_of_any_kind_may_be_combined_with_it() -> None:
    found = Recipe("x", WindowAttention(W), heads=DeletedHeads(LABELS, (1.0, 2.0), W)).with_options(
        budget=kvthrift.Budget.parse(30), protect=kvthrift.Protect(sinks=4, recent=W)
    )
    cache = read(wide(), text(2, N), found)  # sinks are kept, too, and not compared
    assert cache.report().entries >= 30 * 24
    with torch.inference_mode():
        assert wide()(input_ids=text(2, 1), past_key_values=cache).logits.isfinite().all()
