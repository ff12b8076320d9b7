"""Finding the files of a text corpus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedrag_cli.data.files import check_file, check_folder
from fedrag_cli.errors import ConfigError, DataError


def find_text_files(path: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """Return the files of a folder and its subfolders by their path in the folder.

    Args:
        path: The folder; or one file, which needs to fit no pattern.
        patterns: Which files to take; hidden files and those in hidden folders are left out.

    Returns:
        The files, sorted by name; names have `/` on every system.

    Raises:
        ConfigError: A pattern is none.
        DataError: The folder is missing, or no file in it fits.
    """
    if path.is_file():
        check_file(path)
        return {path.name: path}
    check_folder(path)
    found = {}
    for pattern in patterns:
        for file in _matches(path, pattern):
            relative = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in relative.parts):
                found[relative.as_posix()] = file
    if not found:
        raise DataError(
            f"The folder {path} has no files that fit {', '.join(patterns) or 'no patterns at all'}.",
            "Check the folder, or set `patterns` to the names of its files.",
        )
    return dict(sorted(found.items()))


def _matches(path: Path, pattern: str) -> list[Path]:
    try:
        return list(path.rglob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"The pattern '{pattern}' cannot be used: {error}.", "Patterns are relative, such as '*.txt'."
        ) from error
