"""From what an arm did on a sample to its snapshot. Knows measured parts; nothing of files."""

from __future__ import annotations

from functools import cached_property

from kvthrift.eval.arm import Arm
from kvthrift.eval.bench import Bench
from kvthrift.eval.measure import Part, Reference
from kvthrift.eval.pieces import pieces, spans
from kvthrift.eval.prompt import Prompt
from kvthrift.eval.record import question
from kvthrift.eval.sample import Sample
from kvthrift.eval.snapshot import Snapshot


class Recorder:
    """Makes the snapshots of one sample's arms, all of its first reading and that one's first question."""

    def __init__(self, bench: Bench, sample: Sample, prompt: Prompt, *, visible: bool) -> None:
        self._bench = bench
        self._sample = sample
        self._prompt = prompt
        self._question = question(visible)
        self._turn = prompt.readings[0].asks[0].turn
        self._full_answer = ""

    def hear(self, reference: Reference) -> None:
        """Take the full cache's answers, which belong to every snapshot."""
        if self._turn in reference:
            self._full_answer = self._bench.decode(reference[self._turn].answer.tokens)

    def snapshot(self, arm: Arm, part: Part) -> Snapshot:
        """What an arm's cache held, and said; ``part`` must be of the first reading, with its layout."""
        layout = part.layout
        if layout is None:
            raise ValueError("a snapshot needs the layout of the cache that was measured")
        return Snapshot(
            task=self._sample.task,
            sample=self._sample.id,
            question=self._question,
            arm=arm.name,
            budget=arm.budget,
            method=arm.recipe.name,
            tokens=self._tokens,
            answer_spans=spans(self._prompt.relevant),
            layers=layout.layers,
            heads=layout.kept.shape[1],
            lengths=layout.lengths,
            kept=layout.kept,
            answer=self._bench.decode(part.answers[self._turn].tokens),
            full_answer=self._full_answer,
        )

    @cached_property
    def _tokens(self) -> tuple[str, ...]:
        return pieces(self._bench.tokenizer, self._prompt.readings[0].ids)
