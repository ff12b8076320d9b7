"""Benchmarks whose answer is a short text: HotpotQA, NQ-Open, SQuAD 2.0, TriviaQA and XQuAD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedrag_cli.data.benchmarks.config import Squad2ExamplesConfig
from fedrag_cli.data.benchmarks.loading import Benchmark, MissingLabelError, kept_metadata, passage_id, texts_value
from fedrag_cli.data.columns import answers_value, checked_text, get_value, id_value, text_value
from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.readers import kind_of
from fedrag_cli.data.row_problems import BadValueError
from fedrag_cli.errors import DataError

UNKNOWN_ANSWER = "<unk>"


def _hotpot_qa_example(values: Mapping[str, Any]) -> Example:
    paragraphs = _hotpot_qa_paragraphs(values)
    titles = dict.fromkeys(texts_value(values, "supporting_facts.title"))
    absent = titles.keys() - {node.metadata["title"] for node in paragraphs}
    if absent:
        raise BadValueError(f"the supporting page '{min(absent)}' is not in its context")
    return Example(
        id_value(values, "id"),
        text_value(values, "question"),
        answers_value(values, "answer"),
        tuple(dict.fromkeys(node.id for node in paragraphs if node.metadata["title"] in titles)),
        kept_metadata(values, "type", "level"),
    )


def _hotpot_qa_paragraphs(values: Mapping[str, Any]) -> list[KnowledgeNode]:
    titles = texts_value(values, "context.title")
    contents = get_value(values, "context.sentences")
    if not isinstance(contents, list | tuple) or len(contents) != len(titles):
        raise BadValueError("context.sentences is no list of as many items as context.title")
    return [
        _hotpot_qa_paragraph(checked_text(title, "context.title"), content)
        for title, content in zip(titles, contents, strict=True)
    ]


def _hotpot_qa_paragraph(title: str, sentences: Any) -> KnowledgeNode:
    if not isinstance(sentences, list | tuple) or not all(isinstance(sentence, str) for sentence in sentences):
        raise BadValueError(f"context.sentences of '{title}' is {kind_of(sentences)}, not a list of texts")
    content = " ".join(sentence.strip() for sentence in sentences if sentence.strip())
    text = checked_text(f"{title}: {content}", "context.sentences")
    return KnowledgeNode(passage_id(text, title), text, {"title": title})


HOTPOT_QA = Benchmark(
    "hotpotqa/hotpot_qa", _hotpot_qa_example, _hotpot_qa_paragraphs, name="distractor", folders=("distractor",)
)
"""Yang et al., "HotpotQA: A Dataset for Diverse, Explainable Multi-hop Question Answering", arXiv 1809.09600.

In the configuration distractor each question has its two paragraphs and eight others. The authors report exact match
and F1 of the answer and of the supporting facts, by `type` (bridge, comparison) and `level` too. The configuration
fullwiki is left out: its contexts are what a retriever found, which often lack the supporting paragraphs.
"""


def _nq_open_example(values: Mapping[str, Any]) -> Example:
    return Example("", text_value(values, "question"), answers_value(values, "answer"))


NQ_OPEN = Benchmark(
    "google-research-datasets/nq_open", _nq_open_example, name="nq_open", folders=("nq_open", ".", "data")
)
"""Lee et al., "Latent Retrieval for Weakly Supervised Open Domain Question Answering", arXiv 1906.00300.

Made of Natural Questions. The authors report the exact match with any of the accepted answers after SQuAD's
normalisation, over all of Wikipedia, which the data set does not contain.
"""


def _squad_example(values: Mapping[str, Any]) -> Example:
    """Make an example of a row in SQuAD's schema whose question has an answer."""
    return Example(
        id_value(values, "id"),
        text_value(values, "question"),
        answers_value(values, "answers.text"),
        (_squad_paragraphs(values)[0].id,),
        kept_metadata(values, "title"),
    )


def _squad_paragraphs(values: Mapping[str, Any]) -> list[KnowledgeNode]:
    """Make the one passage of a row in SQuAD's schema; XQuAD's rows have no title."""
    text = text_value(values, "context")
    metadata = kept_metadata(values, "title")
    return [KnowledgeNode(passage_id(text, str(metadata.get("title", ""))), text, metadata)]


def _squad_v2_example(values: Mapping[str, Any]) -> Example:
    answerable = bool(texts_value(values, "answers.text"))
    metadata = kept_metadata(values, "title") | {"answerable": answerable}
    if not answerable:
        return Example(id_value(values, "id"), text_value(values, "question"), ("",), (), metadata)
    example = _squad_example(values)
    return Example(example.id, example.query, example.responses, example.relevant_ids, metadata)


SQUAD_V2 = Benchmark(
    "rajpurkar/squad_v2",
    _squad_v2_example,
    _squad_paragraphs,
    name="squad_v2",
    folders=("squad_v2", ".", "data"),
)
"""Rajpurkar et al., "Know What You Don't Know: Unanswerable Questions for SQuAD", arXiv 1806.03822.

A third to a half of the questions are not answered by their paragraph: they have no relevant paragraph, and the empty
answer is the accepted one. The authors report exact match and F1 over all accepted answers.
"""


def load_squad_v2_examples(config: Squad2ExamplesConfig) -> list[Example]:
    """Load the questions of SQuAD 2.0, without the unanswerable ones where the config leaves them out.

    Raises:
        ConfigError: A revision is given for a local copy.
        DataError: The split is missing or bad, or no answerable question is among its rows.
    """
    examples = SQUAD_V2.load_examples(config)
    if config.answerable_only:
        examples = [example for example in examples if example.metadata["answerable"]]
    if not examples:
        raise DataError(
            f"None of the questions that were read of the split '{config.split}' is answerable.", "Raise `limit`."
        )
    return examples


def _trivia_qa_example(values: Mapping[str, Any]) -> Example:
    value = text_value(values, "answer.value")
    if value == UNKNOWN_ANSWER:
        raise MissingLabelError(f"answer.value is '{UNKNOWN_ANSWER}'")
    aliases = [alias for alias in texts_value(values, "answer.aliases") if alias]
    return Example(
        id_value(values, "question_id"),
        text_value(values, "question"),
        tuple(dict.fromkeys([value, *aliases])),
        tuple(dict.fromkeys(_trivia_qa_ids(values))),
        kept_metadata(values, "question_source"),
    )


def _trivia_qa_pages(values: Mapping[str, Any]) -> list[KnowledgeNode]:
    ids = _trivia_qa_ids(values)
    titles = texts_value(values, "entity_pages.title")
    texts = texts_value(values, "entity_pages.wiki_context")
    if not len(ids) == len(titles) == len(texts):
        raise BadValueError("the lists in entity_pages differ in length")
    return [
        KnowledgeNode(page, checked_text(text, f"wiki_context of '{page}'"), {"title": title})
        for page, title, text in zip(ids, titles, texts, strict=True)
    ]


def _trivia_qa_ids(values: Mapping[str, Any]) -> list[str]:
    """Return the names of the pages' files without their ending; each page has one, whichever question it is for."""
    names = texts_value(values, "entity_pages.filename")
    return [checked_text(name.removesuffix(".txt"), "entity_pages.filename") for name in names]


TRIVIA_QA = Benchmark("mandarjoshi/trivia_qa", _trivia_qa_example, _trivia_qa_pages, ("train", "validation"))
"""Joshi et al., "TriviaQA: A Large Scale Distantly Supervised Challenge Dataset for Reading Comprehension", arXiv
1705.03551.

The authors report exact match and F1 with the answer or any of its aliases. That a page contains an answer was found
by matching, so a relevant page may not answer the question. The configurations with web pages (rc, rc.web) are left
out: they repeat the ids of questions.
"""

XQUAD = Benchmark("google/xquad", _squad_example, _squad_paragraphs)
"""Artetxe et al., "On the Cross-lingual Transferability of Monolingual Representations", arXiv 1910.11856.

240 paragraphs and 1,190 questions of SQuAD 1.1, translated by professionals into eleven languages. The authors report
exact match and F1 by language, on models that were trained on English.
"""
