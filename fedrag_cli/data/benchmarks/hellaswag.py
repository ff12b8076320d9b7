"""HellaSwag: contexts with four endings, one of which people find plausible.

Source: Zellers et al., "HellaSwag: Can a Machine Really Finish Your Sentence?", arXiv 1905.07830; `Rowan/hellaswag` on
the hub. The authors report the accuracy, overall and for activities that are in the training data (`split_type`
indomain) or are not (zeroshot). Language models are compared by the likelihood of each ending after the context, so
the query does not list the endings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedrag_cli.data.benchmarks.config import HellaswagExamplesConfig
from fedrag_cli.data.benchmarks.loading import HubSplit, map_rows
from fedrag_cli.data.benchmarks.values import kept_metadata, label_value, texts_value
from fedrag_cli.data.columns import answers_value, text_value
from fedrag_cli.data.examples import Example
from fedrag_cli.data.row_problems import BadValueError

LABELS = ("0", "1", "2", "3")
LABELLED = ("train", "validation")


def load_examples(config: HellaswagExamplesConfig) -> list[Example]:
    """Load the contexts with their endings.

    Args:
        config: The split.

    Raises:
        ConfigError: A revision is given for a local copy.
        DataError: The split is missing or bad, or has no labels.
    """
    source = HubSplit("Rowan/hellaswag", None, config.split, config.path, config.revision)
    return [
        Example(f"{config.split}-{number:05d}", query, (ending,), (), metadata, endings)
        for number, (query, ending, endings, metadata) in map_rows(source, config.limit, _context, LABELLED)
    ]


def _context(values: Mapping[str, Any]) -> tuple[str, str, tuple[str, ...], dict[str, Any]]:
    label = label_value(values, "label", LABELS)
    query = f"{text_value(values, 'activity_label')}: {text_value(values, 'ctx')}"
    endings = texts_value(values, "endings")
    if len(endings) != len(LABELS):
        raise BadValueError(f"endings has {len(endings)} texts, not {len(LABELS)}")
    metadata = kept_metadata(values, "activity_label", "split_type", "source_id")
    return query, endings[int(label)], answers_value(values, "endings"), metadata
