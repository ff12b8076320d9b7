"""Everything that is drawn with Rich: tables, messages and progress.

On a terminal there are live bars and colours; elsewhere plain lines, with no bars and a line about progress now and
then.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedrag_cli.errors import FedRAGError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from fedrag_cli.runs.reporting import Advance, Reporter

SECONDS_BETWEEN_LINES = 10.0
FEDERATION_EVENTS = frozenset(
    {
        "listening",
        "waiting",
        "client",
        "round_started",
        "client_update",
        "round",
        "federated_evaluation",
        "client_final",
    }
)
VERDICT_STYLES = {"better": "bold green", "worse": "bold red"}


class Renderer:
    """Writes for people: results and messages to stderr, texts that are the result itself to stdout."""

    def __init__(self) -> None:
        """Find out whether stderr is a terminal; NO_COLOR is respected by Rich."""
        self.console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=False)
        self.output = Console(highlight=False, emoji=False)

    def reporter(self) -> Reporter:
        """Return a reporter with live bars on a terminal, and plain lines elsewhere."""
        return TerminalReporter(self.console) if self.console.is_terminal else PlainReporter(self.console)

    def error(self, error: FedRAGError) -> None:
        """Print an error and what to do about it."""
        self.line(Text.assemble(("Error: ", "bold red"), error.message))
        if error.hint:
            self.line(Text.assemble(("What to do: ", "bold"), error.hint))

    def line(self, text: str | Text) -> None:
        """Print one line to stderr, without cutting it where there is no terminal."""
        self.console.print(text, markup=False, soft_wrap=not self.console.is_terminal)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str | Text]], *, stdout: bool = False) -> None:
        """Print a table: drawn on a terminal, aligned columns elsewhere."""
        console = self.output if stdout else self.console
        if console.is_terminal:
            table = Table(*columns, header_style="bold")
            for row in rows:
                table.add_row(*row)
            console.print(table)
            return
        texts = [[str(cell) for cell in row] for row in (columns, *rows)]
        widths = [max(len(row[column]) for row in texts) for column in range(len(columns))]
        for row in texts:
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            console.print(line, markup=False, soft_wrap=True)

    def text(self, text: str) -> None:
        """Print a text that is the result itself to stdout."""
        self.output.print(text, markup=False, soft_wrap=True)

    def fields(self, fields: Mapping[str, object]) -> None:
        """Print names and values, a line each."""
        width = max(len(name) for name in fields)
        for name, value in fields.items():
            self.line(Text.assemble((f"{name.ljust(width)}  ", "bold"), str(value)))

    def differences(self, summary: Mapping[str, Any]) -> None:
        """Print the table of metrics before and after training."""
        rows = [_difference_row(item) for item in summary["differences"]]
        if not rows:
            self.line("There is no validation or test split, so nothing was measured before and after.")
            return
        level = round(100 * summary["differences"][0]["confidence"])
        self.line(f"Before and after training, on the {summary['split']} split:")
        self.table(["metric", "n", "before", "after", "difference", f"{level} % interval", "verdict"], rows)

    def training_summary(self, summary: Mapping[str, Any]) -> None:
        """Print what a training run ended with."""
        self.differences(summary)
        cut = {name: count for name, count in summary["truncated"].items() if count}
        if cut:
            self.line("Truncated: " + ", ".join(f"{count} {name}" for name, count in cut.items()))
        self.line(f"{summary['steps']} steps, mean loss {summary['loss']:.4f}, {_duration(summary['seconds'])}")
        self.line(f"Everything is in {summary['run_dir']} (README.md is its model card)")
        self.line(f'Try it: fedrag query {summary["run_dir"]} "your question"')

    def run_summary(self, summary: Mapping[str, Any]) -> None:
        """Print what a run of any kind ended with."""
        role = summary.get("role")
        if role == "evaluation":
            self.evaluation(summary)
        elif role is not None:
            self.federation_summary(summary)
        else:
            self.training_summary(summary)

    def federation_summary(self, summary: Mapping[str, Any]) -> None:
        """Print what a part of a federation ended with."""
        rows = [
            [
                str(row["round"]),
                str(len(row["clients"])) if "clients" in row else "",
                ", ".join(row.get("refused", {})),
                str(row["examples"]),
                f"{row['loss']:.4f}" if row.get("loss") is not None else "",
                f"{row['seconds']:.1f}" if row.get("seconds") is not None else "",
            ]
            for row in summary["rounds"]
        ]
        columns = ["round", "clients", "refused", "examples", "loss", "seconds"]
        shown = [number for number in range(len(columns)) if any(row[number] for row in rows)]
        if rows:
            self.table([columns[number] for number in shown], [[row[number] for number in shown] for row in rows])
        if summary["differences"]:
            self.differences(summary)
        self.line(f"Everything is in {summary['run_dir']} (README.md is its model card)")

    def written(self, paths: Sequence[Path], next_step: str) -> None:
        """Print which files were written, and what to do with them."""
        for path in paths:
            self.line(f"wrote {path}")
        self.line(next_step)

    def validation(self, document: Mapping[str, Any]) -> None:
        """Print that a config is right, and what was loaded."""
        self.line(f"{document['config']} is valid (mode: {document['mode']}).")
        for name, values in document.get("loaded", {}).items():
            self.line(f"  {name.removesuffix('_bytes').replace('_', ' ')}: {_loaded_value(name, values)}")

    def components(self, listed: Sequence[Mapping[str, Any]], *, settings: bool) -> None:
        """Print components, and their settings where these were asked for."""
        if not settings:
            rows = [[item["kind"], item["type"], item["help"], item["origin"]] for item in listed]
            self.table(["kind", "type", "what it is", "from"], rows, stdout=True)
            return
        for item in listed:
            self.text(f"{item['kind']} {item['type']}: {item['help']}")
            rows = [[row["name"], _default(row), row["help"]] for row in item["settings"]]
            self.table(["setting", "default", "what it does"], rows, stdout=True)

    def installation(self, report: Mapping[str, Any]) -> None:
        """Print what is installed and what the machine can compute on."""
        self.text(f"Python {report['python']} on {report['platform']}")
        rows = [
            [package["name"], str(package["version"] or "-"), package["bounds"], package["problem"] or "ok"]
            for package in report["packages"]
        ]
        self.table(["package", "version", "tested", "state"], rows, stdout=True)
        for device in report["devices"]:
            self.text("Device " + ", ".join(f"{key} {value}" for key, value in device.items()))
        models = [
            f"{name} {'is' if there else 'is not'} installed" for name, there in report["quickstart_models"].items()
        ]
        self.text("Quickstart models: " + ", ".join(models))
        self.text(f"Free disk: {report['free_disk_bytes'] / 2**30:.1f} GiB")
        self.text("All is well." if report["healthy"] else "Something is wrong; see the states above.")

    def initialised(self, directory: Path, written: Sequence[Path]) -> None:
        """Print what was written and what to do next."""
        for path in written:
            self.line(f"wrote {path}")
        self.line(f"Next: cd {directory} && fedrag train")

    def answer(self, answer: Mapping[str, Any], *, sources: bool = True) -> None:
        """Print an answer to stdout and its sources to stderr."""
        self.text(answer["answer"])
        for number, source in enumerate(answer["sources"] if sources else (), start=1):
            self.line(Text(f"  [{number}] {source['id']} ({source['score']:.3f}) {source['text']}", style="dim"))

    def evaluation(self, summary: Mapping[str, Any]) -> None:
        """Print the table of an evaluation."""
        rows = _evaluation_rows(summary["metrics"])
        for group, metrics in summary["groups"].items():
            rows += [[f"  {summary['group_by']} {group}: {row[0]}", *row[1:]] for row in _evaluation_rows(metrics)]
        level = round(100 * summary["confidence"])
        self.table(["metric", "n", "mean", f"{level} % interval"], rows)
        cut = {name: count for name, count in summary["truncated"].items() if count}
        if cut:
            self.line("Truncated: " + ", ".join(f"{count} {name}" for name, count in cut.items()))
        self.line(f"Everything is in {summary['run_dir']}, the questions in {summary['predictions']}")


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
        (self._live.console if self._live is not None else self._console).print(message, markup=False)

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        """Show a bar; a task inside another one is shown below it."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        if self._live is not None:
            progress, outer = self._live, self._task
            self._task = progress.add_task(description, total=total, unit=unit, note="", rate="")
            try:
                yield _BarAdvance(progress, self._task)
            finally:
                progress.remove_task(self._task)
                self._task = outer
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console) as progress:
            self._live = progress
            self._task = progress.add_task(description, total=total, unit=unit, note="", rate="")
            try:
                yield _BarAdvance(progress, self._task)
            finally:
                self._live = self._task = None


class _BarAdvance:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def __call__(self, done: int) -> None:
        self._progress.advance(self._task, done)
        task = next(task for task in self._progress.tasks if task.id == self._task)
        if task.speed:
            self._progress.update(self._task, rate=f"{task.speed:.1f} {task.fields['unit']}s/s")

    def total(self, total: int) -> None:
        self._progress.update(self._task, total=total)


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
        self._console.print(message, markup=False, soft_wrap=True)

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
        self._started = self._printed = time.monotonic()

    def __call__(self, done: int) -> None:
        self._done += done
        now = time.monotonic()
        if now - self._printed >= SECONDS_BETWEEN_LINES and self._done < self._total:
            self._printed = now
            rate = self._done / max(now - self._started, 1e-9)
            left = (self._total - self._done) / max(rate, 1e-9)
            self._reporter.progress(f"{self._counts()}, {rate:.1f} {self._unit}s/s, {_duration(left)} left")

    def total(self, total: int) -> None:
        self._total = total

    def finish(self) -> None:
        if self._done:
            self._reporter.progress(f"{self._counts()} in {_duration(time.monotonic() - self._started)}")

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


def _difference_row(item: Mapping[str, Any]) -> list[str | Text]:
    difference = item["difference"]
    return [
        item["metric"],
        str(item["n"]),
        f"{item['before']:.4f}",
        f"{item['after']:.4f}",
        f"{difference['mean']:+.4f}",
        f"[{difference['low']:+.4f}, {difference['high']:+.4f}]",
        Text(item["verdict"], style=VERDICT_STYLES.get(item["verdict"], "")),
    ]


def _evaluation_rows(metrics: Mapping[str, Any]) -> list[list[str | Text]]:
    return [
        [name, str(item["n"]), f"{item['mean']:.4f}", f"[{item['low']:.4f}, {item['high']:.4f}]"]
        for name, item in metrics.items()
    ]


def _loaded_value(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value / 2**20:.0f} MiB" if name.endswith("_bytes") else str(value)


def _default(row: Mapping[str, Any]) -> str:
    return "required" if row["required"] else str(row["default"])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
