"""TriviaQA: trivia questions with pages of Wikipedia that contain an answer.

Source: Joshi et al., "TriviaQA: A Large Scale Distantly Supervised Challenge Dataset for Reading Comprehension", arXiv
1705.03551; `mandarjoshi/trivia_qa` on the hub. The authors report exact match and F1 with the answer or any of its
aliases. That a page contains an answer was found by matching, so a relevant page may not answer the question. The
configurations with web pages (rc, rc.web) are left out: they repeat the ids of questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedrag_cli.data.benchmarks.config import TriviaCorpusConfig, TriviaExamplesConfig
from fedrag_cli.data.benchmarks.loading import load_passages, map_rows, named_split
from fedrag_cli.data.benchmarks.values import MissingLabelError, kept_metadata, texts_value
from fedrag_cli.data.columns import checked_text, id_value, text_value
from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.row_problems import BadValueError

REPOSITORY = "mandarjoshi/trivia_qa"
LABELLED = ("train", "validation")
NO_ANSWER = "<unk>"


def load_examples(config: TriviaExamplesConfig) -> list[Example]:
    """Load the questions; the relevant ids are those of their Wikipedia pages.

    Args:
        config: The configuration and the split.

    Raises:
        ConfigError: A revision is given for a local copy.
        DataError: The split is missing or bad, or has no labels.
    """
    source = named_split(REPOSITORY, config, config.split)
    return [example for _, example in map_rows(source, config.limit, _example, LABELLED)]


def load_corpus(config: TriviaCorpusConfig) -> list[KnowledgeNode]:
    """Load the Wikipedia pages, each one once.

    Args:
        config: The configuration and the splits.

    Raises:
        ConfigError: A revision is given for a local copy, or the sizes of the split do not fit each other.
        DataError: A split is missing or bad.
    """
    return load_passages(config, lambda split: named_split(REPOSITORY, config, split), _pages)


def _example(values: Mapping[str, Any]) -> Example:
    value = text_value(values, "answer.value")
    if value == NO_ANSWER:
        raise MissingLabelError(f"answer.value is '{NO_ANSWER}'")
    aliases = [alias for alias in texts_value(values, "answer.aliases") if alias]
    return Example(
        id_value(values, "question_id"),
        text_value(values, "question"),
        tuple(dict.fromkeys([value, *aliases])),
        tuple(dict.fromkeys(_page_ids(values))),
        kept_metadata(values, "question_source"),
    )


def _pages(values: Mapping[str, Any]) -> list[KnowledgeNode]:
    ids = _page_ids(values)
    titles = texts_value(values, "entity_pages.title")
    texts = texts_value(values, "entity_pages.wiki_context")
    if not len(ids) == len(titles) == len(texts):
        raise BadValueError("the lists in entity_pages differ in length")
    return [
        KnowledgeNode(page, checked_text(text, f"wiki_context of '{page}'"), {"title": title})
        for page, title, text in zip(ids, titles, texts, strict=True)
    ]


def _page_ids(values: Mapping[str, Any]) -> list[str]:
    """Return the names of the pages' files without their ending; each page has one, whichever question it is for."""
    names = texts_value(values, "entity_pages.filename")
    return [checked_text(name.removesuffix(".txt"), "entity_pages.filename") for name in names]
