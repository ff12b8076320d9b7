"""What a benchmark is: rows of its data set, from the hub or a local copy of it, and what is made of them."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedrag_cli.data.columns import get_value, is_missing
from fedrag_cli.data.corpora import split_nodes
from fedrag_cli.data.examples import Example
from fedrag_cli.data.hub_datasets import load_from_hub
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.readers import READERS, Row, Table, check_file, check_folder, kind_of, reaching
from fedrag_cli.data.row_problems import BadValueError, Problems
from fedrag_cli.errors import ConfigError, DataError

T = TypeVar("T")

CONVERTED_REVISION = "refs/convert/parquet"
SHARD = re.compile(r"-\d{5}-of-(\d{5})")
FORMAT_OF_ENDING = {".parquet": "parquet", ".jsonl.gz": "jsonl", ".jsonl": "jsonl", ".tsv": "tsv"}


@dataclass(frozen=True)
class HubSplit:
    """One split of a benchmark.

    Args:
        repository: Hub id of its repository.
        name: Its configuration; None where the repository has only one without a name.
        split: The split.
        path: A local copy of the repository's files; with None, they are loaded from the hub.
        revision: Branch, tag or commit of the repository.
        folders: Where the split's files may be in a local copy.
        converted: The repository holds a loading script, so that the Parquet files which the hub made of it are read.
    """

    repository: str
    name: str | None
    split: str
    path: str | None = None
    revision: str | None = None
    folders: tuple[str, ...] = (".", "data", "default")
    converted: bool = False

    @property
    def label(self) -> str:
        """How messages name it."""
        return " ".join(part for part in (self.repository, self.name, self.split) if part)

    def download_command(self) -> str:
        """Return the command that makes a local copy."""
        revision = f" --revision {CONVERTED_REVISION}" if self.converted else ""
        return f"hf download --repo-type dataset {self.repository}{revision} --local-dir FOLDER"


def rows_of(source: HubSplit, limit: int | None = None) -> Iterator[Row]:
    """Yield the rows of a split, counted from 1.

    Raises:
        ConfigError: A revision is given for a local copy.
        DataError: The split cannot be read, or has no rows.
    """
    if source.path is not None and source.revision is not None:
        raise ConfigError(
            "`revision` is for the hub, but `path` names a local copy.", "Remove one of `path` and `revision`."
        )
    rows = _rows_from_hub(source) if source.path is None else _rows_of_copy(source, Path(source.path))
    number = 0
    for number, row in enumerate(itertools.islice(rows, limit), start=1):
        yield Row(number, row.values, row.problem)
    if number == 0:
        raise DataError(f"{source.label} has no rows.", "Check how the files were copied, or name another split.")


def table_of(source: HubSplit, limit: int | None = None) -> Table:
    """Return the rows of a split as a table.

    Raises:
        ConfigError: A revision is given for a local copy.
        DataError: The split cannot be read, or has no rows.
    """
    return Table(source.label, source.split, False, list(rows_of(source, limit)))


def map_rows(
    source: HubSplit, limit: int | None, function: Callable[[Mapping[str, Any]], T], labelled: tuple[str, ...] = ()
) -> Iterator[tuple[int, T]]:
    """Yield what a function makes of each row, with the row's number.

    Args:
        source: The split.
        limit: Read the first so many rows only.
        function: What to call with each row's values.
        labelled: The splits that have labels, for the error where this one has none.

    Raises:
        ConfigError: A revision is given for a local copy.
        DataError: The split cannot be read, or rows are bad; the rows are told at the end.
    """
    problems = Problems(source.label)
    for row in rows_of(source, limit):
        place = f"row {row.number}"
        if row.problem:
            problems.add(place, row.problem)
            continue
        try:
            made = problems.collect(place, function, row.values)
        except MissingLabelError as error:
            hint = f"The splits with labels are: {', '.join(labelled)}." if labelled else "Name a split with labels."
            raise DataError(f"{source.label} {place}: {error}.", hint) from error
        if made is not None:
            yield row.number, made
    problems.raise_if_any()


@dataclass(frozen=True)
class Benchmark:
    """How the rows of one data set on the hub become examples and passages.

    Args:
        repository: Hub id of its repository.
        example: Makes the example of a row; one without an id is named after its split and its number.
        passages: Makes the passages of a row, where the benchmark has some; each is taken once.
        labelled: The splits that have labels, for the error where one has none.
        name: The configuration that is read; that of the config where it has one.
        folders: Where files may be in a local copy; the folder of the configuration where the config names one.
    """

    repository: str
    example: Callable[[Mapping[str, Any]], Example]
    passages: Callable[[Mapping[str, Any]], list[KnowledgeNode]] | None = None
    labelled: tuple[str, ...] = ()
    name: str | None = None
    folders: tuple[str, ...] = (".", "data", "default")

    def split(self, config: Any, split: str) -> HubSplit:
        """Return where a split is read from."""
        named = getattr(config, "name", None)
        folders = (named,) if named else self.folders
        name = named or self.name
        return HubSplit(self.repository, name, split, config.path, config.revision, folders)

    def load_examples(self, config: Any) -> list[Example]:
        """Load the examples of the split that a config names.

        Raises:
            ConfigError: A revision is given for a local copy.
            DataError: The split is missing or bad, or has no labels.
        """
        prefix = "-".join(part for part in (getattr(config, "name", None), config.split) if part)
        rows = map_rows(self.split(config, config.split), config.limit, self.example, self.labelled)
        return [row if row.id else dataclasses.replace(row, id=f"{prefix}-{number:05d}") for number, row in rows]

    def load_corpus(self, config: Any) -> list[KnowledgeNode]:
        """Load the passages of the splits that a config names, each one once, and split as it wants.

        Raises:
            ConfigError: A revision is given for a local copy, or the sizes of the split do not fit each other.
            DataError: A split is missing or bad, or different passages have the same id.
        """
        assert self.passages is not None
        nodes: dict[str, KnowledgeNode] = {}
        for source in [self.split(config, split) for split in config.data_splits]:
            problems = Problems(source.label)
            for number, found in map_rows(source, config.limit, self.passages):
                for node in found:
                    if nodes.setdefault(node.id, node).text != node.text:
                        message = f"the passage '{node.id}' has another text than in a row before it"
                        problems.add(f"row {number}", message)
            problems.raise_if_any()
        return split_nodes(list(nodes.values()), config.split)


class MissingLabelError(ValueError):
    """A row has no label, as in the splits whose labels the authors keep to themselves."""


def passage_id(text: str, title: str = "") -> str:
    """Return the id of a passage by its content, so that examples and corpus agree on it whatever part is read."""
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]
    return f"{title}-{digest}" if title else digest


def texts_value(values: Mapping[str, Any], column: str) -> list[str]:
    """Return a list of texts, stripped; some may be blank or the same."""
    texts = get_value(values, column)
    if not isinstance(texts, list | tuple):
        raise BadValueError(f"{column} is {kind_of(texts)}, not a list of texts")
    for count, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise BadValueError(f"{column} {count} of {len(texts)} is {kind_of(text)}, not a text")
    return [text.strip() for text in texts]


def label_value(values: Mapping[str, Any], column: str, labels: tuple[str, ...]) -> str:
    """Return a label."""
    label = get_value(values, column)
    if is_missing(label) or label == "":
        raise MissingLabelError(f"{column} is empty")
    if str(label) not in labels:
        raise BadValueError(f"{column} is '{label}', not one of: {', '.join(labels)}")
    return str(label)


def kept_metadata(values: Mapping[str, Any], *columns: str) -> dict[str, Any]:
    """Return those of some columns that a row has, as metadata."""
    return {column: values[column] for column in columns if not is_missing(values.get(column)) and values[column] != ""}


def _rows_from_hub(source: HubSplit) -> Iterator[Row]:
    name, revision, data_files = source.name, source.revision, None
    if source.converted or revision == CONVERTED_REVISION:
        # The converted files come without the description that tells configurations and splits apart.
        data_files = {source.split: f"{name or 'default'}/{source.split}/*.parquet"}
        name, revision = None, revision or CONVERTED_REVISION
    loaded = load_from_hub(
        source.repository,
        name,
        source.split,
        revision,
        data_files=data_files,
        way_without_network=f"run `{source.download_command()}` where there is one and set `path: FOLDER`",
    )
    for number, values in enumerate(loaded.with_format(None), start=1):
        yield Row(number, values)


def _rows_of_copy(source: HubSplit, copy: Path) -> Iterator[Row]:
    check_folder(copy)
    with reaching(copy):
        files = _files_of_split(source, copy)
    for file in files:
        check_file(file)
        with closing(READERS[_format_of(file)](file)) as rows:
            yield from rows


def _files_of_split(source: HubSplit, copy: Path) -> list[Path]:
    split = glob.escape(source.split)
    for folder in (copy / name for name in source.folders):
        for pattern in (f"{split}-*.parquet", f"{split}/*.parquet", *(split + ending for ending in FORMAT_OF_ENDING)):
            files = sorted(folder.glob(pattern))
            if files:
                _check_shards(files)
                return files
    raise DataError(f"{copy} has no files of {source.label}.", _what_is_there(source, copy))


def _what_is_there(source: HubSplit, copy: Path) -> str:
    splits = sorted({name for folder in source.folders for name in _splits_in(copy / folder)})
    if splits:
        return f"Its splits are: {', '.join(splits)}."
    names = sorted(folder.name for folder in copy.iterdir() if folder.is_dir() and any(_splits_in(folder)))
    if names:
        return f"Its folders with data are: {', '.join(names)}."
    return f"The command `{source.download_command()}` makes a copy of the repository."


def _check_shards(files: list[Path]) -> None:
    """Refuse a part of the files, as a copy that was broken off leaves them: it would look like a smaller split."""
    numbered = SHARD.search(files[0].name)
    if numbered is not None and len(files) != int(numbered.group(1)):
        raise DataError(
            f"{files[0].parent} has {len(files)} of the {int(numbered.group(1))} files of {files[0].name}.",
            "Copy or download the repository again.",
        )


def _splits_in(folder: Path) -> Iterator[str]:
    for file in folder.glob("*"):
        if file.is_dir() and any(file.glob("*.parquet")):
            yield file.name
        elif any(file.name.endswith(ending) for ending in FORMAT_OF_ENDING):
            yield SHARD.split(file.name)[0].partition(".")[0]


def _format_of(file: Path) -> str:
    return next(format for ending, format in FORMAT_OF_ENDING.items() if file.name.endswith(ending))
