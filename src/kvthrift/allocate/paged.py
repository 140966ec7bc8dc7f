"""Budgets in bytes are of whole pages: what heads were granted, rounded so that all pages fit, layer by layer."""

from __future__ import annotations

import numpy as np

from kvthrift.allocate.share import Ints


def in_pages(counts: Ints, lengths: Ints, least: Ints, page: int, room: int) -> Ints:
    """Pages of each head ``[H]``, at most ``room`` in all, that hold about as many entries as were granted.

    Each head gets the whole pages of its entries, then those with the largest remainders one more, so that what some
    give back others take, and no entry is lost where the grants fill whole pages together. Where heads that need a page
    leave too little, those go without that have most beyond their grant. Ties go to the lowest head.

    Args:
        counts: ``[H]`` entries granted.
        lengths: ``[H]`` entries there are.
        least: ``[H]`` pages that a head must have; together no more than ``room``.
        page: entries of a page.
        room: pages of all heads.
    """
    most = -(-lengths // page)
    found = np.clip(counts // page, np.minimum(least, most), most)
    while (spare := room - int(found.sum())) != 0:
        short = counts - found * page
        able = np.flatnonzero((short > 0) & (found < most) if spare > 0 else found > least)
        if not len(able):
            break
        chosen = able[np.argsort(-short[able] if spare > 0 else short[able], kind="stable")][: abs(spare)]
        found[chosen] += 1 if spare > 0 else -1
    return found


class PageRoom:
    """The pages that a budget of bytes comes to, handed out to layers in their order.

    A layer gets what the grants up to it come to in pages, less what those before it took. It always gets what its
    heads must have, and that is kept back for layers still to come; so the sum is never more than there is.

    Args:
        entries: ``[B]`` of all layers and heads; what is over whole pages is not given out.
        layers: that share them.
        page: entries of a page.
        least: entries that every head must be able to hold.
    """

    def __init__(self, entries: Ints, layers: int, page: int, least: int) -> None:
        self.page = page
        self._least = -(-max(least, 1) // page)
        self._pages = entries // page
        self._granted = np.zeros_like(entries)
        self._taken = np.zeros_like(entries)
        self._rest = layers

    def grant(self, counts: Ints, lengths: Ints, *, even: bool) -> Ints:
        """Entries of each head ``[B, H]`` of the next layer, as full pages: all there are in a head, if that is less.

        Args:
            counts: ``[B, H]`` entries asked for.
            lengths: ``[B, H]`` entries there are.
            even: every head of a sequence gets as many pages.
        """
        self._rest -= 1
        heads = counts.shape[1]
        least = np.minimum(-(-lengths // self.page), self._least)
        self._granted = self._granted + counts.sum(axis=1)
        back = self._rest * heads * self._least
        found = np.empty_like(counts)
        for b, row in enumerate(counts):
            free = int(self._pages[b] - self._taken[b]) - back
            room = min(int(self._granted[b]) // self.page - int(self._taken[b]), free)
            room = max(room, int(least[b].sum()))
            if even:
                found[b] = np.minimum(max(room // heads, int(least[b].max())), -(-lengths[b] // self.page))
            else:
                found[b] = in_pages(row, lengths[b], least[b], self.page, room)
        self._taken = self._taken + found.sum(axis=1)
        return np.minimum(found * self.page, lengths)
