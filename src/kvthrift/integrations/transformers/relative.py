"""A second pass whose attention is weighed by what it adds to the hidden states, as a share of them (2601.07891).

An attention function is not shown hidden states; a model tells them once a pass is through (``output_hidden_states``,
each layer's input). Until then the pass's queries are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kvthrift import kernels
from kvthrift.core import SecondPass
from kvthrift.errors import CacheStateError, MissingSignalError
from kvthrift.integrations.transformers.facts import output_weight
from kvthrift.runtime.layer import LayerCache
from kvthrift.runtime.second_pass import SecondLook


class RelativeLook(SecondLook):
    """A second look that multiplies attention by ``||W_o v||`` of the entry over ``||h||`` of the query's token.

    ``W_o`` is the query head's block of the output projection, ``h`` what the layer was given for the token, before its
    norm. Call :meth:`weigh` after every pass. Holds the queries of one pass, all layers', meanwhile.

    Args:
        wanted, length: as for :class:`SecondLook`.
        modules: the attention module of every layer, by the model's own number; their projections are read for
            :meth:`scores`.
    """

    def __init__(self, wanted: SecondPass, length: int, modules: Mapping[int, nn.Module]) -> None:
        super().__init__(wanted, length)
        self._modules = modules
        self._asked: dict[int, tuple[LayerCache, Tensor, Tensor, float]] = {}  # layer, queries, their lse, scale

    @property
    def bytes(self) -> int:
        held = [t for _, q, lse, _ in self._asked.values() for t in (q, lse)]
        return super().bytes + sum(t.numel() * t.element_size() for t in held)

    def attend(self, place: int, layer: LayerCache, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        store = layer.store
        if store is None or not store.uniform or store.longest != self.length:
            raise CacheStateError("a second pass needs the whole context, but entries are missing or were dropped.")
        read = store.read()
        own = kernels.attend(q, k, v, scale=scale, causal=True, need_lse=True)
        whole = self.wanted.among == "all"
        pairs = [(read.keys, read.values)] if whole else [(self._near(read.keys), self._near(read.values))]
        pairs += [] if whole else [(read.keys[:, :, one], read.values[:, :, one]) for one in self._rest()]
        near, *rest = (kernels.attend(q, a, b, scale=scale, need_lse=True) for a, b in pairs)
        if own.lse is None or near.lse is None:
            raise ValueError("a second pass needs the log-sum-exp of what it attends to")
        self._asked[place] = (layer, q, torch.logaddexp(own.lse, near.lse), scale)
        return kernels.merge([near, *rest, own]).out

    def weigh(self, hidden: Sequence[Tensor]) -> None:
        """Take in the pass that is through.

        Args:
            hidden: ``[B, Q, hidden]`` of every layer of the model by its own number, each what the layer was given.

        Raises:
            MissingSignalError: the model did not tell them for every layer.
        """
        while self._asked:
            place, (layer, q, lse, scale) = self._asked.popitem()
            if layer.store is None or layer.number >= len(hidden) or hidden[layer.number].shape[1] != q.shape[2]:
                raise MissingSignalError(
                    "the model does not tell the hidden states of every layer, which attention is to be weighed by. "
                    "Use a recipe that looks at attention alone."
                )
            keys = layer.store.read().keys
            keys = keys if self.wanted.among == "all" else keys[:, :, self.start : self.stop]
            norms = hidden[layer.number].float().norm(dim=-1).clamp(min=1e-12).to(q.device)  # [B, Q]
            least = norms.amin(dim=1)  # so that what the kernel sees lies between 0 and 1
            lse = lse + (norms / least[:, None]).log()[:, None]
            mean = self.wanted.queries == "mean"
            found = kernels.received_attention(q, keys, scale=scale, lse=lse, mean=mean)
            self._join(place, found / least[:, None, None], q.shape[2])

    def scores(self, place: int, layer: LayerCache) -> Tensor:
        if place in self._found and layer.store is not None:
            weight = output_weight(self._modules[layer.number])
            self._found[place] = self._found[place] * projected_norms(layer.store.read().values, weight)
        return super().scores(place, layer)


def projected_norms(values: Tensor, weight: Tensor) -> Tensor:
    """``||W_o v||_2`` of each entry in every query head of its group.

    Args:
        values: ``[B, H, T, Dv]``.
        weight: the output projection, ``[HG, Dv, hidden]``.

    Returns:
        ``[B, HG, T]`` float32.
    """
    b, heads, entries, dim = values.shape
    blocks = weight.float()
    gram = (blocks @ blocks.transpose(-1, -2)).view(heads, -1, dim, dim)  # [H, G, Dv, Dv]
    v = values.float()[:, :, None]  # [B, H, 1, T, Dv]
    return ((v @ gram) * v).sum(dim=-1).clamp(min=0).sqrt().view(b, -1, entries)
