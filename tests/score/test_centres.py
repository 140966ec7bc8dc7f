"""Query centres against their formula, key by key, offset by offset, in complex numbers."""

from __future__ import annotations

import math

import pytest
import torch
from tests.fitted import query_centres
from tests.views import layer_view, plain_rope
from torch import Tensor

from kvthrift import CalibrationError, ModelMismatchError, OptionError
from kvthrift.core import LayerView, Rope
from kvthrift.score import QueryCentres
from kvthrift.score.centres import _BLOCK, TOP, centre_logits, turned_ahead
from kvthrift.score.surrogate import pack, unpack

DIM, HALF = 8, 4


def slow(scorer: QueryCentres, view: LayerView, rope: Rope) -> Tensor:
    """What stands in the paper: keys are un-rotated, and offsets are gone through one by one."""
    table = unpack(scorer.weights, scorer.layers, scorer.heads)[view.layer].double()
    half, (b, heads, t, _) = len(rope.inv_freq), view.keys.shape
    out = torch.full((b, heads, t), math.nan, dtype=torch.float64)
    for i in range(b):
        for h in range(heads):
            n, best = int(view.lengths[i, h]), []
            at = view.positions[i, h, :n]
            keys = rope.rotate(view.keys[i, h, :n].double(), -at).double()
            k = torch.complex(keys[:, :half], keys[:, half : 2 * half])
            free = at >= int(view.prompt[i]) if scorer.pinned and view.prompt is not None else at >= 0
            for g in range(view.group):
                row = table[h * view.group + g]
                m, u = torch.complex(row[:half], row[half : 2 * half]), row[-half:]
                logits = keys[:, 2 * half :] @ row[2 * half : -half]
                for power in range(scorer.offsets):
                    far = (int(view.seen[i]) + 2**power - at)[:, None].double()
                    phase = rope.inv_freq.double() * far + (m * k.conj()).angle()
                    logits = logits + (m.abs() * k.abs() * phase.cos()).sum(dim=-1) / scorer.offsets
                logits = logits + ((u - m.abs()).clamp(min=0) * k.abs()).sum(dim=-1)
                best.append((logits - logits[free].mean()) / logits[free].std(correction=0))
            out[i, h, :n] = torch.stack(best).amax(dim=0).masked_fill(~free, TOP)
    return out


def ready(*, rope: Rope | None = None, prompt: int = 0, **sizes: object) -> LayerView:
    view = layer_view(dim=DIM, **sizes)  # type: ignore[arg-type]
    view.rope, view.prompt = rope or plain_rope(DIM), torch.full((len(view.seen),), prompt)
    return view


@pytest.mark.parametrize("entries", [2, 63, 64, 65])
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("offsets", [1, 17])
def test_scores_are_the_papers_formula(entries: int, pinned: bool, offsets: int) -> None:
    scorer = QueryCentres(query_centres(4, 6, DIM).weights, 4, 6, offsets, pinned)
    lengths = [[entries, 2, max(entries - 7, 2)]] * 2
    view = ready(batch=2, heads=3, group=2, lengths=lengths, seen=90, prompt=0 if entries == 2 else 20, layer=2)
    found, wanted = scorer.score(view), slow(scorer, view, view.rope or plain_rope(DIM))
    torch.testing.assert_close(found[view.valid].double(), wanted[view.valid], atol=2e-3, rtol=2e-3)


def test_a_part_of_the_dims_may_be_rotated() -> None:
    rope = Rope(plain_rope(DIM).inv_freq[:2])
    scorer = query_centres(1, 2, DIM, half=2)
    view = ready(rope=rope, heads=2, entries=50, prompt=5)
    torch.testing.assert_close(scorer.score(view).double(), slow(scorer, view, rope), atol=2e-3, rtol=2e-3)
    with pytest.raises(ModelMismatchError, match="with 12 numbers, but layer 0 has 2 heads with 10"):
        query_centres(1, 2, DIM).score(view)


def test_with_queries_that_all_point_one_way_and_one_offset_it_is_the_attention_logit_of_that_query() -> None:
    """With u = |m|, the score is Re(m e^(i omega t) conj(k)) of keys as they are cached."""
    rope, seen = plain_rope(DIM), torch.tensor([77])
    mean = torch.randn(2, DIM)
    keys = rope.rotate(torch.randn(1, 1, 60, DIM), torch.arange(60).expand(1, 1, 60))
    query = turned_ahead(mean, seen, rope, 1)
    found = centre_logits(keys, query[:, None], torch.zeros(1, 2, HALF), HALF)[0, 0]  # [G, T]
    m, k = (torch.complex(x[..., :HALF].double(), x[..., HALF:].double()) for x in (mean, keys[0, 0]))
    turn = torch.polar(torch.ones(HALF, dtype=torch.float64), rope.inv_freq.double() * 78)
    wanted = ((m * turn)[:, None] * k.conj()).real.sum(dim=-1)
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)
    at_78 = rope.rotate(mean, torch.tensor([78, 78]))
    torch.testing.assert_close(found, at_78 @ keys[0, 0].T, atol=1e-4, rtol=1e-4)


def test_permuting_the_cache_permutes_the_scores() -> None:
    scorer, view = query_centres(4, 6, DIM), ready(heads=3, group=2, entries=70, seen=100, prompt=30)
    order = torch.randperm(70)
    before = scorer.score(view)
    view.keys, view.positions = view.keys[:, :, order], view.positions[:, :, order]
    torch.testing.assert_close(scorer.score(view), before[:, :, order], atol=1e-5, rtol=1e-5)
    assert before.std() > 0.1


def test_an_attention_scaling_in_queries_and_keys_counts_twice() -> None:
    """Calibrated queries and cached keys both have it in them; standardised, it changes no order."""
    rope, mean, keys = plain_rope(DIM), torch.randn(2, DIM), torch.randn(1, 1, 9, DIM)
    spread = torch.rand(1, 2, HALF)
    query = turned_ahead(mean, torch.tensor([9]), rope, 17)[:, None]
    scaled = turned_ahead(1.5 * mean, torch.tensor([9]), rope, 17)[:, None]
    plain = centre_logits(keys, query, spread, HALF)
    torch.testing.assert_close(centre_logits(1.5 * keys, scaled, 1.5 * spread, HALF), 2.25 * plain)


def test_long_layers_are_gone_through_in_blocks() -> None:
    keys, query, spread = torch.randn(1, 1, _BLOCK + 3, DIM), torch.randn(1, 1, 2, DIM), torch.rand(1, 2, HALF)
    found = centre_logits(keys, query, spread, HALF)
    end = centre_logits(keys[:, :, -5:], query, spread, HALF)
    assert found.shape == (1, 1, 2, _BLOCK + 3)
    torch.testing.assert_close(found[..., -5:], end)


def test_the_prompt_comes_first_and_its_first_tokens_first_of_all() -> None:
    view = ready(heads=2, entries=40, prompt=12)
    score = query_centres(1, 2, DIM).score(view)
    assert (score[..., :12] == TOP).all()
    assert (score[..., 12:].abs() <= 40**0.5).all()  # no standardised number is larger
    alone = query_centres(1, 2, DIM, pinned=False).score(view)
    assert (alone < TOP).all()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(OptionError, match="offsets=0"):
        QueryCentres(offsets=0)
    with pytest.raises(OptionError, match="do not fit 3 layers"):
        QueryCentres(pack(torch.ones(2, 2, 5)), 3, 2)
    with pytest.raises(CalibrationError, match="without a table"):
        QueryCentres().score(ready(heads=2, entries=5))
    with pytest.raises(ModelMismatchError, match="of 4 layers of 6 query heads"):
        query_centres(4, 6, DIM).score(ready(heads=2, entries=5))
