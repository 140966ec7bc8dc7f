"""Questions with the passages that answer them, read from local data sets: SQuAD form, HotpotQA form, ircot's prompts.

Knows nothing of prompts or lengths.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvthrift.eval.tasks import local


@dataclass(frozen=True)
class Question:
    """A question, what answers it, and the passages around it.

    Attributes:
        id: unique in its data set.
        text: the question.
        answers: any of them is right.
        gold: passages that hold the answer (for ircot's prompts: these and three more, not told apart).
        near: passages of the same article, the first distractors.
        source: the data set's name.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    near: tuple[str, ...] = field(default=(), repr=False)
    source: str = ""


def squad(data: Path | None) -> tuple[list[Question], list[str]]:
    """SQuAD v1.1's dev set in full if it is there, else the 1,190 questions of it that XQuAD has."""
    names = ("squad/dev-v1.1.json", "xquad/xquad.en.json")
    path = local.find(data, *names, get="SQuAD v1.1's dev-v1.1.json or XQuAD's xquad.en.json (google-deepmind/xquad)")
    articles = local.document(path)["data"]
    pool = list(dict.fromkeys(p["context"] for article in articles for p in article["paragraphs"]))
    return [question for article in articles for question in _article(article, path.parent.name)], pool


def _article(article: dict[str, Any], source: str) -> Iterator[Question]:
    contexts = [paragraph["context"] for paragraph in article["paragraphs"]]
    for paragraph in article["paragraphs"]:
        gold = paragraph["context"]
        near = tuple(context for context in contexts if context != gold)
        for asked in paragraph["qas"]:
            answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
            yield Question(asked["id"], asked["question"], answers, (gold,), near, source)


def multi_hop(data: Path | None) -> tuple[list[Question], list[str]]:
    """HotpotQA's distractor dev set if it is there, else ircot's 89 questions of four two-hop data sets."""
    full = "hotpotqa/hotpot_dev_distractor_v1.json"
    names = (full, f"multihop/hotpotqa{_IRCOT}")
    path = local.find(data, *names, get="HotpotQA's hotpot_dev_distractor_v1.json or ircot's prompts and corpus")
    return _hotpot(path) if "multihop" not in path.parts else _ircot(data)


def _hotpot(path: Path) -> tuple[list[Question], list[str]]:
    questions = []
    for row in local.document(path):
        passages = {title: f"{title}\n{''.join(parts)}" for title, parts in row["context"]}
        titles = {title for title, _ in row["supporting_facts"]}
        gold = tuple(words for title, words in passages.items() if title in titles)
        near = tuple(words for title, words in passages.items() if title not in titles)
        questions.append(Question(row["_id"], row["question"], (row["answer"],), gold, near, "hotpotqa"))
    return questions, list(dict.fromkeys(words for question in questions for words in question.gold + question.near))


_IRCOT = ".gold_with_3_distractors_context_direct_qa_codex.txt"
_CORPUS = "multihop/2wikimultihopqa_corpus.json"


def _ircot(data: Path | None) -> tuple[list[Question], list[str]]:
    questions = []
    for source in ("hotpotqa", "2wikimultihopqa", "musique", "iirc"):
        path = local.find(data, f"multihop/{source}{_IRCOT}", get=f"ircot's {source} prompt (StonyBrookNLP/ircot)")
        questions += [_block(block, source) for block in local.text(path).split("# METADATA:")[1:]]
    path = local.find(data, _CORPUS, get="HippoRAG's 2wikimultihopqa_corpus.json (OSU-NLP-Group/HippoRAG)")
    corpus = [f"{row['title']}\n{row['text']}" for row in local.document(path)]
    own = [words for question in questions for words in question.gold]
    return questions, list(dict.fromkeys([*own, *corpus]))


def _block(block: str, source: str) -> Question:
    """One worked prompt: its passages, "Q:" and "A:"."""
    name = re.search(r'"qid": "([^"]+)"', block)
    passages, _, asked = block.partition("\n\nQ: ")
    text, _, answer = asked.partition("\nA: ")
    parts = [part.strip() for part in passages.split("Wikipedia Title: ")[1:]]
    return Question(name[1] if name else text.strip(), text.strip(), (answer.strip(),), tuple(parts), (), source)
