"""Opening files and folders, with errors that say what is there instead."""

from __future__ import annotations

import codecs
import difflib
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedrag_cli.errors import DataError


def check_file(path: Path) -> None:
    """Check that a path is a file with content.

    Args:
        path: The file.

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

    Args:
        path: The folder.

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

    Args:
        path: The file; a byte order mark at its start is left out.

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
