"""What is wrong with a config: every problem with its place, all in one error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fedrag_cli.errors import ConfigError

KeyPath = tuple[str | int, ...]
Finding = tuple[KeyPath, str]
"""The key path from the config's top, and what is wrong there."""


@dataclass(frozen=True)
class Position:
    """Where a value stands: a file and a line, or the command line (line 0)."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class ConfigProblem:
    """One thing that is wrong, and where."""

    position: Position
    path: str
    message: str

    def to_dict(self) -> dict[str, Any]:
        """Return the problem as plain values for JSON."""
        return {"file": self.position.file, "line": self.position.line, "path": self.path, "message": self.message}

    def __str__(self) -> str:
        return f"{self.position}: {self.path}: {self.message}" if self.path else f"{self.position}: {self.message}"


class InvalidConfigError(ConfigError):
    """A config with one or more problems, in the order of the file."""

    def __init__(self, problems: Sequence[ConfigProblem]) -> None:
        """Join the problems, a line each."""
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        lines = "\n".join(f"  {problem}" for problem in problems)
        super().__init__(
            f"The config has {count}:\n{lines}",
            "Correct the file; 'fedrag validate' checks it without loading anything, and 'fedrag components TYPE' "
            "lists the settings.",
        )
        self.problems = tuple(problems)


def in_order(problems: Iterable[ConfigProblem]) -> list[ConfigProblem]:
    """Return problems by file and line."""
    return sorted(problems, key=lambda problem: (problem.position.file, problem.position.line))


def format_path(path: Iterable[str | int]) -> str:
    """Write a key path as users write it: `dataset.corpus.path`, `evaluation.metrics[1]`."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def suggestion(word: object, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the closest known word, or the known words where none is close."""
    options = sorted(known)
    close = difflib.get_close_matches(str(word), options, n=1, cutoff=0.6)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (known: {', '.join(options)})" if options else ""
