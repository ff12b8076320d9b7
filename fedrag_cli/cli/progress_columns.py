"""What a bar on a terminal says beside itself: units done, their rate, the time that has passed and what is left."""

from __future__ import annotations

from datetime import timedelta

from rich.progress import ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from fedrag_cli.cli.progress import rate_text


def rate_of(task: Task) -> float | None:
    """Return the units a second: the newest estimate, and that over the whole task where units are too slow for one."""
    return task.speed or task.fields["rate"]


class _Line(ProgressColumn):
    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))


class CountColumn(_Line):
    """Units done of all, such as 26/52 steps."""

    def render(self, task: Task) -> Text:
        """Return the text of a task."""
        return Text(f"{int(task.completed)}/{int(task.total or 0)} {task.fields['unit']}s", style="progress.download")


class RateColumn(_Line):
    """Units a second; nothing before there is an estimate."""

    def render(self, task: Task) -> Text:
        """Return the text of a task."""
        rate = rate_of(task)
        return Text(rate_text(rate, task.fields["unit"]) if rate else "", style="progress.data.speed")


class ElapsedColumn(_Line):
    """The time that a task has taken so far."""

    def render(self, task: Task) -> Text:
        """Return the text of a task."""
        return Text(f"{_clock(task.elapsed or 0)} elapsed", style="progress.elapsed")


class LeftColumn(_Line):
    """The time that a task will still take; nothing before there is an estimate."""

    def render(self, task: Task) -> Text:
        """Return the text of a task."""
        rate = rate_of(task)
        left = f"{_clock((task.remaining or 0) / rate)} left" if rate and task.remaining is not None else ""
        return Text(left, style="progress.remaining")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
