"""Rows of a benchmark, from the hub or from a local copy of its repository, and what is made of them."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedrag_cli.data.benchmarks.values import MissingLabelError
from fedrag_cli.data.corpora import split_nodes
from fedrag_cli.data.hub_datasets import load_from_hub
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.readers import READERS, Row, Table, check_file, check_folder, reaching
from fedrag_cli.data.row_problems import Problems
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

    Args:
        source: The split.
        limit: Read the first so many rows only.

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

    Args:
        source: The split.
        limit: Read the first so many rows only.

    Raises:
        ConfigError: A revision is given for a local copy.
        DataError: The split cannot be read, or has no rows.
    """
    return Table(source.label, source.split, False, list(rows_of(source, limit)))


def map_rows(
    source: HubSplit, limit: int | None, function: Callable[[Mapping[str, Any]], T | None], labelled: Sequence[str] = ()
) -> Iterator[tuple[int, T]]:
    """Yield what a function makes of each row, with the row's number.

    Args:
        source: The split.
        limit: Read the first so many rows only.
        function: What to call with each row's values; a row of which it makes None is left out.
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


def collect_nodes(
    sources: Iterable[HubSplit], limit: int | None, function: Callable[[Mapping[str, Any]], list[KnowledgeNode]]
) -> list[KnowledgeNode]:
    """Return the passages of all rows, each one once.

    Args:
        sources: The splits.
        limit: Read the first so many rows of each split only.
        function: Makes the passages of one row.

    Raises:
        ConfigError: A revision is given for a local copy.
        DataError: A split cannot be read, rows are bad, or different passages have the same id.
    """
    nodes: dict[str, KnowledgeNode] = {}
    for source in sources:
        problems = Problems(source.label)
        for number, found in map_rows(source, limit, function):
            for node in found:
                if nodes.setdefault(node.id, node).text != node.text:
                    problems.add(f"row {number}", f"the passage '{node.id}' has another text than in a row before it")
        problems.raise_if_any()
    return list(nodes.values())


def load_passages(
    config: Any, source: Callable[[str], HubSplit], function: Callable[[Mapping[str, Any]], list[KnowledgeNode]]
) -> list[KnowledgeNode]:
    """Return the passages of a benchmark's splits, each one once, and split as the config wants.

    Args:
        config: The config of the corpus; its `data_splits`, `limit` and `split` count.
        source: Gives where a split is read from.
        function: Makes the passages of one row.

    Raises:
        ConfigError: A revision is given for a local copy, or the sizes of the split do not fit each other.
        DataError: A split is missing or bad.
    """
    sources = [source(split) for split in config.data_splits]
    return split_nodes(collect_nodes(sources, config.limit, function), config.split)


def named_split(repository: str, config: Any, split: str) -> HubSplit:
    """Return a split of the configuration that a config names, whose files are in a folder of that name."""
    return HubSplit(repository, config.name, split, config.path, config.revision, (config.name,))


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
