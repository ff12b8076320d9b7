"""NQ-Open: questions to a search engine whose answers are short.

Source: Lee et al., "Latent Retrieval for Weakly Supervised Open Domain Question Answering", arXiv 1906.00300, made of
Natural Questions; `google-research-datasets/nq_open` on the hub. The authors report the exact match with any of the
accepted answers after SQuAD's normalisation, over all of Wikipedia, which the data set does not contain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedrag_cli.data.benchmarks.config import NqOpenExamplesConfig
from fedrag_cli.data.benchmarks.loading import HubSplit, map_rows
from fedrag_cli.data.columns import answers_value, text_value
from fedrag_cli.data.examples import Example


def load_examples(config: NqOpenExamplesConfig) -> list[Example]:
    """Load the questions.

    Args:
        config: The split.

    Raises:
        ConfigError: A revision is given for a local copy.
        DataError: The split is missing or bad.
    """
    source = HubSplit(
        "google-research-datasets/nq_open",
        "nq_open",
        config.split,
        config.path,
        config.revision,
        ("nq_open", ".", "data"),
    )
    return [
        Example(f"{config.split}-{number:05d}", question, answers)
        for number, (question, answers) in map_rows(source, config.limit, _question)
    ]


def _question(values: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    return text_value(values, "question"), answers_value(values, "answer")
