"""SQuAD 2.0: questions about paragraphs of Wikipedia, a third to a half of which their paragraph does not answer.

Source: Rajpurkar et al., "Know What You Don't Know: Unanswerable Questions for SQuAD", arXiv 1806.03822;
`rajpurkar/squad_v2` on the hub. The authors report exact match and F1 over all accepted answers; for an unanswerable
question, the empty answer is the accepted one. Such a question has no relevant paragraph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedrag_cli.data.benchmarks.config import Squad2CorpusConfig, Squad2ExamplesConfig
from fedrag_cli.data.benchmarks.loading import HubSplit, load_passages, map_rows
from fedrag_cli.data.benchmarks.values import kept_metadata, passage_id, texts_value
from fedrag_cli.data.columns import answers_value, id_value, text_value
from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import DataError


def load_examples(config: Squad2ExamplesConfig) -> list[Example]:
    """Load the questions; the relevant id of an answerable one is that of its paragraph.

    Args:
        config: The split, and whether unanswerable questions are left out.

    Raises:
        ConfigError: A revision is given for a local copy.
        DataError: The split is missing or bad, or no answerable question is among its rows.
    """
    rows = map_rows(_source(config.split, config.path, config.revision), config.limit, _example)
    examples = [example for _, example in rows if not config.answerable_only or example.metadata["answerable"]]
    if not examples:
        raise DataError(
            f"None of the questions that were read of the split '{config.split}' is answerable.", "Raise `limit`."
        )
    return examples


def load_corpus(config: Squad2CorpusConfig) -> list[KnowledgeNode]:
    """Load the paragraphs, each one once.

    Args:
        config: The splits.

    Raises:
        ConfigError: A revision is given for a local copy, or the sizes of the split do not fit each other.
        DataError: A split is missing or bad.
    """
    return load_passages(config, lambda split: _source(split, config.path, config.revision), paragraphs)


def answerable_example(values: Mapping[str, Any]) -> Example:
    """Make an example of a row in SQuAD's schema whose question has an answer.

    Args:
        values: The row.

    Raises:
        BadValueError: It lacks something, or has no answer.
    """
    return Example(
        id_value(values, "id"),
        text_value(values, "question"),
        answers_value(values, "answers.text"),
        (paragraphs(values)[0].id,),
        kept_metadata(values, "title"),
    )


def paragraphs(values: Mapping[str, Any]) -> list[KnowledgeNode]:
    """Make the one passage of a row in SQuAD's schema; XQuAD's rows have no title.

    Args:
        values: The row.

    Raises:
        BadValueError: It has no paragraph.
    """
    text = text_value(values, "context")
    metadata = kept_metadata(values, "title")
    return [KnowledgeNode(passage_id(text, str(metadata.get("title", ""))), text, metadata)]


def _source(split: str, path: str | None, revision: str | None) -> HubSplit:
    return HubSplit("rajpurkar/squad_v2", "squad_v2", split, path, revision, ("squad_v2", ".", "data"))


def _example(values: Mapping[str, Any]) -> Example:
    metadata = kept_metadata(values, "title")
    if texts_value(values, "answers.text"):
        example = answerable_example(values)
        return Example(
            example.id, example.query, example.responses, example.relevant_ids, {**metadata, "answerable": True}
        )
    return Example(id_value(values, "id"), text_value(values, "question"), ("",), (), {**metadata, "answerable": False})
