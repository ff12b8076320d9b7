"""What is wrong with the rows of a source, collected so that all of it is told at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from fedrag_cli.errors import DataError

MOST_SHOWN = 20

P = ParamSpec("P")
T = TypeVar("T")


class BadValueError(ValueError):
    """A value of a row cannot be used; the message says why and is completed with the row's place."""


class Problems:
    """The problems of one source.

    Args:
        source: Name of the source in the error's first line.
    """

    def __init__(self, source: str) -> None:
        """Start without problems."""
        self.source = source
        self._lines: list[str] = []

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, place: str, message: str) -> None:
        """Add one problem.

        Args:
            place: Where it is, such as `train.jsonl:17`.
            message: What is wrong there.
        """
        self._lines.append(f"{place}: {message}")

    def collect(self, place: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
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
        """Raise the collected problems as one error.

        Args:
            hint: What to do about them.

        Raises:
            DataError: There are problems; the first of them are listed.
        """
        if not self._lines:
            return
        count = len(self._lines)
        lines = [f"{count} problem{'s' if count > 1 else ''} in {self.source}:", *self._lines[:MOST_SHOWN]]
        if count > MOST_SHOWN:
            lines.append(f"... and {count - MOST_SHOWN} more")
        raise DataError("\n".join(lines), hint)
