"""BoolQ: yes-or-no questions to a search engine, each with a Wikipedia passage that answers it.

Source: Clark et al., "BoolQ: Exploring the Surprising Difficulty of Natural Yes/No Questions", arXiv 1905.10044;
`google/boolq` on the hub. The authors give question and passage, and report the accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedrag_cli.data.benchmarks.config import BoolqCorpusConfig, BoolqExamplesConfig
from fedrag_cli.data.benchmarks.loading import HubSplit, load_passages, map_rows
from fedrag_cli.data.benchmarks.values import MissingLabelError, passage_id
from fedrag_cli.data.columns import get_value, text_value
from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.readers import kind_of
from fedrag_cli.data.row_problems import BadValueError

REPOSITORY = "google/boolq"
CHOICES = ("yes", "no")
LABELLED = ("train", "validation")


def load_examples(config: BoolqExamplesConfig) -> list[Example]:
    """Load the questions; the relevant id is that of the passage.

    Args:
        config: The split.

    Raises:
        ConfigError: A revision is given for a local copy.
        DataError: The split is missing or bad, or has no labels.
    """
    source = HubSplit(REPOSITORY, None, config.split, config.path, config.revision)
    return [
        Example(f"{config.split}-{number:05d}", question, (answer,), (relevant_id,), {}, CHOICES)
        for number, (question, answer, relevant_id) in map_rows(source, config.limit, _question, LABELLED)
    ]


def load_corpus(config: BoolqCorpusConfig) -> list[KnowledgeNode]:
    """Load the passages, each one once.

    Args:
        config: The splits.

    Raises:
        ConfigError: A revision is given for a local copy, or the sizes of the split do not fit each other.
        DataError: A split is missing or bad.
    """
    return load_passages(
        config, lambda split: HubSplit(REPOSITORY, None, split, config.path, config.revision), _passages
    )


def _question(values: Mapping[str, Any]) -> tuple[str, str, str]:
    answer = get_value(values, "answer")
    if answer is None:
        raise MissingLabelError("answer is empty")
    if not isinstance(answer, bool):
        raise BadValueError(f"answer is {kind_of(answer)}, not a boolean")
    return text_value(values, "question"), CHOICES[0] if answer else CHOICES[1], _passages(values)[0].id


def _passages(values: Mapping[str, Any]) -> list[KnowledgeNode]:
    passage = text_value(values, "passage")
    return [KnowledgeNode(passage_id(passage), passage)]
