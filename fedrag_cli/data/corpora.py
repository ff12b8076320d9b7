"""Corpora: the passages that a knowledge store is filled with."""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from fedrag_cli import registry
from fedrag_cli.data.columns import HALF_SURROGATE, has_value, id_value, metadata_of, require_column, text_value
from fedrag_cli.data.config import (
    BeirCorpusConfig,
    FileCorpusConfig,
    HuggingFaceCorpusConfig,
    PassageColumns,
    SplitConfig,
    SquadCorpusConfig,
    TextCorpusConfig,
)
from fedrag_cli.data.formats import document_text, read_paragraphs
from fedrag_cli.data.hub_datasets import read_dataset
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.readers import (
    Row,
    Table,
    check_file,
    check_folder,
    reaching,
    read_table,
    read_text_file,
    unreadable,
)
from fedrag_cli.data.row_problems import Problems, RowLocation
from fedrag_cli.data.splitting import check_sizes, split_markdown, split_text
from fedrag_cli.errors import ConfigError, DataError
from fedrag_cli.text import printable

MOST_NAMED = 5


def find_text_files(path: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """Return the files of a folder and its subfolders by their path in the folder.

    Args:
        path: The folder; or one file, which needs to fit no pattern.
        patterns: Which files to take, in upper or lower case. Hidden files and folders are left out; linked ones are
            taken, each folder once. What is left out is logged.

    Returns:
        The files, sorted by name; names have `/` on every system.

    Raises:
        ConfigError: A pattern is none.
        DataError: The folder is missing or cannot be read, or no file in it fits.
    """
    with reaching(path):
        if path.is_file():
            check_file(path)
            return {path.name: path}
    check_folder(path)
    wanted = [_parts_of_pattern(pattern) for pattern in patterns]
    found: dict[str, Path] = {}
    left_out: dict[str, list[str]] = {}
    for file in _files_below(path, left_out):
        name = file.relative_to(path).as_posix()
        if not any(_fits(name.lower().split("/"), parts) for parts in wanted):
            left_out.setdefault("that fit no pattern", []).append(name)
        elif file.name.startswith("."):
            left_out.setdefault("hidden", []).append(name)
        elif not file.is_file():
            left_out.setdefault("that are no files or lead nowhere", []).append(name)
        else:
            found[name] = file
    if left_out:
        reasons = (f"{len(names)} {reason} ({_listed(names)})" for reason, names in sorted(left_out.items()))
        logging.getLogger(__name__).warning("Left out of %s: %s", printable(str(path)), "; ".join(reasons))
    if not found:
        raise DataError(
            f"The folder {path} has no files that fit {', '.join(patterns) or 'no patterns at all'}.",
            "Check the folder, or set `patterns` to the names of its files.",
        )
    return dict(sorted(found.items()))


def _files_below(folder: Path, left_out: dict[str, list[str]]) -> Iterator[Path]:
    """Yield the files below a folder and below the folders that links lead to, each folder once."""
    starts = [folder]
    # A link to a folder above would lead around in a circle.
    seen = {str(parent) for parent in folder.resolve().parents}

    def fail(error: OSError) -> None:
        raise unreadable(Path(error.filename), error) from error

    for start in starts:
        for place, folders, files in os.walk(start, onerror=fail):
            folders.sort()
            target = os.path.realpath(place)
            if target in seen:
                left_out.setdefault("that links lead back to", []).append(Path(place).relative_to(folder).as_posix())
                folders.clear()
                continue
            seen.add(target)
            hidden = [Path(place, name).relative_to(folder).as_posix() for name in folders if name.startswith(".")]
            if hidden:
                left_out.setdefault("hidden", []).extend(hidden)
            folders[:] = [name for name in folders if not name.startswith(".")]
            starts += [path for path in (Path(place, name) for name in folders) if path.is_symlink()]
            yield from (Path(place, name) for name in sorted(files))


def _parts_of_pattern(pattern: str) -> list[str]:
    parts = PurePath(pattern.lower()).parts
    if not parts or ".." in parts or PurePath(pattern).anchor:
        raise ConfigError(
            f"The pattern '{pattern}' cannot be used.", "Patterns are relative to the folder, such as '*.txt'."
        )
    # A pattern may begin in any subfolder.
    return ["**", *parts]


def _fits(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[count:], pattern[1:]) for count in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, sorted(names)[:MOST_NAMED]))
    return f"{shown} and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else shown


MARKDOWN_SUFFIXES = (".md", ".markdown")


def load_corpus(config: Any) -> list[KnowledgeNode]:
    """Load the corpus that a config names.

    Returns:
        The passages, at least one, with unique ids and with text.

    Raises:
        ConfigError: There is no corpus, or the settings of the split do not fit each other.
        DataError: The data is missing or bad.
    """
    if config is None:
        raise ConfigError(
            "The config has no dataset.corpus.",
            "Add the passages there; only 'serve-fl' and evaluation.context: none need none.",
        )
    nodes: list[KnowledgeNode] = registry.build("corpus", config)
    if not nodes:
        raise DataError(f"The corpus of type '{config.type}' is empty.", "Name a source with at least one passage.")
    problems = Problems(f"the corpus of type '{config.type}'")
    positions: dict[str, int] = {}
    for position, node in enumerate(nodes, start=1):
        first = positions.setdefault(node.id, position)
        if first != position:
            problems.add(f"passage {position}", f"id '{node.id}' is that of passage {first}")
        if not node.text.strip():
            problems.add(f"passage {position}", f"'{node.id}' has no text")
    problems.raise_if_any()
    return nodes


def load_file_corpus(config: FileCorpusConfig) -> list[KnowledgeNode]:
    """Load a corpus from a JSONL, JSON, CSV, TSV or Parquet file."""
    table = read_table(Path(config.path), config.format, config.limit)
    return split_nodes(_nodes_of_table(table, config.columns), config.split)


def load_huggingface_corpus(config: HuggingFaceCorpusConfig) -> list[KnowledgeNode]:
    """Load a corpus from a data set of the `datasets` library."""
    table = read_dataset(config.path, config.name, config.data_split, config.revision, config.limit)
    return split_nodes(_nodes_of_table(table, config.columns), config.split)


def load_squad_corpus(config: SquadCorpusConfig) -> list[KnowledgeNode]:
    """Load the paragraphs of a JSON file in SQuAD format."""
    path = Path(config.path)
    problems = Problems(path.name)
    nodes = []
    for count, paragraph in enumerate(read_paragraphs(path, problems), start=1):
        text = problems.collect(paragraph.place, text_value, paragraph.values, "context")
        if text is not None:
            nodes.append(KnowledgeNode(paragraph.id, text, {"title": paragraph.title}))
        if count == config.limit:
            break
    problems.raise_if_any()
    return split_nodes(nodes, config.split)


def load_beir_corpus(config: BeirCorpusConfig) -> list[KnowledgeNode]:
    """Load the corpus of a BEIR folder; title and text are joined."""
    folder = Path(config.path)
    check_folder(folder)
    return split_nodes(nodes_of_beir_table(read_table(folder / "corpus.jsonl", limit=config.limit)), config.split)


def nodes_of_beir_table(table: Table) -> list[KnowledgeNode]:
    """Make passages of the corpus of a BEIR data set; title and text are joined.

    Raises:
        DataError: A column is missing, or rows are bad.
    """
    problems = Problems(table.name)
    rows = table.readable_rows(problems)
    require_column(table, rows, "_id", "_id")
    require_column(table, rows, "text", "text")
    ids = _ids_of_rows(table, rows, "_id", problems)
    nodes = []
    for row, node_id in zip(rows, ids, strict=True):
        text = problems.collect(table.place(row), document_text, row.values)
        metadata = problems.collect(table.place(row), metadata_of, row.values, ["_id", "text"])
        if text is not None and node_id is not None and metadata is not None:
            nodes.append(KnowledgeNode(node_id, text, metadata))
    problems.raise_if_any()
    return nodes


def load_text_corpus(config: TextCorpusConfig) -> list[KnowledgeNode]:
    """Load a folder of text or Markdown files, or one such file, split into passages.

    Returns:
        The passages, with `path`, `title` and `document_id` in their metadata. The title is the nearest heading above
        the passage, and the file's name without its ending where there is none.

    Raises:
        ConfigError: The settings of the split do not fit each other, or a pattern is none.
        DataError: The folder is missing or has no such files, or one of them cannot be read or is blank.
    """
    check_sizes(config.split.size, config.split.overlap)
    problems = Problems(config.path)
    nodes = []
    for name, path in find_text_files(Path(config.path), config.patterns).items():
        if HALF_SURROGATE.search(name):
            problems.add(ascii(name), "has a name that is not UTF-8")
            continue
        try:
            text = read_text_file(path)
        except DataError as error:
            problems.add(name, error.message.removeprefix(f"{path} "))
            continue
        if not text.strip():
            problems.add(name, "has no text")
        for position, (title, passage) in enumerate(_passages_of_file(path, text, config.split)):
            nodes.append(
                KnowledgeNode(f"{name}#{position}", passage, {"path": name, "title": title, "document_id": name})
            )
    problems.raise_if_any(
        "Correct or remove these files, or choose other `patterns`. Text is read as UTF-8; "
        "`iconv -f CP1252 -t UTF-8 FILE` converts what Windows wrote."
    )
    return nodes


def _passages_of_file(path: Path, text: str, split: SplitConfig) -> list[tuple[str, str]]:
    if path.suffix.lower() in MARKDOWN_SUFFIXES:
        return split_markdown(text, split.size, split.overlap, title=path.stem)
    return [(path.stem, passage) for passage in split_text(text, split.size, split.overlap)]


def _nodes_of_table(table: Table, columns: PassageColumns) -> list[KnowledgeNode]:
    problems = Problems(table.name)
    rows = table.readable_rows(problems)
    require_column(table, rows, columns.text, "columns.text")
    if columns.id != PassageColumns().id:
        require_column(table, rows, columns.id, "columns.id")
    ids = _ids_of_rows(table, rows, columns.id, problems)
    nodes = []
    for row, node_id in zip(rows, ids, strict=True):
        text = problems.collect(table.place(row), text_value, row.values, columns.text)
        metadata = problems.collect(table.place(row), metadata_of, row.values, [columns.id, columns.text])
        if text is not None and node_id is not None and metadata is not None:
            nodes.append(KnowledgeNode(node_id, text, metadata))
    problems.raise_if_any()
    return nodes


def _ids_of_rows(table: Table, rows: Sequence[Row], column: str, problems: Problems) -> list[str | None]:
    if not any(has_value(row.values, column) for row in rows):
        return [table.numbered_id(row) for row in rows]
    ids: list[str | None] = []
    places: dict[str, RowLocation] = {}
    for row in rows:
        place = table.place(row)
        node_id = problems.collect(place, id_value, row.values, column)
        ids.append(node_id)
        if node_id is not None and places.setdefault(node_id, place) != place:
            problems.add(place, f"{column} '{node_id}' is that of {places[node_id]}")
    return ids


def split_nodes(nodes: list[KnowledgeNode], split: SplitConfig | None) -> list[KnowledgeNode]:
    """Split long documents into passages that name their document in `document_id`.

    Args:
        nodes: The documents.
        split: The sizes; with None, the documents are returned as they are.

    Raises:
        ConfigError: The sizes do not fit each other.
    """
    if split is None:
        return nodes
    return [passage for node in nodes for passage in _passages_of_node(node, split)]


def _passages_of_node(node: KnowledgeNode, split: SplitConfig) -> list[KnowledgeNode]:
    passages = split_text(node.text, split.size, split.overlap)
    if len(passages) == 1:
        return [node]
    metadata = {**node.metadata, "document_id": node.id}
    return [KnowledgeNode(f"{node.id}#{position}", text, metadata) for position, text in enumerate(passages)]
