"""How long work shows itself: live bars on a terminal; elsewhere lines, and one about progress now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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


class _Column(ProgressColumn):
    """Shows a text about a task."""

    def __init__(self, text: Callable[[Task], str], style: str) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._text, self._style = text, style

    def render(self, task: Task) -> Text:
        return Text(self._text(task), style=self._style)


def _count(task: Task) -> str:
    return f"{int(task.completed)}/{int(task.total or 0)} {task.fields['unit']}s"


def _rate_of(task: Task) -> float | None:
    """Return the units a second: the newest estimate, and that over the whole task where units are too slow for one."""
    return task.speed or task.fields["rate"]


def _rate(task: Task) -> str:
    rate = _rate_of(task)
    return rate_text(rate, task.fields["unit"]) if rate else ""


def _elapsed(task: Task) -> str:
    return f"{_clock(task.elapsed or 0)} elapsed"


def _left(task: Task) -> str:
    rate = _rate_of(task)
    return f"{_clock((task.remaining or 0) / rate)} left" if rate and task.remaining is not None else ""


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def progress_bars(console: Console) -> Progress:
    """Return bars with counts, rate, time and a note; `task_bar` adds them."""
    from rich.progress import BarColumn, Progress, TextColumn

    # On a narrow terminal the bar gives way to the numbers.
    width = min(30, console.width - WIDTH_OF_NUMBERS)
    return Progress(
        TextColumn("{task.description}"),
        *([BarColumn(width)] if width >= SHORTEST_BAR else []),
        _Column(_count, "progress.download"),
        _Column(_rate, "progress.data.speed"),
        _Column(_elapsed, "progress.elapsed"),
        _Column(_left, "progress.remaining"),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


@contextmanager
def task_bar(
    progress: Progress, description: str, total: int, unit: str, *, stays: bool = False
) -> Iterator[BarAdvance]:
    """Show a bar for as long as a task lasts, or until the bars end."""
    task = progress.add_task(escape(printable(description)), total=total, unit=unit, note="", rate=None)
    try:
        yield BarAdvance(progress, task)
    finally:
        if not stays:
            progress.remove_task(task)


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
        self._bars: list[BarAdvance] = []

    def event(self, name: str, **fields: Any) -> None:
        """Show the newest loss beside the bar, and other events as lines."""
        if name == "train_step" and self._bars:
            self._bars[-1].note(f"loss {fields['loss']:.4f}")
        elif text := _event_line(name, fields):
            self.note(text)

    def note(self, message: str) -> None:
        """Print a line above the bars."""
        console = self._live.console if self._live is not None else self._console
        console.print(readable(message, LONGEST_NOTE), markup=False)

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        """Show a bar; a task inside another one is shown below it."""
        with ExitStack() as stack:
            is_outer = self._live is None
            if self._live is None:
                self._live = stack.enter_context(progress_bars(self._console))
                stack.callback(setattr, self, "_live", None)
            bar = stack.enter_context(task_bar(self._live, description, total, unit, stays=is_outer))
            self._bars.append(bar)
            stack.callback(self._bars.pop)
            yield bar


class BarAdvance:
    """Moves one bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        """Start the bar's rate now."""
        self._progress, self._task = progress, task
        self._rate = _Rate()

    def __call__(self, done: int) -> None:
        """Count `done` more units."""
        self._progress.update(self._task, advance=done, rate=self._rate.after(done))

    def total(self, total: int) -> None:
        """Correct the number of units."""
        # A training says its total before its first call, which tells the steps of earlier parts of the run.
        self._rate = _Rate(skips_first=True)
        self._progress.update(self._task, total=total)

    def note(self, text: str) -> None:
        """Show a text beside the bar."""
        self._progress.update(self._task, note=text)


class _Rate:
    """Units a second over a whole task; the first call may tell what an earlier part of the run has done."""

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
        # As in BarAdvance.
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
    """Return units a second, or seconds a unit where a unit takes minutes."""
    if rate < 0.01:
        return f"{1 / rate:.0f} s/{unit}"
    return f"{rate:.2f} {unit}s/s" if rate < 1 else f"{rate:.1f} {unit}s/s"


def duration(seconds: float) -> str:
    """Return seconds as minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
