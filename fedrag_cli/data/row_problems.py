"""What is wrong with the rows of a source, collected so that all of it is told at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from fedrag_cli.errors import DataError

MOST_SHOWN = 20

P = ParamSpec("P")
T = TypeVar("T")


class BadValueError(ValueError):
    """A value of a row cannot be used; the message says why and is completed with the row's place."""


@dataclass(frozen=True)
class RowLocation:
    """Where a row stands.

    Args:
        source: Name of the file or data set.
        row: Line number where rows are lines, and the count of rows, from 1, where they are not.
        by_line: Whether it is a line number.
    """

    source: str
    row: int
    by_line: bool = True

    def __str__(self) -> str:
        return f"{self.source}:{self.row}" if self.by_line else f"{self.source} row {self.row}"


@dataclass(frozen=True)
class DataProblem:
    """One thing that is wrong.

    Args:
        place: Where: a row, or in words what is meant.
        message: What is wrong there.
        source: Name of the source.
    """

    place: RowLocation | str
    message: str
    source: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: `file`, `line`, `path` (a place that is no line) and `message`."""
        if not isinstance(self.place, RowLocation):
            return {"file": self.source, "line": None, "path": self.place, "message": self.message}
        line, path = (self.place.row, "") if self.place.by_line else (None, f"row {self.place.row}")
        return {"file": self.place.source, "line": line, "path": path, "message": self.message}


class BadRowsError(DataError):
    """Data with one or more problems.

    Args:
        source: Name of the source.
        problems: All that is wrong, in the order of the rows.
        hint: What to do about them.
    """

    def __init__(self, source: str, problems: Sequence[DataProblem], hint: str) -> None:
        """List the first problems, a line each."""
        count = len(problems)
        shown = [str(problem) for problem in problems[:MOST_SHOWN]]
        lines = [f"{count} problem{'s' if count > 1 else ''} in {source}:", *shown]
        if count > MOST_SHOWN:
            lines.append(f"... and {count - MOST_SHOWN} more")
        super().__init__("\n".join(lines), hint)
        self.problems = tuple(problems)


class Problems:
    """The problems of one source.

    Args:
        source: Name of the source in the error's first line.
    """

    def __init__(self, source: str) -> None:
        """Start without problems."""
        self.source = source
        self._found: list[DataProblem] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(self, place: RowLocation | str, message: str) -> None:
        """Add one problem.

        Args:
            place: Where it is: a row, or in words what is meant.
            message: What is wrong there.
        """
        self._found.append(DataProblem(place, message, self.source))

    def collect(
        self, place: RowLocation | str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T | None:
        """Call a function and keep its `BadValueError` as a problem.

        Args:
            place: Where the values are from.
            function: What to call.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            The function's result, or None where there was a problem.
        """
        try:
            return function(*args, **kwargs)
        except BadValueError as error:
            self.add(place, str(error))
            return None

    def raise_if_any(self, hint: str = "Correct or remove what is listed; nothing is left out in silence.") -> None:
        """Raise the collected problems as one error, those of rows in the rows' order.

        Raises:
            BadRowsError: There are problems; the first of them are listed.
        """
        if self._found:
            # Sorting keeps what has the same key in its order, so several problems of a row stay as they were found.
            ordered = sorted(
                self._found, key=lambda found: found.place.row if isinstance(found.place, RowLocation) else 0
            )
            raise BadRowsError(self.source, ordered, hint)
