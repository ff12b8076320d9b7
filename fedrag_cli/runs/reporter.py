"""How long work tells of itself: events for records, tasks with progress, and notes.

Libraries call a `Reporter`; what becomes of it is up to the caller (files, a terminal, nothing).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol


class Advance(Protocol):
    """Takes the units of a task that were just done."""

    def __call__(self, done: int) -> None:
        """Count `done` more units."""

    def total(self, total: int) -> None:
        """Correct the number of units, where it becomes known only later."""


class Reporter(Protocol):
    """What trainers and evaluators tell while they work."""

    def event(self, name: str, **fields: Any) -> None:
        """Record one event; the fields are plain numbers, texts, lists and dicts."""

    def task(self, description: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """Start a task of `total` units; the context yields a function that takes the units just done."""

    def note(self, message: str) -> None:
        """Tell something worth knowing, in one line."""


class _SilentAdvance:
    def __call__(self, done: int) -> None:
        pass

    def total(self, total: int) -> None:
        pass


class SilentReporter:
    """A reporter that keeps quiet."""

    def event(self, name: str, **fields: Any) -> None:
        """Do nothing."""

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        """Yield a counter that does nothing."""
        yield _SilentAdvance()

    def note(self, message: str) -> None:
        """Do nothing."""


def epsilon_text(record: Mapping[str, Any], *, prefix: str = "", long: bool = False) -> str:
    """Return what rounds have spent of privacy, from a round's record; an empty text where there is no privacy.

    Args:
        record: `epsilon`, `epsilon_replaced` and `delta`; an epsilon of None is without bound.
        prefix: What stands before the names of the first two; `own_` for what a client's own noise has spent.
        long: Whether to say all of it, with its meaning, instead of the first epsilon alone.
    """
    if f"{prefix}epsilon" not in record:
        return ""

    def number(name: str) -> str:
        epsilon = record[prefix + name]
        return "unbounded" if epsilon is None else f"{epsilon:.4g}"

    if not long:
        return number("epsilon")
    return (
        f"epsilon {number('epsilon')} at delta {record['delta']:g}, and {number('epsilon_replaced')} against replacing "
        "instead of zeroing one site's updates"
    )
