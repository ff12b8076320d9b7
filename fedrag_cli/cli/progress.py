"""How long work shows itself: live bars on a terminal; elsewhere lines, and one about progress now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from fedrag_cli.text import LONGEST_NOTE, printable, readable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from fedrag_cli.runs.reporter import Advance


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


SECONDS_BETWEEN_LINES = 10.0
WIDTH_OF_NUMBERS = 85
SHORTEST_BAR = 5
FEDERATION_EVENTS = frozenset(
    {
        "listening",
        "waiting",
        "client",
        "round_started",
        "client_update",
        "client_outlier",
        "round",
        "federated_evaluation",
        "client_final",
    }
)


class TerminalReporter:
    """Live bars with rate and time left, and a line for each event worth one."""

    def __init__(self, console: Console) -> None:
        """Draw on the given console."""
        self._console = console
        self._live: Progress | None = None
        self._task: TaskID | None = None

    def event(self, name: str, **fields: Any) -> None:
        """Show the newest loss beside the bar, and other events as lines."""
        if name == "train_step" and self._live is not None and self._task is not None:
            self._live.update(self._task, note=f"loss {fields['loss']:.4f}")
        elif text := _event_line(name, fields):
            self.note(text)

    def note(self, message: str) -> None:
        """Print a line above the bars."""
        (self._live.console if self._live is not None else self._console).print(
            readable(message, LONGEST_NOTE), markup=False
        )

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        """Show a bar; a task inside another one is shown below it."""
        from rich.progress import BarColumn, Progress, TextColumn

        name = escape(printable(description))
        if self._live is not None:
            progress, outer = self._live, self._task
            self._task = progress.add_task(name, total=total, unit=unit, note="", rate=None)
            try:
                yield _BarAdvance(progress, self._task)
            finally:
                progress.remove_task(self._task)
                self._task = outer
            return
        # On a narrow terminal the bar gives way to the numbers.
        bar_width = min(30, self._console.width - WIDTH_OF_NUMBERS)
        bar = [BarColumn(bar_width)] if bar_width >= SHORTEST_BAR else []
        columns = (
            TextColumn("{task.description}"),
            *bar,
            CountColumn(),
            RateColumn(),
            ElapsedColumn(),
            LeftColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console) as progress:
            self._live = progress
            self._task = progress.add_task(name, total=total, unit=unit, note="", rate=None)
            try:
                yield _BarAdvance(progress, self._task)
            finally:
                self._live = self._task = None


class _BarAdvance:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._rate = _Rate()

    def __call__(self, done: int) -> None:
        self._progress.update(self._task, advance=done, rate=self._rate.after(done))

    def total(self, total: int) -> None:
        # A training says its total before its first call, which tells the steps of earlier parts of the run.
        self._rate = _Rate(skips_first=True)
        self._progress.update(self._task, total=total)


class _Rate:
    """Units a second over a whole task.

    Args:
        skips_first: Whether the first call tells what was done before the task, by an earlier part of the run.
    """

    def __init__(self, *, skips_first: bool = False) -> None:
        self._skips = skips_first
        self._done = 0
        self._started = time.monotonic()

    def after(self, done: int) -> float | None:
        """Count units that were just done, and return the rate; None before there is one."""
        if self._skips:
            self._skips, self._started = False, time.monotonic()
            return None
        self._done += done
        return self._done / max(time.monotonic() - self._started, 1e-9) if self._done else None


class PlainReporter:
    """Lines only: the start and the end of a task, and now and then how far it is."""

    def __init__(self, console: Console) -> None:
        """Write to the given console."""
        self._console = console
        self._loss = ""

    def event(self, name: str, **fields: Any) -> None:
        """Keep the newest loss for the next progress line, and print other events."""
        if name == "train_step":
            self._loss = f", loss {fields['loss']:.4f}"
        elif text := _event_line(name, fields):
            self.note(text)

    def note(self, message: str) -> None:
        """Print a line."""
        self._console.print(readable(message, LONGEST_NOTE), markup=False, soft_wrap=True)

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        """Print progress lines, at most one every few seconds."""
        advance = _LineAdvance(self, description, total, unit)
        self._loss = ""
        yield advance
        advance.finish()

    def progress(self, text: str) -> None:
        """Print a progress line with the newest loss."""
        self.note(text + self._loss)


class _LineAdvance:
    def __init__(self, reporter: PlainReporter, description: str, total: int, unit: str) -> None:
        self._reporter = reporter
        self._description = description
        self._total = total
        self._unit = unit
        self._done = 0
        self._rate = _Rate()
        self._started = self._printed = time.monotonic()

    def __call__(self, done: int) -> None:
        self._done += done
        rate = self._rate.after(done)
        now = time.monotonic()
        if now - self._printed >= SECONDS_BETWEEN_LINES and self._done < self._total:
            self._printed = now
            left = (
                f", {rate_text(rate, self._unit)}, {duration((self._total - self._done) / rate)} left" if rate else ""
            )
            self._reporter.progress(f"{self._counts()}{left}")

    def total(self, total: int) -> None:
        # As in _BarAdvance.
        self._rate = _Rate(skips_first=True)
        self._total = total

    def finish(self) -> None:
        if self._done:
            self._reporter.progress(f"{self._counts()} in {duration(time.monotonic() - self._started)}")

    def _counts(self) -> str:
        return f"{self._description}: {self._done}/{self._total} {self._unit}s"


def _event_line(name: str, fields: Mapping[str, Any]) -> str:
    if name == "validation":
        return f"{fields['phase']}: validation at step {fields['step']}: {_metrics(fields['metrics'])}"
    if name == "evaluation" and fields["stage"] in ("before", "after"):
        return f"{fields['stage'].capitalize()} training, {fields['split']} split: {_metrics(fields['metrics'])}"
    if name in FEDERATION_EVENTS:
        from fedrag_cli.cli.federation_view import federation_line

        return federation_line(name, fields)
    return ""


def _metrics(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def rate_text(rate: float, unit: str) -> str:
    """Return units a second, or seconds a unit where a unit takes minutes.

    Args:
        rate: Units a second, above 0.
        unit: Name of one unit.
    """
    if rate < 0.01:
        return f"{1 / rate:.0f} s/{unit}"
    return f"{rate:.2f} {unit}s/s" if rate < 1 else f"{rate:.1f} {unit}s/s"


def duration(seconds: float) -> str:
    """Return seconds as minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
