"""Reading of BEIR data: corpus.jsonl, queries.jsonl and qrels/<split>.tsv, or the same tables from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedrag_cli.data.columns import (
    checked_id,
    checked_text,
    get_value,
    id_value,
    is_missing,
    require_column,
    text_value,
)
from fedrag_cli.data.files import check_folder
from fedrag_cli.data.problems import BadValueError, Problems
from fedrag_cli.data.readers import Table, read_table
from fedrag_cli.errors import DataError

JUDGEMENT_COLUMNS = ("query-id", "corpus-id", "score")


def read_judgements(folder: Path, split: str) -> dict[str, tuple[str, ...]]:
    """Return the ids of the relevant documents by query id.

    Args:
        folder: The BEIR folder.
        split: Name of the file in qrels/, without .tsv.

    Returns:
        Documents whose score is above 0; queries without any are left out, as no metric can count them.

    Raises:
        DataError: The file is missing or has bad rows.
    """
    check_folder(folder)
    check_folder(folder / "qrels")
    return judgements_of_table(read_table(folder / "qrels" / f"{split}.tsv", "tsv"))


def judgements_of_table(table: Table) -> dict[str, tuple[str, ...]]:
    """Return the ids of the relevant documents by query id.

    Args:
        table: Rows of query-id, corpus-id and score.

    Returns:
        Documents whose score is above 0; queries without any are left out, as no metric can count them.

    Raises:
        DataError: A column is missing, or rows are bad.
    """
    problems = Problems(table.name)
    rows = table.readable_rows(problems)
    for column in JUDGEMENT_COLUMNS:
        if rows and column not in rows[0].values:
            raise DataError(
                f"{table.name} has no column '{column}'; its columns are: {', '.join(rows[0].values)}.",
                f"The first line of a judgements file names: {', '.join(JUDGEMENT_COLUMNS)}.",
            )
    relevant: dict[str, dict[str, None]] = {}
    for row in rows:
        judgement = problems.collect(table.place(row), _judgement, row.values)
        if judgement is not None and judgement[2] > 0:
            relevant.setdefault(judgement[0], {})[judgement[1]] = None
    problems.raise_if_any()
    return {query: tuple(documents) for query, documents in relevant.items()}


def read_queries(folder: Path) -> dict[str, str]:
    """Return the queries of a BEIR folder by id.

    Args:
        folder: The BEIR folder.

    Raises:
        DataError: The file is missing or has bad rows.
    """
    check_folder(folder)
    return queries_of_table(read_table(folder / "queries.jsonl"))


def queries_of_table(table: Table) -> dict[str, str]:
    """Return the queries of a BEIR data set by id.

    Args:
        table: Rows of _id and text.

    Raises:
        DataError: A column is missing, or rows are bad.
    """
    problems = Problems(table.name)
    rows = table.readable_rows(problems)
    require_column(table, rows, "_id", "_id")
    require_column(table, rows, "text", "text")
    queries: dict[str, str] = {}
    for row in rows:
        query = problems.collect(table.place(row), _query, row.values)
        if query is not None and query[0] in queries:
            problems.add(table.place(row), f"_id '{query[0]}' is used by a row before it")
        elif query is not None:
            queries[query[0]] = query[1]
    problems.raise_if_any()
    return queries


def document_text(values: Mapping[str, Any]) -> str:
    """Return title and text of a document in one.

    Args:
        values: The row of corpus.jsonl.

    Raises:
        BadValueError: One of them is no text, or both are blank.
    """
    parts: list[Any] = [part for part in (values.get("title"), get_value(values, "text")) if not is_missing(part)]
    if not all(isinstance(part, str) for part in parts):
        raise BadValueError("title or text is not a text")
    return checked_text(" ".join(part.strip() for part in parts if part.strip()), "title and text")


def _query(values: Mapping[str, Any]) -> tuple[str, str]:
    return id_value(values, "_id"), text_value(values, "text")


def _judgement(values: Mapping[str, Any]) -> tuple[str, str, float]:
    query, document = (checked_id(values[column], column) for column in JUDGEMENT_COLUMNS[:2])
    try:
        score = float(values["score"])
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise BadValueError(f"score is no number: '{values['score']}'")
    return query, document, score
