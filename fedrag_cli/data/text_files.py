"""Finding the files of a text corpus."""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from fedrag_cli.data.files import check_file, check_folder, reaching, unreadable
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
