"""Values of a benchmark's rows that more than one benchmark needs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from fedrag_cli.data.columns import get_value, is_missing
from fedrag_cli.data.readers import kind_of
from fedrag_cli.data.row_problems import BadValueError

DIGEST_LENGTH = 12


class MissingLabelError(ValueError):
    """A row has no label, as in the splits whose labels the authors keep to themselves."""


def passage_id(text: str, title: str = "") -> str:
    """Return the id of a passage by its content, so that examples and corpus agree on it whatever part is read.

    Args:
        text: The passage.
        title: What the id starts with, for people to read.
    """
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()[:DIGEST_LENGTH]
    return f"{title}-{digest}" if title else digest


def texts_value(values: Mapping[str, Any], column: str) -> list[str]:
    """Return a list of texts, stripped; some may be blank or the same.

    Args:
        values: The row.
        column: Name of the column; a dot reaches into nested values.

    Raises:
        BadValueError: It is missing or no list of texts.
    """
    texts = get_value(values, column)
    if not isinstance(texts, list | tuple):
        raise BadValueError(f"{column} is {kind_of(texts)}, not a list of texts")
    for count, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise BadValueError(f"{column} {count} of {len(texts)} is {kind_of(text)}, not a text")
    return [text.strip() for text in texts]


def label_value(values: Mapping[str, Any], column: str, labels: tuple[str, ...]) -> str:
    """Return a label.

    Args:
        values: The row.
        column: Name of the column.
        labels: The labels that there are.

    Raises:
        MissingLabelError: It is null or blank.
        BadValueError: The row has no such column, or the label is another one.
    """
    label = get_value(values, column)
    if is_missing(label) or label == "":
        raise MissingLabelError(f"{column} is empty")
    if str(label) not in labels:
        raise BadValueError(f"{column} is '{label}', not one of: {', '.join(labels)}")
    return str(label)


def kept_metadata(values: Mapping[str, Any], *columns: str) -> dict[str, Any]:
    """Return those of some columns that a row has, as metadata.

    Args:
        values: The row.
        columns: Names of columns with texts; blank ones are left out.
    """
    return {column: values[column] for column in columns if not is_missing(values.get(column)) and values[column] != ""}
