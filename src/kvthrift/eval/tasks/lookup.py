"""Lost in the middle (2307.03172): key-value lookup and questions over k documents, with the gold one at any depth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from kvthrift.eval.sample import Sample, Task, Tokenizer, Turn
from kvthrift.eval.tasks import local
from kvthrift.eval.tasks.fit import Room, at_least, filled
from kvthrift.eval.tasks.haystack import insert, spread
from kvthrift.eval.tasks.words import distinct

_KV_GET = "lost-in-the-middle's kv-retrieval-75_keys.jsonl (nelson-liu/lost-in-the-middle)"
_QA_GET = "lost-in-the-middle's nq-open-oracle.jsonl (nelson-liu/lost-in-the-middle)"


def pairs_text(pairs: list[tuple[str, str]]) -> str:
    """Key-value pairs as a JSON object, one pair a line."""
    return "{" + ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs) + "}"


def _lookup(name: str, task: str, pairs: list[tuple[str, str]], place: int, **meta: Any) -> Sample:
    key, value = pairs[place]
    depth = place / max(len(pairs) - 1, 1)
    return Sample(
        id=name,
        task=task,
        context=f"Find the value of a key in the JSON object below.\n\n{pairs_text(pairs)}",
        turns=(Turn(f'\n\nWhat is the value of key "{key}"?\n', (value,), "Value:", 64),),
        scorer="substring",
        meta={"depth": depth, "pairs": len(pairs), **meta},
    )


@dataclass(frozen=True)
class KeyValue(Task):
    """Uuid keys and values, as many as fit; the key asked for is at each depth of a grid in turn.

    Attributes:
        depths: points of the grid of depths.
    """

    name = "lookup.kv"
    group = "lookup"
    summary = "the value of one uuid key among as many as fit"

    depths: int = 11

    def __post_init__(self) -> None:
        at_least(self, 1, depths=self.depths)

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        def make(number: int, units: int) -> Sample:
            rng = Random(f"{seed}/{self.name}/{number}")
            drawn = distinct(rng, "uuid", 2 * units)
            pairs = list(zip(drawn[:units], drawn[units:], strict=True))
            place = round(spread(number, self.depths) * (units - 1))
            return _lookup(f"{length}-{number:04d}", self.name, pairs, place, length=length)

        yield from filled(make, Room(tokenizer, length), count=count, least=2)


class KeyValue75(Task):
    """The published file of 75 keys, as it is; lengths below about 6,000 tokens cut keys away from both sides alike."""

    name = "lookup.kv75"
    group = "lookup"
    summary = "the value of one uuid key among the published 75"

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        path = local.find(data, "lost-in-the-middle/kv-retrieval-75_keys.jsonl", get=_KV_GET)
        rows = list(enumerate(local.rows(path)))
        Random(f"{seed}/{self.name}").shuffle(rows)

        def make(number: int, units: int) -> Sample:
            line, row = rows[number]
            pairs = [(key, value) for key, value in row["ordered_kv_records"]]
            place = [key for key, _ in pairs].index(row["key"])
            before = round(place / (len(pairs) - 1) * (units - 1))
            return _lookup(str(line), self.name, pairs[place - before : place - before + units], before)

        most = min((len(row["ordered_kv_records"]) for _, row in rows), default=1)
        yield from filled(make, Room(tokenizer, length), count=count, least=2, most=most, items=len(rows))


@dataclass(frozen=True)
class KDocuments(Task):
    """Natural questions with the gold passage at each depth of a grid among other questions' passages.

    Passages that hold one of the answers are no distractors. The published task takes distractors from a search engine;
    these are from other questions, so that it is easier.

    Attributes:
        documents: passages in all; 0 for as many as fit.
        depths: points of the grid of depths.
    """

    name = "lookup.documents"
    group = "lookup"
    summary = "natural questions over k passages, the gold one at any depth"

    documents: int = 0
    depths: int = 5

    def __post_init__(self) -> None:
        at_least(self, 1, depths=self.depths)
        at_least(self, 0, documents=self.documents)

    def samples(
        self, tokenizer: Tokenizer, *, length: int, count: int, seed: int, data: Path | None
    ) -> Iterator[Sample]:
        path = local.find(data, "lost-in-the-middle/nq-open-oracle.jsonl", get=_QA_GET)
        rows = list(enumerate(local.rows(path)))
        pool = {words: words.lower() for words in (_passage(row["ctxs"][0]) for _, row in rows)}
        Random(f"{seed}/{self.name}").shuffle(rows)

        @cache
        def others(number: int) -> list[str]:
            return _others(pool, rows[number][1])

        def make(number: int, units: int) -> Sample:
            line, row = rows[number]
            rng = Random(f"{seed}/{self.name}/{line}")
            chosen = rng.sample(others(number), min(units - 1, len(others(number))))
            place = round(spread(number, self.depths) * len(chosen))
            texts = insert(chosen, [_passage(row["ctxs"][0])], [place])
            return self._sample(str(line), row, texts, place, length)

        least, most = (self.documents, self.documents) if self.documents else (2, len(pool))
        room = Room(tokenizer, length)
        yield from filled(make, room, count=count, least=least, most=most, items=len(rows))

    def _sample(self, name: str, row: local.Row, texts: list[str], place: int, length: int) -> Sample:
        listed = "\n\n".join(f"Document [{number}] {words}" for number, words in enumerate(texts, 1))
        statement = "Answer the question from the documents, most of which have nothing to do with it."
        question = row["question"].rstrip("?")
        depth = place / max(len(texts) - 1, 1)
        return Sample(
            id=name,
            task=self.name,
            context=f"{statement}\n\n{listed}",
            turns=(Turn(f"\n\nQuestion: {question}?\n", tuple(row["answers"]), "Answer:", 48),),
            scorer="subspan",
            meta={"depth": depth, "documents": len(texts), "length": length},
        )


def _passage(row: dict[str, Any]) -> str:
    return f"(Title: {row['title']}) {row['text']}"


def _others(pool: dict[str, str], row: local.Row) -> list[str]:
    """Passages that hold none of a question's answers."""
    answers = [answer.lower() for answer in row["answers"]]
    return [words for words, lower in pool.items() if not any(answer in lower for answer in answers)]


TASKS = (KeyValue, KeyValue75, KDocuments)
