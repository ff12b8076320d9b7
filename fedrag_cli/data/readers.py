"""Opening files and folders, with errors that say what is there instead."""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import itertools
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrag_cli.data.row_problems import Problems, RowLocation
from fedrag_cli.errors import ConfigError, DataError
from fedrag_cli.text import printable


def check_file(path: Path) -> None:
    """Check that a path is a file with content.

    Raises:
        DataError: It is missing, a folder, empty, or out of reach.
    """
    with reaching(path):
        if path.is_dir():
            raise DataError(f"{path} is a folder, but a file is expected.", "Name one file in it.")
        if not path.is_file():
            raise DataError(f"The file {path} does not exist.", _neighbours(path))
        if path.stat().st_size == 0:
            raise DataError(f"The file {path} is empty.", "Check how it was written, or name another file.")


def check_folder(path: Path) -> None:
    """Check that a path is a folder.

    Raises:
        DataError: It is missing, a file, or out of reach.
    """
    with reaching(path):
        if path.is_file():
            raise DataError(f"{path} is a file, but a folder is expected.", f"Did you mean its folder, {path.parent}?")
        if not path.is_dir():
            raise DataError(f"The folder {path} does not exist.", _neighbours(path))


@contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Raise DataError where the system refuses a path, as one that is too long or in a closed folder."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error


def decoded_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their line ends.

    Lines end at a line feed only: JSON strings may hold the other characters that `str.splitlines` splits at.

    Args:
        path: The file, compressed where its name ends in .gz; a byte order mark at its start is left out.

    Raises:
        DataError: The file cannot be read, is not UTF-8 or has NUL bytes, as UTF-16 and binary files have.
    """
    offset = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for line in file:
                content = line.removeprefix(codecs.BOM_UTF8) if offset == 0 else line
                yield _decode(path, content, offset + len(line) - len(content))
                offset += len(line)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} is no complete gzip file: {error}.", "Copy or download it again.") from error
    except OSError as error:
        raise unreadable(path, error) from error


def read_text_file(path: Path) -> str:
    """Return the text of a UTF-8 file, with line feeds as its only line ends.

    Raises:
        DataError: The file cannot be read or is not UTF-8.
    """
    return "".join(decoded_lines(path)).replace("\r\n", "\n").replace("\r", "\n")


def unreadable(path: Path, error: OSError) -> DataError:
    """Return the error for a file that the system refuses to read."""
    return DataError(f"{path} cannot be read: {error.strerror or error}.", "Check its path and its permissions.")


def _decode(path: Path, line: bytes, offset: int) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: the byte 0x{line[error.start]:02x} at offset {offset + error.start} "
            "cannot be decoded.",
            _how_to_convert(path, line),
        ) from error
    if "\0" in text:
        raise DataError(
            f"{path} is not UTF-8 text: it has a NUL byte at offset {offset + line.index(0)}.",
            _how_to_convert(path, line),
        )
    return text


def _how_to_convert(path: Path, line: bytes) -> str:
    encoding = "UTF-16" if b"\0" in line or line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "CP1252"
    return f"Save the file as UTF-8; where it is {encoding}, `iconv -f {encoding} -t UTF-8 {path.name}` converts it."


def _neighbours(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"Its folder {folder} does not exist either; relative paths start at the config's folder."
    try:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        return f"Its folder cannot be listed: {error.strerror or error}."
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.75)
    if close:
        return f"Did you mean {' or '.join(repr(name) for name in close)}?"
    if not names:
        return f"Its folder {folder} is empty."
    return f"Its folder has: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}."


FORMAT_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
LARGEST_CELL = 2**31 - 1
MOST_NAMED = 5
# The first line by which spreadsheets are told what separates cells.
EXCEL_SEPARATOR = re.compile(r""""?sep=([^\w\s"]|\t)"?""", re.IGNORECASE)
# What pandas, numpy and databases write into texts for a value that is missing.
MISSING_CELLS = frozenset(("None", "nan", "NaN", "NaT", "<NA>", "null", "NULL"))
HEADER_HINT = "Each column needs a name of its own (pandas writes its index without one unless index=False)."


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Args:
        number: Line number where rows are lines, and the count of rows, from 1, where they are not.
        values: Its values by column; empty where the row cannot be read.
        problem: Why the row cannot be read; empty where it can.
    """

    number: int
    values: Mapping[str, Any]
    problem: str = ""


@dataclass(frozen=True)
class Table:
    """The rows of one source.

    Args:
        name: Name of the source in messages.
        stem: What ids of numbered rows start with.
        by_line: The row numbers are line numbers.
        rows: The rows.
        only_texts: All values are texts, as in CSV and TSV, where lists can only be written as such.
    """

    name: str
    stem: str
    by_line: bool
    rows: list[Row]
    only_texts: bool = False

    def place(self, row: Row) -> RowLocation:
        """Return where a row stands, as messages name it."""
        return RowLocation(self.name, row.number, self.by_line)

    def numbered_id(self, row: Row) -> str:
        """Return the id of a row that has none of its own."""
        return f"{self.stem}-{row.number:04d}"

    def readable_rows(self, problems: Problems) -> list[Row]:
        """Return the rows that can be read, and add the others to the problems."""
        for row in self.rows:
            if row.problem:
                problems.add(self.place(row), row.problem)
        return [row for row in self.rows if not row.problem]


def read_table(path: Path, format: str = "auto", limit: int | None = None) -> Table:
    """Read the rows of a file.

    Args:
        path: The file.
        format: One of jsonl, json, csv, tsv and parquet; auto goes by the file's ending.
        limit: Read the first so many rows only.

    Returns:
        The rows, at least one; those that cannot be read say why.

    Raises:
        ConfigError: The format cannot be told by the file's ending.
        DataError: The file is missing, empty, has no rows, or cannot be read at all.
    """
    check_file(path)
    format = _format_of(path) if format == "auto" else format
    with closing(READERS[format](path)) as reader:
        rows = list(itertools.islice(reader, limit))
    if not rows:
        raise DataError(f"{path} has no rows.", "Check how the file was written, or name another file.")
    by_line, only_texts = format in ("jsonl", "csv", "tsv"), format in ("csv", "tsv")
    return Table(path.name, path.stem, by_line, rows, only_texts)


def table_of_mappings(name: str, rows: Iterable[Any]) -> Table:
    """Make a table of mappings that are in memory.

    Args:
        name: Name of the source in messages and in the ids of numbered rows.
        rows: The mappings; anything else among them becomes a row that cannot be read.
    """
    return Table(name, name, False, [_row_of(number, value) for number, value in enumerate(rows, start=1)])


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        DataError: The file is missing, empty or not JSON.
    """
    check_file(path)
    try:
        return json.loads("".join(decoded_lines(path)), object_pairs_hook=_object_of)
    except json.JSONDecodeError as error:
        hint = "If each line is an object of its own, the format is 'jsonl'." if error.msg == "Extra data" else ""
        message = f"{path.name}:{error.lineno} is not JSON: {error.msg} (column {error.colno})."
        raise DataError(message, hint or "Correct the file.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name} is not JSON that can be read: {error}.", "Correct the file.") from error


def kind_of(value: Any) -> str:
    """Return how messages name the type of a value."""
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a text",
        type(None): "null",
        dict: "an object",
    }
    return names.get(type(value), "a list" if isinstance(value, list | tuple) else f"of type {type(value).__name__}")


def _format_of(path: Path) -> str:
    try:
        return FORMAT_OF_SUFFIX[path.suffix.lower()]
    except KeyError:
        raise ConfigError(
            f"The format of '{path.name}' cannot be told by its ending.",
            f"Set `format` to one of {', '.join(READERS)}.",
        ) from None


def _row_of(number: int, value: Any) -> Row:
    if not isinstance(value, Mapping):
        return Row(number, {}, f"is no object with named fields but {kind_of(value)}")
    odd = [key for key in value if not isinstance(key, str)]
    return Row(number, {}, f"has a field whose name is no text: {odd[0]!r}") if odd else Row(number, value)


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(decoded_lines(path), start=1):
        if not line.strip():
            continue
        try:
            yield _row_of(number, json.loads(line.rstrip(), object_pairs_hook=_object_of))
        except json.JSONDecodeError as error:
            yield Row(number, {}, f"is not JSON: {error.msg} (column {error.colno})")
        except (ValueError, RecursionError) as error:
            yield Row(number, {}, f"is not JSON that can be read: {error}")


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the field {next(name for name in names if names.count(name) > 1)!r} more than once")
    return values


def _read_json_rows(path: Path) -> Iterator[Row]:
    content = read_json(path)
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise DataError(
            f"{path} holds neither a list of objects nor an object whose key 'data' holds one.",
            "Write the rows as [{...}, {...}], or one object a line as JSONL.",
        )
    yield from (_row_of(number, value) for number, value in enumerate(rows, start=1))


def _read_csv(path: Path) -> Iterator[Row]:
    return _read_delimited(path, ",", others=";\t")


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_delimited(path, "\t")


def _read_delimited(path: Path, delimiter: str, others: str = "") -> Iterator[Row]:
    # The standard limit of 131072 characters a cell is below the length of ordinary documents.
    earlier_limit = csv.field_size_limit(LARGEST_CELL)
    # The lines of the row that is being read, and the numbers of rows whose lines could be rows themselves.
    taken: list[str] = []
    doubtful: list[str] = []
    try:
        first = next((line for line in decoded_lines(path) if line.strip()), "")
        told = EXCEL_SEPARATOR.fullmatch(first.strip(" \r\n"))
        if told:
            delimiter = told[1]
        elif delimiter not in first:
            delimiter = next((other for other in others if other in first), delimiter)
        reader = csv.reader(_noted(decoded_lines(path), taken), delimiter=delimiter, strict=True)
        if told:
            next(cells for cells in reader if any(map(str.strip, cells)))
        header = _read_header(path, reader)
        while True:
            number = reader.line_num + 1
            taken.clear()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Row(number, {}, _quote_problem(error))
                continue
            alike = sum(line.count(delimiter) == len(cells) - 1 for line in taken)
            if alike == len(taken) > 1 and delimiter in taken[0]:
                doubtful.append(str(number))
            if len(cells) not in (0, len(header)):
                yield Row(number, {}, f"has {len(cells)} cells, but the header has {len(header)}")
            elif delimiter == "\t" and alike > 1:
                yield Row(number, {}, _open_quote(number, reader.line_num))
            elif cells:
                values = (None if cell.strip() in MISSING_CELLS else cell for cell in cells)
                yield Row(number, dict(zip(header, values, strict=True)))
    finally:
        csv.field_size_limit(earlier_limit)
        if doubtful and delimiter != "\t":
            logging.getLogger(__name__).warning(
                "%s: quoted cells of these lines hold what looks like further rows, check their quotation marks: %s%s",
                printable(str(path)),
                ", ".join(doubtful[:MOST_NAMED]),
                f" and {len(doubtful) - MOST_NAMED} more" if len(doubtful) > MOST_NAMED else "",
            )


def _noted(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _quote_problem(error: csv.Error) -> str:
    if str(error) == "unexpected end of data":
        return "cannot be read: a quotation mark at the start of a cell is never closed"
    return f"cannot be read: {error}"


def _open_quote(first: int, last: int) -> str:
    return (
        f"has a cell that begins with a quotation mark and ends in line {last}, but lines {first} to {last} look like "
        'rows of their own (a quotation mark of the text itself is doubled, in a quoted cell: """six""")'
    )


def _read_header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = [name.strip() for name in next((cells for cells in reader if any(map(str.strip, cells))), [])]
    except csv.Error as error:
        raise DataError(f"The header of {path} cannot be read: {_quote_problem(error)}.", HEADER_HINT) from error
    return _checked_header(path, header)


def _checked_header(path: Path, header: list[str]) -> list[str]:
    unnamed = [str(position) for position, name in enumerate(header, start=1) if not name]
    if unnamed:
        raise DataError(f"The header of {path} has no name for column {', '.join(unnamed)}.", HEADER_HINT)
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"The header of {path} names more than once: {', '.join(repeated)}.", HEADER_HINT)
    return header


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            _checked_header(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024):
                for index, field in enumerate(batch.schema):
                    by_text = _with_floats_as(field.type, pyarrow.string())
                    if by_text != field.type:
                        # By way of the shortest text, 84.1 stays 84.1 and becomes no 84.0999984741211.
                        doubles = _with_floats_as(field.type, pyarrow.float64())
                        batch = batch.set_column(index, field.name, batch.column(index).cast(by_text).cast(doubles))
                for values in batch.to_pylist():
                    number += 1
                    yield _row_of(number, values)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no Parquet file that can be read: {error}", "Check how it was written.") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _with_floats_as(kind: Any, wanted: Any) -> Any:
    """Return a type of Arrow in which another one stands in the place of floats of 16 and 32 bits, in lists too."""
    from pyarrow import field, float16, float32, large_list, list_, struct, types

    if kind in (float16(), float32()):
        return wanted
    if types.is_struct(kind):
        return struct([field(inner.name, _with_floats_as(inner.type, wanted)) for inner in kind])
    if types.is_list(kind):
        return list_(_with_floats_as(kind.value_type, wanted))
    if types.is_large_list(kind):
        return large_list(_with_floats_as(kind.value_type, wanted))
    if types.is_fixed_size_list(kind):
        return list_(_with_floats_as(kind.value_type, wanted), kind.list_size)
    return kind


READERS: dict[str, Callable[[Path], Any]] = {
    "jsonl": _read_jsonl,
    "json": _read_json_rows,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
}
