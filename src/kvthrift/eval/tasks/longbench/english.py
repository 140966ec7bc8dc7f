"""LongBench's English and code sets: one prompt each. These 16 are what papers on caches average."""

from __future__ import annotations

from kvthrift.eval.tasks.longbench.base import LongBench
from kvthrift.eval.tasks.records import Form

_SHORT = "Give only the answer, and no other words."


class NarrativeQA(LongBench):
    name = "longbench.narrativeqa"
    summary = "questions about whole books and film scripts"
    form = Form(
        before="Read the story, which may be a novel or a film script, and answer the question about it as briefly as "
        "you can, in one phrase if possible, without explanation.\n\nStory: ",
        ask="\n\nNow answer the question about the story as briefly as you can, in one phrase if possible, without "
        "explanation.\n\nQuestion: {question}\n\n",
        prefix="Answer:",
        new_tokens=128,
    )


class Qasper(LongBench):
    name = "longbench.qasper"
    summary = "questions about scientific papers"
    form = Form(
        before="Read the scientific article and answer the question about it as briefly as you can, in one phrase or "
        'sentence if possible. If the article does not answer it, write "unanswerable". If it is a yes/no question, '
        'answer "yes", "no" or "unanswerable". Do not explain.\n\nArticle: ',
        ask='\n\nAnswer the question about the article above as briefly as you can; write "unanswerable" if the '
        'article does not answer it, and "yes", "no" or "unanswerable" if it is a yes/no question. Do not explain.\n\n'
        "Question: {question}\n\n",
        prefix="Answer:",
        new_tokens=128,
    )


class MultiFieldQA(LongBench):
    name = "longbench.multifieldqa_en"
    summary = "questions about long articles of many fields"
    form = Form(
        before="Read the text and answer briefly.\n\n",
        ask=f"\n\nAnswer the question from the text above. {_SHORT}\n\nQuestion: {{question}}\n",
        prefix="Answer:",
        new_tokens=64,
    )


_PASSAGES = Form(
    before=f"Answer the question from the passages. {_SHORT}\n\nThese are the passages.\n",
    ask=f"\n\nAnswer the question from the passages above. {_SHORT}\n\nQuestion: {{question}}\n",
    prefix="Answer:",
    new_tokens=32,
)


class HotpotQA(LongBench):
    name = "longbench.hotpotqa"
    summary = "two-hop questions over Wikipedia passages"
    form = _PASSAGES


class TwoWiki(LongBench):
    name = "longbench.2wikimqa"
    summary = "multi-hop questions over Wikipedia passages"
    form = _PASSAGES


class MuSiQue(LongBench):
    name = "longbench.musique"
    summary = "questions of two to four hops over Wikipedia passages"
    form = _PASSAGES


class GovReport(LongBench):
    name = "longbench.gov_report"
    summary = "one-page summaries of government reports"
    form = Form(
        before="Read the government agency's report and summarise it on one page.\n\nReport:\n",
        ask="\n\nNow summarise the report on one page.\n\n",
        prefix="Summary:",
        scorer="rouge_l_sentences",
        new_tokens=512,
    )


class QMSum(LongBench):
    name = "longbench.qmsum"
    summary = "summaries of meetings that answer a question"
    form = Form(
        before="Read the transcript of a meeting and answer the question about it in one or more sentences."
        "\n\nTranscript:\n",
        ask="\n\nAnswer the question about the meeting above in one or more sentences.\n\nQuestion: {question}\n",
        prefix="Answer:",
        scorer="rouge_l_sentences",
        new_tokens=512,
    )


class MultiNews(LongBench):
    name = "longbench.multi_news"
    summary = "one-page summaries of several news stories"
    form = Form(
        before="Read the news stories and summarise them all on one page.\n\nNews:\n",
        ask="\n\nNow summarise all the news on one page.\n\n",
        prefix="Summary:",
        scorer="rouge_l_sentences",
        new_tokens=512,
    )


class Trec(LongBench):
    name = "longbench.trec"
    summary = "the type of a question, after many examples"
    form = Form(
        before="Say what type each question is of. These are examples.\n\n",
        ask="\n{question}",
        scorer="classification",
        new_tokens=64,
        chat=False,
        first_line=True,
    )


class TriviaQA(LongBench):
    name = "longbench.triviaqa"
    summary = "trivia questions with evidence, after a few examples"
    form = Form(
        before=f"Answer the question from the passage. {_SHORT} These are examples.\n\n",
        ask="\n\n{question}",
        new_tokens=32,
        chat=False,
        first_line=True,
    )


class SamSum(LongBench):
    name = "longbench.samsum"
    summary = "summaries of chats, after many examples"
    form = Form(
        before="Summarise the conversation in a few short sentences. These are examples.\n\n",
        ask="\n\n{question}",
        scorer="rouge_l_sentences",
        new_tokens=128,
        chat=False,
        first_line=True,
    )


class PassageCount(LongBench):
    name = "longbench.passage_count"
    summary = "how many different passages there are"
    form = Form(
        before="Below are several passages of Wikipedia, some of which may be the same. Read them closely and find out "
        "how many different ones there are, repeated ones counted once.\n\n",
        ask="\n\nGive the number of different passages. Answer with the number alone: 1, 2, 3 and so on.\n\n",
        prefix="The number of different passages is:",
        scorer="count",
        new_tokens=32,
    )


class PassageRetrieval(LongBench):
    name = "longbench.passage_retrieval_en"
    summary = "which passage a summary belongs to"
    form = Form(
        before="Below are 30 passages of Wikipedia and a summary of one of them. Find out which one it summarises.\n\n",
        ask="\n\nThis is the summary.\n\n{question}\n\nGive the number of the passage that it summarises, in the form "
        '"Paragraph 1", "Paragraph 2" and so on.\n\n',
        prefix="The answer is:",
        scorer="retrieval",
        new_tokens=32,
    )


class Lcc(LongBench):
    name = "longbench.lcc"
    summary = "the next line of a source file"
    form = Form(
        before="Complete the code below.\n",
        ask="Next line of code:\n",
        scorer="code_edit",
        new_tokens=64,
        chat=False,
    )


class RepoBench(LongBench):
    name = "longbench.repobench-p"
    summary = "the next line of a source file, given others of its repository"
    form = Form(
        before="Complete the code below.\n",
        ask="{question}Next line of code:\n",
        scorer="code_edit",
        new_tokens=64,
        chat=False,
    )


TASKS = (
    NarrativeQA,
    Qasper,
    MultiFieldQA,
    HotpotQA,
    TwoWiki,
    MuSiQue,
    GovReport,
    QMSum,
    MultiNews,
    Trec,
    TriviaQA,
    SamSum,
    PassageCount,
    PassageRetrieval,
    Lcc,
    RepoBench,
)
