"""Reading of the published formats: BEIR's three tables and SQuAD's JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrag_cli.data.columns import (
    answers_value,
    checked_id,
    checked_text,
    get_value,
    id_value,
    is_missing,
    require_column,
    text_value,
)
from fedrag_cli.data.readers import Table, check_folder, kind_of, read_json, read_table
from fedrag_cli.data.row_problems import BadValueError, Problems
from fedrag_cli.errors import DataError

JUDGEMENT_COLUMNS = ("query-id", "corpus-id", "score")


def read_judgements(folder: Path, split: str) -> dict[str, tuple[str, ...]]:
    """Return the ids of the relevant documents by query id.

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

    Raises:
        DataError: The file is missing or has bad rows.
    """
    check_folder(folder)
    return queries_of_table(read_table(folder / "queries.jsonl"))


def queries_of_table(table: Table) -> dict[str, str]:
    """Return the queries of a BEIR data set by id.

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


UNANSWERABLE_HINT = (
    "Correct or remove what is listed. The unanswerable questions of SQuAD v2 (`is_impossible`) must be removed first: "
    "there is no answer to train on."
)


@dataclass(frozen=True)
class SquadParagraph:
    """One paragraph with its questions.

    Args:
        id: The article's title and the paragraph's position in it.
        title: The article's title.
        place: Where it is in the file.
        values: The paragraph's object.
    """

    id: str
    title: str
    place: str
    values: dict[str, Any]


@dataclass(frozen=True)
class SquadQuestion:
    """One question.

    Args:
        id: The question's own id; empty where it has none.
        question: The question.
        answers: The distinct accepted answers.
        paragraph: Where the answer is.
        place: Where it is in the file.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    paragraph: SquadParagraph
    place: str


def read_paragraphs(path: Path, problems: Problems) -> Iterator[SquadParagraph]:
    """Yield the paragraphs of a file.

    Args:
        path: The file.
        problems: Where bad articles and paragraphs are added.

    Raises:
        DataError: The file is missing, not JSON, or not in SQuAD format.
    """
    content = read_json(path)
    articles = content.get("data") if isinstance(content, dict) else None
    if not isinstance(articles, list) or not articles:
        raise DataError(
            f'{path} is not in SQuAD format: it is no object {{"data": [{{"title": ..., "paragraphs": [...]}}]}}.',
            "For a list of rows, use the type 'file'.",
        )
    taken: set[str] = set()
    for number, article in enumerate(articles):
        place = f"{path.name} data[{number}]"
        if not isinstance(article, dict):
            problems.add(place, f"is {kind_of(article)}, not an object")
            continue
        untitled = is_missing(article.get("title"))
        title = path.stem if untitled else problems.collect(place, text_value, article, "title")
        paragraphs = problems.collect(place, _objects, article, "paragraphs")
        if title is None or paragraphs is None:
            continue
        slug = _free_slug(title, taken)
        for position, values in enumerate(paragraphs):
            yield SquadParagraph(f"{slug}-{position}", title, f"{place}.paragraphs[{position}]", values)


def read_questions(path: Path, problems: Problems) -> Iterator[SquadQuestion]:
    """Yield the questions of a file.

    Args:
        path: The file.
        problems: Where bad articles, paragraphs and questions are added.

    Raises:
        DataError: The file is missing, not JSON, or not in SQuAD format.
    """
    for paragraph in read_paragraphs(path, problems):
        for position, values in enumerate(problems.collect(paragraph.place, _objects, paragraph.values, "qas") or []):
            place = f"{paragraph.place}.qas[{position}]"
            question = problems.collect(place, text_value, values, "question")
            answers = problems.collect(place, _answers, values)
            own_id = problems.collect(place, checked_id, values["id"], "id") if "id" in values else ""
            if question is not None and answers is not None and own_id is not None:
                yield SquadQuestion(own_id, question, answers, paragraph, place)


def _objects(values: dict[str, Any], key: str) -> list[dict[str, Any]]:
    items = values.get(key)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise BadValueError(f"{key} is no list of objects" if key in values else f"has no '{key}'")
    return items


def _answers(values: dict[str, Any]) -> tuple[str, ...]:
    if not _objects(values, "answers"):
        raise BadValueError("the question has no answers")
    return answers_value(values, "answers.text")


def _free_slug(title: str, taken: set[str]) -> str:
    base = "_".join(title.split())
    slug, count = base, 1
    while slug in taken:
        count += 1
        slug = f"{base}_{count}"
    taken.add(slug)
    return slug
