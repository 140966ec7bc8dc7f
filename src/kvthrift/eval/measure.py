"""One arm on one reading: what it holds, what it says, how far that agrees with the full cache.

The same code for every arm, the full cache included, which answers first and is what others are compared with. Knows no
task and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvthrift.eval.arm import Arm
from kvthrift.eval.bench import Bench
from kvthrift.eval.decode import Answer, Decoder, Read, all_at_once, answer, feed, follow, read
from kvthrift.eval.metrics import physics
from kvthrift.eval.metrics.agreement import Agreement, compare
from kvthrift.eval.metrics.cost import Cost
from kvthrift.eval.metrics.physics import Ints
from kvthrift.eval.probe import Layout, held, layout, positions, synchronize
from kvthrift.eval.prompt import Prompt, Reading
from kvthrift.integrations.transformers.cache import Cache


@dataclass(frozen=True)
class Said:
    """The full cache's way through one question.

    Attributes:
        answer: its own words, or the given ones.
        logits: ``[S, V]`` that each token was drawn from.
        likeliest: the S tokens it holds likeliest; the answer itself unless that was given.
    """

    answer: Answer
    logits: Tensor
    likeliest: tuple[int, ...]


Reference = dict[int, Said]
"""By turn."""


@dataclass(frozen=True)
class Part:
    """What one arm did on one reading: its cost, where entries went, and by turn answers, agreement with the full cache
    and, where the answer was given, its mean log-likelihood a token in nats; the layout if that was asked for."""

    cost: Cost
    physics: dict[str, Any]
    answers: dict[int, Answer]
    agreement: dict[int, Agreement]
    likelihood: dict[int, float]
    layout: Layout | None = None


@dataclass(frozen=True)
class Work:
    """One reading of a sample, to be gone through under any arm.

    Attributes:
        limits: new tokens allowed, by turn.
        given: answers that are not to be found but weighed, by turn.
        shared: the reading that arms share; None if each reads alone.
        recorded: whether the layout of each cache is to be told.
    """

    bench: Bench
    prompt: Prompt
    reading: Reading
    limits: Sequence[int]
    given: dict[int, tuple[int, ...]]
    shared: Read | None
    recorded: bool = False

    def full(self, arm: Arm) -> tuple[Part, Reference]:
        """The full cache's part, and its answers as the reference of others.

        Its agreement compares decoding token by token with one pass over the same answer: the noise of the arithmetic.
        """
        trial, said = Trial(self, arm), Reference()
        for turn, decoder in trial.asked():
            if turn in self.given:
                found, likeliest = trial.weigh(turn, decoder)
            else:
                found = answer(decoder, self.limits[turn], self.bench.ends)
                likeliest = found.tokens
            trial.answers[turn] = found
            said[turn] = Said(found, decoder.table(), likeliest)
            again = all_at_once(decoder, found.tokens) if self.bench.agreement else None
            if again is not None:
                trial.agreement[turn] = compare(said[turn].logits, again, likeliest, cut=found.cut)
        return trial.part(), said

    def compressed(self, arm: Arm, reference: Reference | None) -> Part:
        """Another arm's part; without agreement if the full cache has no answer."""
        trial = Trial(self, arm)
        for turn, decoder in trial.asked():
            limit, ends = self.limits[turn], self.bench.ends
            said = None if reference is None or not self.bench.agreement else reference[turn]
            if turn in self.given:
                trial.answers[turn], _ = trial.weigh(turn, decoder)
            elif said is None:
                trial.answers[turn] = answer(decoder, limit, ends)
            else:
                trial.answers[turn] = follow(decoder, said.answer, limit, ends)
            if said is not None:
                found = compare(said.logits, decoder.table(), said.likeliest, cut=said.answer.cut)
                trial.agreement[turn] = found
        return trial.part()


class Trial:
    """One arm at work on one reading."""

    def __init__(self, work: Work, arm: Arm) -> None:
        bench, shared = work.bench, work.shared
        self.work = work
        self.own = (
            None
            if shared
            else read(bench.model, work.reading.ids, arm.recipe, page=bench.page, tokenizer=bench.tokenizer)
        )
        source = self.own or shared
        assert source is not None
        self.cache: Cache = source.cache if self.own else source.cache.compressed(arm.recipe)
        self.logits, self.prefill_seconds = source.logits, source.seconds
        self.report, self.held = self.cache.report(), held(self.cache)
        self.places = survival(self.cache, work.prompt, len(work.reading.ids)) if bench.physics else {}
        self.layout = layout(self.cache, len(work.reading.ids)) if work.recorded else None
        self.answers: dict[int, Answer] = {}
        self.agreement: dict[int, Agreement] = {}
        self.likelihood: dict[int, float] = {}
        self.decoders: list[Decoder] = []
        self.question_seconds = 0.0

    def asked(self) -> Iterator[tuple[int, Decoder]]:
        """Each question put to the cache, or to a fork of it while others are to come."""
        asks = self.work.reading.asks
        for ask in asks:
            cache = self.cache if ask is asks[-1] else self.cache.fork()
            began = perf_counter()
            logits = feed(self.work.bench.model, cache, ask.ids) if ask.ids else self.logits
            synchronize(logits.device)
            self.question_seconds += perf_counter() - began
            decoder = Decoder(self.work.bench.model, cache, [logits], watched=self.work.bench.physics)
            yield ask.turn, decoder
            self.decoders.append(decoder)

    def weigh(self, turn: int, decoder: Decoder) -> tuple[Answer, tuple[int, ...]]:
        """Go along the given answer of a turn; that answer, and what the cache holds likeliest at each of its "
        "tokens."""
        given = self.work.given[turn]
        for token in given[:-1]:
            decoder.step(token)
        chances = decoder.table().float().log_softmax(dim=-1)
        picked = chances.gather(-1, torch.tensor(given, device=chances.device)[:, None])
        self.likelihood[turn] = float(picked.mean())
        return Answer(given, cut=True), tuple(chances.argmax(dim=-1).tolist())

    def part(self) -> Part:
        """All that was found."""
        cost = Cost(
            self.held,
            alone=self.own is not None,
            peak_bytes=self.report.peak_bytes if self.own else None,
            prefill_seconds=self.prefill_seconds,
            question_seconds=self.question_seconds,
            compression_seconds=self.report.compression_seconds,
            step_seconds=tuple(second for decoder in self.decoders for second in decoder.quiet_seconds),
        )
        looks = [decoder.looks for decoder in self.decoders if decoder.looks]
        found = self.places | routing(looks) if self.places else {}
        return Part(cost, found, self.answers, self.agreement, self.likelihood, self.layout)


def survival(cache: Cache, prompt: Prompt, length: int) -> dict[str, Any]:
    """What became of a context's tokens, and of those the answer needs.

    Args:
        cache: just compressed.
        prompt: says which ids are context, and which hold an answer.
        length: tokens read.
    """
    protect, where = cache.recipe.protect, positions(cache)
    stop = min(prompt.context, length - protect.recent)
    context = np.arange(
        min(protect.sinks, max(stop, 0)), max(stop, 0)
    )  # what a recipe always keeps is no choice of its
    kept = physics.survived(where, context)
    gone, chance = physics.erased(kept), physics.chance(kept)
    needed = physics.erased(physics.survived(where, np.array(prompt.relevant, dtype=np.int64)))
    return {
        "removed": physics.removed(kept),
        "evicted_layer": gone.layer,
        "evicted_model": gone.model,
        "relevant": len(prompt.relevant),
        "ger_layer": needed.layer,
        "ger_model": needed.model,
        "chance_layer": chance.layer,
        "chance_model": chance.model,
    }


def routing(looks: Sequence[Sequence[Ints]]) -> dict[str, Any]:
    """Where heads look at the first decode step: consensus and rigidity by layer, means over questions."""
    if not looks:
        return {"consensus": None, "rigidity": None}
    layers = list(zip(*looks, strict=True))
    return {
        "consensus": [round(fmean(map(physics.consensus, layer)), 6) for layer in layers],
        "rigidity": [round(fmean(map(physics.rigidity, layer)), 6) for layer in layers],
    }
