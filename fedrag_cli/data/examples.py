"""Examples: questions with their accepted answers, and with the passages that answer them where these are known."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrag_cli import registry
from fedrag_cli.data.columns import (
    answers_value,
    checked_id,
    get_value,
    has_value,
    ids_value,
    lists_of_cells,
    metadata_of,
    optional_answers_value,
    require_column,
    text_value,
)
from fedrag_cli.data.config import (
    BeirExamplesConfig,
    ExampleColumns,
    FileExamplesConfig,
    HuggingFaceExamplesConfig,
    SquadExamplesConfig,
)
from fedrag_cli.data.formats import UNANSWERABLE_HINT, read_judgements, read_queries, read_questions
from fedrag_cli.data.hub_datasets import read_dataset, table_of_dataset
from fedrag_cli.data.readers import Row, Table, read_table, table_of_mappings
from fedrag_cli.data.row_problems import BadValueError, Problems, RowLocation
from fedrag_cli.errors import ConfigError, DataError
from fedrag_cli.text import printable

if TYPE_CHECKING:
    from datasets import Dataset

ID_COLUMN = "id"


@dataclass(frozen=True)
class Example:
    """One question.

    Args:
        id: Unique among the examples of its source.
        query: The question.
        responses: The accepted answers, the first one first; none where only passages are judged.
        relevant_ids: Ids of the passages (or documents) that answer the question, where they are known.
        metadata: Further fields of its row.
        choices: For multiple choice: all answers that the generator chooses from, the accepted ones among them.
        place: The row that it is from, where it is from rows.
    """

    id: str
    query: str
    responses: tuple[str, ...]
    relevant_ids: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    place: RowLocation | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """How messages name it: by its row and its id, or by its id alone."""
        return f"{self.place}: the example '{self.id}'" if self.place is not None else f"The example '{self.id}'"

    @property
    def response(self) -> str:
        """The first accepted answer.

        Raises:
            DataError: The example has no answer.
        """
        if not self.responses:
            raise DataError(
                f"{self.name} has no answer.",
                "Use it for retrieval metrics; training needs examples with answers.",
            )
        return self.responses[0]


def load_examples(config: Any, *, needs_responses: bool = True) -> list[Example]:
    """Load the examples that a config names.

    Args:
        config: The config of a registered source of examples.
        needs_responses: Whether each row must have an answer, where the source is rows with columns.

    Returns:
        The examples, at least one, with unique ids.

    Raises:
        DataError: The data is missing or bad.
    """
    options = {} if needs_responses or not getattr(config, "may_lack_responses", False) else {"needs_responses": False}
    examples: list[Example] = registry.build("examples", config, **options)
    if not examples:
        raise DataError(f"The examples of type '{config.type}' are empty.", "Name a source with at least one example.")
    return _with_unique_ids(examples, f"the examples of type '{config.type}'")


def examples_from_dataset(
    dataset: Dataset | Iterable[Any], columns: ExampleColumns | None = None, *, needs_responses: bool = True
) -> list[Example]:
    """Make examples of a data set.

    Args:
        dataset: A `datasets.Dataset`, a list of examples (returned as it is), or mappings from column to value.
        columns: Which column holds what; `query`, `response` and `relevant_ids` by default.
        needs_responses: Whether each row must have an answer.

    Returns:
        The examples, at least one.

    Raises:
        DataError: A column is missing, or rows are bad; rows are counted from 1.
    """
    if isinstance(dataset, Mapping):
        raise DataError(
            f"A mapping is no data set: its items are columns or splits, not rows ({', '.join(map(str, dataset))}).",
            "Pass one of its splits, or `datasets.Dataset.from_dict(...)` of its columns.",
        )
    if isinstance(dataset, str) or not isinstance(dataset, Iterable):
        raise DataError(
            f"An object of type {type(dataset).__name__} is no data set.",
            "Pass a `datasets.Dataset` or a list of mappings.",
        )
    columns = columns or ExampleColumns()
    if hasattr(dataset, "with_format") and hasattr(dataset, "select"):
        return _examples_of_table(table_of_dataset(dataset, "dataset"), columns, needs_responses=needs_responses)
    rows = list(dataset)
    if not rows:
        raise DataError("The data set has no rows.", "Pass at least one example.")
    if all(isinstance(row, Example) for row in rows):
        return _with_unique_ids(rows, "the data set")
    return _examples_of_table(table_of_mappings("dataset", rows), columns, needs_responses=needs_responses)


def load_file_examples(config: FileExamplesConfig, *, needs_responses: bool = True) -> list[Example]:
    """Load examples from a JSONL, JSON, CSV, TSV or Parquet file."""
    table = read_table(Path(config.path), config.format, config.limit)
    if config.list_separator is not None and not table.only_texts:
        raise ConfigError(
            f"`list_separator` is for CSV and TSV, but {table.name} is neither.",
            "Remove it, and write several answers as a list.",
        )
    return _examples_of_table(table, config.columns, config.list_separator, needs_responses=needs_responses)


def load_huggingface_examples(config: HuggingFaceExamplesConfig, *, needs_responses: bool = True) -> list[Example]:
    """Load examples from a data set of the `datasets` library."""
    table = read_dataset(config.path, config.name, config.split, config.revision, config.limit)
    return _examples_of_table(table, config.columns, needs_responses=needs_responses)


def load_squad_examples(config: SquadExamplesConfig) -> list[Example]:
    """Load the questions of a JSON file in SQuAD format; the relevant id is that of the paragraph."""
    path = Path(config.path)
    problems = Problems(path.name)
    examples: dict[str, Example] = {}
    for count, question in enumerate(read_questions(path, problems), start=1):
        example_id = question.id or f"{path.stem}-{count:04d}"
        if example_id in examples:
            problems.add(question.place, f"id '{example_id}' is used by a question before it")
            continue
        paragraph = question.paragraph
        metadata = {"title": paragraph.title}
        examples[example_id] = Example(example_id, question.question, question.answers, (paragraph.id,), metadata)
        if len(examples) == config.limit:
            break
    problems.raise_if_any(UNANSWERABLE_HINT)
    if not examples:
        raise DataError(f"{path} has no questions.", "Check that its paragraphs have 'qas'.")
    return list(examples.values())


def load_beir_examples(config: BeirExamplesConfig) -> list[Example]:
    """Load the judged queries of a BEIR folder; they have relevant ids and no answers."""
    folder = Path(config.path)
    relevant = read_judgements(folder, config.split)
    return judged_examples(read_queries(folder), relevant, f"{config.split}.tsv", "queries.jsonl")[: config.limit]


def judged_examples(
    queries: Mapping[str, str], relevant: Mapping[str, tuple[str, ...]], judgements: str, source: str
) -> list[Example]:
    """Make examples of the judged queries of a BEIR data set.

    Raises:
        DataError: A judged query is missing, or nothing is relevant.
    """
    problems = Problems(judgements)
    for query_id in relevant:
        if query_id not in queries:
            problems.add(f"query-id '{query_id}'", f"is not in {source}")
    problems.raise_if_any()
    examples = [Example(key, query, (), relevant[key]) for key, query in queries.items() if key in relevant]
    if not examples:
        raise DataError(f"{judgements} judges no document as relevant.", "Check its scores.")
    return examples


def _examples_of_table(
    table: Table, columns: ExampleColumns, separator: str | None = None, *, needs_responses: bool
) -> list[Example]:
    problems = Problems(table.name)
    rows = table.readable_rows(problems)
    require_column(table, rows, columns.query, "columns.query")
    if needs_responses:
        require_column(table, rows, columns.response, "columns.response")
    for name in ("response", "relevant_ids", "choices"):
        column = getattr(columns, name)
        if column not in ("", getattr(ExampleColumns(), name)):
            require_column(table, rows, column, f"columns.{name}")
    own_ids = _own_ids(rows)
    if not own_ids and any(has_value(row.values, ID_COLUMN) for row in rows):
        logging.getLogger(__name__).warning(
            "%s: not every row has an id of its own, so the rows are numbered instead", printable(table.name)
        )
    answers = answers_value if needs_responses else optional_answers_value
    used = [columns.query, columns.response, columns.relevant_ids, columns.choices, *([ID_COLUMN] if own_ids else [])]
    lists = (columns.response, columns.relevant_ids, columns.choices)
    examples = []
    for position, row in enumerate(rows):
        place = table.place(row)
        values: Mapping[str, Any] | None = row.values
        if table.only_texts and separator is None:
            values = problems.collect(place, lists_of_cells, row.values, lists)
        if values is None:
            continue
        query = problems.collect(place, text_value, values, columns.query)
        responses = problems.collect(place, answers, values, columns.response, separator)
        relevant_ids = problems.collect(place, ids_value, values, columns.relevant_ids, separator)
        metadata = problems.collect(place, metadata_of, values, used)
        if query is None or responses is None or relevant_ids is None or metadata is None:
            continue
        choices = problems.collect(place, _choices, values, columns.choices, separator, responses)
        if choices is not None:
            example_id = own_ids[position] if own_ids else table.numbered_id(row)
            examples.append(Example(example_id, query, responses, relevant_ids, metadata, choices, place))
    problems.raise_if_any()
    return examples


def _choices(
    values: Mapping[str, Any], column: str, separator: str | None, responses: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the choices of a row, which hold its accepted answers; none where it has no such column."""
    if not column or not has_value(values, column) or get_value(values, column) is None:
        return ()
    choices = answers_value(values, column, separator)
    if len(choices) < 2:
        raise BadValueError(f"{column} has fewer than two answers to choose from")
    foreign = [response for response in responses if response not in choices]
    if foreign:
        raise BadValueError(f"the accepted answer '{foreign[0]}' is not among its {column}")
    return choices


def _own_ids(rows: Sequence[Row]) -> list[str]:
    """Return the rows' own ids, or none where one is missing or used twice: the rows are numbered then."""
    try:
        ids = [checked_id(row.values.get(ID_COLUMN), ID_COLUMN) for row in rows]
    except BadValueError:
        return []
    return ids if len(set(ids)) == len(ids) else []


def _with_unique_ids(examples: list[Example], source: str) -> list[Example]:
    problems = Problems(source)
    for example_id, count in Counter(example.id for example in examples).items():
        if count > 1:
            problems.add(f"id '{example_id}'", f"is used by {count} examples")
    problems.raise_if_any("Give each example an id of its own.")
    return examples
