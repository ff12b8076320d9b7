"""Reading of JSON files in SQuAD format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrag_cli.data.columns import answers_value, checked_id, is_missing, text_value
from fedrag_cli.data.problems import BadValueError, Problems
from fedrag_cli.data.readers import kind_of, read_json
from fedrag_cli.errors import DataError

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
