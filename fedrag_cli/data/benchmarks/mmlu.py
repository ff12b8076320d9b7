"""MMLU: multiple-choice questions of 57 subjects.

Source: Hendrycks et al., "Measuring Massive Multitask Language Understanding", arXiv 2009.03300; `cais/mmlu` on the
hub. The authors show the question with its four options, lettered, and take the letter that the model finds most
likely; they report the accuracy by subject and overall.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedrag_cli.data.benchmarks.config import MmluExamplesConfig
from fedrag_cli.data.benchmarks.loading import map_rows, named_split
from fedrag_cli.data.benchmarks.values import MissingLabelError, kept_metadata, texts_value
from fedrag_cli.data.columns import get_value, text_value
from fedrag_cli.data.examples import Example
from fedrag_cli.data.row_problems import BadValueError

LETTERS = ("A", "B", "C", "D")
LABELLED = ("test", "validation", "dev", "auxiliary_train")


def load_examples(config: MmluExamplesConfig) -> list[Example]:
    """Load the questions.

    Args:
        config: The subject and the split.

    Raises:
        ConfigError: A revision is given for a local copy.
        DataError: The split is missing or bad.
    """
    source = named_split("cais/mmlu", config, config.split)
    return [
        Example(f"{config.name}-{config.split}-{number:05d}", query, (letter,), (), metadata, LETTERS)
        for number, (query, letter, metadata) in map_rows(source, config.limit, _question, LABELLED)
    ]


def _question(values: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    question = text_value(values, "question")
    options = texts_value(values, "choices")
    if len(options) != len(LETTERS):
        raise BadValueError(f"choices has {len(options)} options, not {len(LETTERS)}")
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    return "\n".join([question, *lines]), _letter(get_value(values, "answer")), kept_metadata(values, "subject")


def _letter(answer: Any) -> str:
    if answer is None or answer == -1:
        raise MissingLabelError("answer is empty")
    if isinstance(answer, bool) or answer not in range(len(LETTERS)):
        raise BadValueError(f"answer is '{answer}', not a number from 0 to {len(LETTERS) - 1}")
    return LETTERS[int(answer)]
