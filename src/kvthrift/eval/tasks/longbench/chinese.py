"""LongBench's Chinese sets: one prompt each, in Chinese. Scoring cuts words with jieba, which must be installed."""

# ruff: noqa: RUF001

from __future__ import annotations

from kvthrift.eval.tasks.longbench.base import LongBench
from kvthrift.eval.tasks.records import Form


class Chinese(LongBench):
    """A Chinese set: not in the group that papers average."""

    group = "longbench_zh"


class MultiFieldQAZh(Chinese):
    name = "longbench.multifieldqa_zh"
    summary = "questions about long Chinese articles"
    form = Form(
        before="请先读下面的文章，然后简短作答。\n\n",
        ask="\n\n请根据上文回答问题，只写答案，不要写别的话。\n\n问题：{question}\n",
        prefix="答案：",
        scorer="qa_f1_zh",
        new_tokens=64,
    )


class DuReader(Chinese):
    name = "longbench.dureader"
    summary = "Chinese search questions over several pages"
    form = Form(
        before="请根据几篇文章回答问题。\n\n文章如下：\n",
        ask="\n\n请根据上面的文章回答问题。\n\n问题：{question}\n",
        prefix="答案：",
        scorer="rouge_l_zh",
        new_tokens=128,
    )


class VcSum(Chinese):
    name = "longbench.vcsum"
    summary = "summaries of Chinese meetings"
    form = Form(
        before="请读下面的会议记录，写一段总结，概括会议内容。\n会议记录：\n",
        ask="\n\n请写会议总结。\n",
        prefix="总结：",
        scorer="rouge_l_zh",
        new_tokens=512,
    )


class Lsht(Chinese):
    name = "longbench.lsht"
    summary = "the topic of a Chinese news story, after many examples"
    form = Form(
        before="请判断新闻属于哪一类，下面是例子。\n\n",
        ask="\n{question}",
        scorer="classification",
        new_tokens=64,
        chat=False,
        first_line=True,
    )


class PassageRetrievalZh(Chinese):
    name = "longbench.passage_retrieval_zh"
    summary = "which Chinese passage a summary belongs to"
    form = Form(
        before="下面有若干段文字和其中一段的摘要，请找出摘要出自哪一段。\n\n",
        ask='\n\n摘要如下。\n\n{question}\n\n请写出这一段的编号，格式为"段落1"、"段落2"等。\n\n',
        prefix="答案是：",
        scorer="retrieval",
        new_tokens=32,
    )


TASKS = (MultiFieldQAZh, DuReader, VcSum, Lsht, PassageRetrievalZh)
