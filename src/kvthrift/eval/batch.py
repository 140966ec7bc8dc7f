"""Several samples read and answered together under every arm: one batch, padded on the left.

Only what an answer needs: agreement with the full cache and what becomes of single tokens are measured sample by
sample. What goes wrong with a batch is gone through again sample by sample, so that no row pays for its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvthrift.errors import KvthriftError
from kvthrift.eval.arm import Arm
from kvthrift.eval.bench import Bench
from kvthrift.eval.decode import Answer, Read
from kvthrift.eval.job import Job, Keep
from kvthrift.eval.measure import Part
from kvthrift.eval.metrics.cost import Cost
from kvthrift.eval.probe import held, synchronize
from kvthrift.eval.prompt import Prompt, build_prompt
from kvthrift.eval.record import LIKELIHOOD, Score
from kvthrift.eval.round import Failure, Round, attempt
from kvthrift.eval.rows import Row
from kvthrift.integrations.transformers.cache import Cache
from kvthrift.integrations.transformers.second_pass import finish, start


@dataclass
class Batch:
    """Jobs of one task, all with the question visible or all with it hidden, to be measured in one go.

    Made to be sent, as a :class:`Job` is.
    """

    jobs: list[Job]

    @property
    def missing(self) -> bool:
        """Whether any row is."""
        return any(job.missing for job in self.jobs)

    def rows(self, bench: Bench, scorers: Mapping[str, Score], keep: Keep | None) -> Iterator[Row]:
        """As :meth:`Job.rows`, arm by arm."""
        rounds = [job.round(bench, scorers) for job in self.jobs]
        for number, row in Together(rounds).rows():
            yield {**row, "place": list(self.jobs[number].place)}

    def heard(self, row: Row) -> None:
        """Note that a row is there."""
        next(job for job in self.jobs if list(job.place) == row["place"]).heard(row)

    def parts(self) -> list[Job]:
        """What is left, sample by sample."""
        return [job for job in self.jobs if job.missing]


def can_join(job: Job) -> bool:
    """Whether a job asks one question and nothing but its answer is wanted."""
    return not job.alone and not job.recorded and len(job.sample.turns) == 1 and job.sample.scorer != LIKELIHOOD


def joined(jobs: Iterator[Job], size: int) -> Iterator[Job | Batch]:
    """Batches of up to so many jobs, those of one task and one way to show the question together, in order."""
    waiting: dict[tuple[int, bool], list[Job]] = {}
    for job in jobs:
        if not can_join(job):
            yield job
            continue
        for key in [key for key in waiting if key[0] != job.place[0]]:
            yield Batch(waiting.pop(key))
        bucket = waiting.setdefault((job.place[0], job.visible), [])
        bucket.append(job)
        if len(bucket) == size:
            yield Batch(waiting.pop((job.place[0], job.visible)))
    yield from map(Batch, waiting.values())


@dataclass
class Together:
    """The rounds of a batch.

    An arm that is another recipe in every round, since it draws by chance, is answered row by row from that reading.
    """

    rounds: Sequence[Round]
    left: list[list[Arm]] = field(init=False)

    def __post_init__(self) -> None:
        self.left = [list(one.missing) for one in self.rounds]

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Number of a round, and its row; every missing one."""
        found = attempt(self._read)
        if not isinstance(found, Failure):
            for arm in self.rounds[0].arms:
                yield from self._under(arm, *found)
        for number, (one, arms) in enumerate(zip(self.rounds, self.left, strict=True)):
            if arms:
                for row in replace(one, missing=tuple(arms)).rows():
                    yield number, row

    def _read(self) -> tuple[list[Prompt], Read, Tensor]:
        """All contexts in one pass, uncompressed, and the mask of their columns."""
        one, bench = self.rounds[0], self.rounds[0].bench
        prompts = [build_prompt(bench.tokenizer, r.sample, visible=r.visible) for r in self.rounds]
        for prompt in prompts:
            bench.check_length(prompt.longest, "a sample with its answer")
            if len(prompt.readings) != 1 or len(prompt.readings[0].asks) != 1:
                raise KvthriftError("only samples with one reading and one question can be joined")
        ids, mask = padded([prompt.readings[0].ids for prompt in prompts], bench.model.device)
        full = one.arms[0].recipe
        observe = [arm.recipe for arm in one.arms[1:]]
        cache = start(bench.model.config, full, page=bench.page, observe=observe)
        cache.tell(ids, tokenizer=bench.tokenizer, attention_mask=mask)
        began = clock(bench.model)
        logits = feed(bench.model, cache, ids, mask)
        finish(bench.model, cache, ids, full, attention_mask=mask, tokenizer=bench.tokenizer)
        seconds = clock(bench.model) - began
        cache.compact()
        return prompts, Read(cache, logits, seconds), mask

    def _under(self, arm: Arm, prompts: list[Prompt], read: Read, mask: Tensor) -> Iterator[tuple[int, Row]]:
        """The rows that one arm lacks; none if it fails on the batch."""
        wanted = [number for number, arms in enumerate(self.left) if any(a.name == arm.name for a in arms)]
        own = {number: next(a for a in self.left[number] if a.name == arm.name) for number in wanted}
        alike = all(one.recipe == arm.recipe for one in own.values())
        groups = [list(range(len(self.rounds)))] if alike else [[number] for number in wanted]
        for group in groups if wanted else []:
            parts = attempt(partial(self._parts, own.get(group[0], arm), group, prompts, read, mask))
            if isinstance(parts, Failure):
                continue
            for number, part in zip(group, parts, strict=True):
                if number in own:
                    self.left[number].remove(own[number])
                    row = self.rounds[number].row(own[number], [part], prompts[number])
                    yield number, {**row, "batch": len(group)}

    def _parts(self, arm: Arm, group: list[int], prompts: list[Prompt], read: Read, mask: Tensor) -> list[Part]:
        """What an arm does on these rows of the batch, all of them or one."""
        bench, count = self.rounds[0].bench, len(group)
        whole = read.cache if count == len(prompts) else only(read.cache, group[0])
        mask, logits = mask[group], read.logits[group]
        prompts, rounds = [prompts[number] for number in group], [self.rounds[number] for number in group]
        cache = whole.compressed(arm.recipe)
        compression = cache.report().compression_seconds
        sizes = [held(only(cache, row)) for row in range(count)]
        began = clock(bench.model)
        asks = [prompt.readings[0].asks[0].ids for prompt in prompts]
        if any(asks):
            ids, more = padded(asks, bench.model.device)
            mask = torch.cat((mask, more), dim=1)
            logits = feed(bench.model, cache, ids, mask)
        asked = clock(bench.model)
        limits = [one.sample.turns[0].max_new_tokens for one in rounds]
        answers, steps = say(bench, cache, logits, mask, limits)
        seconds = {"question_seconds": asked - began, "compression_seconds": compression}
        shares = {name: value / count for name, value in seconds.items()}
        shares["prefill_seconds"] = read.seconds / len(self.rounds)
        step = tuple(value / count for value in steps)
        costs = [Cost(size, alone=False, peak_bytes=None, step_seconds=step, **shares) for size in sizes]
        return [Part(cost, {}, {0: answer}, {}, {}) for cost, answer in zip(costs, answers, strict=True)]


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[B, T]``, padded on the left; a row without ids is all padding."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def feed(model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor) -> Tensor:
    """Feed ``[B, N]`` ids; logits ``[B, V]`` behind the last. ``mask`` covers all columns so far."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.inference_mode():
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    logits: Tensor = out.logits[:, -1]
    return logits


def say(
    bench: Bench, cache: Cache, logits: Tensor, mask: Tensor, limits: Sequence[int]
) -> tuple[list[Answer], list[float]]:
    """Each row's likeliest tokens up to its end token or limit, and the seconds of each step."""
    said: list[list[int]] = [[] for _ in limits]
    open_rows, ends, seconds = set(range(len(limits))), bench.ends, list[float]()
    while True:
        tokens = logits.argmax(dim=-1)
        for row, token in enumerate(tokens.tolist()):
            if row in open_rows:
                said[row].append(token)
                if token in ends or len(said[row]) >= limits[row]:
                    open_rows.discard(row)
        if not open_rows:
            return [Answer(tuple(one), one[-1] not in ends) for one in said], seconds
        began = clock(bench.model)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        logits = feed(bench.model, cache, tokens[:, None], mask)
        seconds.append(clock(bench.model) - began)


def only(cache: Cache, row: int) -> Cache:
    """One sequence of a batch, its pages shared."""
    fork = cache.fork()
    fork.batch_select_indices(torch.tensor([row]))
    return fork


def clock(model: PreTrainedModel) -> float:
    """Seconds, with the device's work done."""
    synchronize(model.device)
    return perf_counter()
