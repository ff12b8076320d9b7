"""Results and messages for people, drawn with Rich: tables on a terminal, aligned columns elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from fedrag_cli.errors import FedRAGError
from fedrag_cli.runs.reporter import epsilon_text
from fedrag_cli.text import printable, readable

if TYPE_CHECKING:
    from fedrag_cli.runs.reporter import Reporter

NO_ROOM = (
    "The context window has no room for any of the passages: raise rag_system.generator.context_window, or lower "
    "max_new_tokens."
)
WITHOUT_OVERLAP = "Take these questions out of one of the two."
LONGEST_CELL = 1000
VERDICT_STYLES = {"better": "bold green", "worse": "bold red"}


class Renderer:
    """Writes for people: results and messages to stderr, texts that are the result itself to stdout."""

    def __init__(self) -> None:
        """Find out whether stderr is a terminal; NO_COLOR is respected by Rich."""
        self.console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=False)
        self.output = Console(highlight=False, emoji=False)

    def reporter(self) -> Reporter:
        """Return a reporter with live bars on a terminal, and plain lines elsewhere."""
        from fedrag_cli.cli.progress import PlainReporter, TerminalReporter

        return TerminalReporter(self.console) if self.console.is_terminal else PlainReporter(self.console)

    def error(self, error: FedRAGError) -> None:
        """Print an error and what to do about it."""
        self.line(Text.assemble(("Error: ", "bold red"), readable(error.message)))
        if error.hint:
            self.line(Text.assemble(("What to do: ", "bold"), readable(error.hint)))

    def line(self, text: str | Text) -> None:
        """Print one line to stderr, without cutting it where there is no terminal."""
        self.console.print(_readable(text), markup=False, soft_wrap=not self.console.is_terminal)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str | Text]], *, stdout: bool = False) -> None:
        """Print a table: drawn on a terminal, aligned columns elsewhere."""
        console = self.output if stdout else self.console
        if console.is_terminal:
            # Here, because most commands show none.
            from rich.markup import escape
            from rich.table import Table

            table = Table(*(escape(readable(name)) for name in columns), header_style="bold")
            for row in rows:
                table.add_row(*(cell if isinstance(cell, Text) else Text(readable(cell)) for cell in row))
            console.print(table)
            return
        texts = [[printable(str(cell), LONGEST_CELL) for cell in row] for row in (columns, *rows)]
        widths = [max(len(row[column]) for row in texts) for column in range(len(columns))]
        for row in texts:
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            console.print(line, markup=False, soft_wrap=True)

    def text(self, text: str) -> None:
        """Print a text that is the result itself to stdout."""
        self.output.print(readable(text), markup=False, soft_wrap=True)

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
        self.overlaps(summary.get("overlaps") or ())

    def untuned(self, comparison: Mapping[str, Any]) -> None:
        """Print retrieval that needs no tuning beside the tuned system, by its first metric."""
        if not comparison:
            return
        first = [(row["name"], row["differences"][0]) for row in comparison["rows"]]
        metric, level = first[0][1]["metric"], round(100 * first[0][1]["confidence"])
        rows = [[name, *_difference_row(item)[2:]] for name, item in first]
        self.line(f"Against retrieval without tuning, by {metric}:")
        self.table(["retrieval", "untuned", "tuned", "difference", f"{level} % interval", "verdict"], rows)
        self.line(comparison["verdict"])

    def overlaps(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Print which splits share questions; nothing where none do."""
        for overlap in found:
            self.line(Text.assemble(("Warning: ", "bold yellow"), f"{overlap['message']}. {WITHOUT_OVERLAP}"))

    def truncated(self, counts: Mapping[str, int], lengths: Sequence[Mapping[str, Any]] = ()) -> None:
        """Print how much was cut and what to do about it; nothing where nothing was."""
        cut = {name: count for name, count in counts.items() if count}
        if cut:
            self.line("Truncated: " + ", ".join(f"{count} {name}" for name, count in cut.items()))
        for item in lengths:
            if item["message"]:
                self.line(item["message"])
        if any(name.endswith("contexts cut to nothing") for name in cut):
            self.line(NO_ROOM)

    def training_summary(self, summary: Mapping[str, Any]) -> None:
        """Print what a training run ended with."""
        from fedrag_cli.cli.progress import duration

        self.differences(summary)
        self.untuned(summary.get("untuned") or {})
        self.truncated(summary["truncated"], summary.get("lengths") or ())
        phases = ", ".join(f"{name} {part['loss']:.4f}" for name, part in (summary.get("phases") or {}).items())
        loss = f"mean loss {summary['loss']:.4f}" + (f" ({phases})" if phases else "")
        self.line(f"{summary['steps']} steps, {loss}, {duration(summary['seconds'])}")
        self.line(f"Everything is in {summary['run_dir']} (README.md is its model card)")
        # Without a generator there is nobody to answer.
        if "generator" in summary["fingerprints"]:
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
                epsilon_text(row),
                ", ".join(row.get("outliers", {})),
            ]
            for row in summary["rounds"]
        ]
        columns = ["round", "clients", "refused", "examples", "loss", "seconds", "epsilon", "outliers"]
        shown = [number for number in range(len(columns)) if any(row[number] for row in rows)]
        if rows:
            self.table([columns[number] for number in shown], [[row[number] for number in shown] for row in rows])
        if summary["differences"]:
            self.differences(summary)
        if summary.get("comparison"):
            self.baselines(summary["comparison"])
        self.line(f"Everything is in {summary['run_dir']} (README.md is its model card)")

    def baselines(self, comparison: Mapping[str, Any]) -> None:
        """Print ways of tuning beside each other, with their differences to the untuned and the pooled model."""
        self.line("Ways of tuning, on the same questions over the whole corpus:")
        rows = [
            [row["name"], metric, str(found["n"]), f"{found['mean']:.4f}", *_changes(row, metric)]
            for row in comparison["rows"]
            for metric, found in row["metrics"].items()
        ]
        level = round(100 * comparison["confidence"])
        columns = ["model", "metric", "n", "mean", f"to untuned, {level} %", f"to pooled, {level} %"]
        self.table(columns, rows)
        for verdict in comparison["verdicts"]:
            self.line(verdict)

    def written(self, paths: Sequence[Path], next_step: str) -> None:
        """Print which files were written, and what to do with them."""
        for path in paths:
            self.line(f"wrote {path}")
        self.line(next_step)

    def validation(self, document: Mapping[str, Any]) -> None:
        """Print that a config is right, and what was loaded."""
        self.line(f"{document['config']} is valid (mode: {document['mode']}).")
        for item in document["warnings"]:
            place = f"{item['file']}:{item['line']}" if item["line"] else item["file"]
            self.line(Text.assemble(("Warning: ", "bold yellow"), f"{place}: {item['path']}: {item['message']}"))
        loaded = dict(document.get("loaded", {}))
        self.overlaps(loaded.pop("overlaps", ()))
        self.truncated({}, loaded.pop("lengths", ()))
        for name, values in loaded.items():
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
        self.text(
            f"Tested on {', '.join(report['tested_on'])}; other systems, such as Windows and macOS, are not tested."
        )
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

    def answer(self, answer: Mapping[str, Any], *, sources: bool = True) -> None:
        """Print an answer to stdout and its sources to stderr."""
        self.text(answer["answer"])
        if answer["without_context"]:
            self.line(NO_ROOM)
        for number, source in enumerate(answer["sources"] if sources else (), start=1):
            self.line(Text(f"  [{number}] {source['id']} ({source['score']:.3f}) {source['text']}", style="dim"))

    def comparison(self, found: Mapping[str, Any]) -> None:
        """Print what runs have over the first of them."""
        level = round(100 * found["confidence"])
        columns = ["metric", "n", "baseline", "run", "difference", f"{level} % interval", "won", "lost", "verdict"]
        for item in found["comparisons"]:
            self.line(Text(f"{item['label']} against {item['baseline_label']}:", style="bold"))
            self.table(columns, [_comparison_row(difference) for difference in item["differences"]])
            if item["left_out"]:
                self.line(f"{item['left_out']} questions that only one of them was asked are left out.")
            if item["skipped_metrics"]:
                self.line(f"Measured on one side only: {', '.join(item['skipped_metrics'])}.")
            self.line(item["verdict"])

    def won_and_lost(
        self, found: Mapping[str, Any], questions: Mapping[str, Mapping[str, Mapping[str, Any]]], most: int
    ) -> None:
        """Print questions that a run answers better and worse than the baseline, by the first metric."""
        for item in found["comparisons"]:
            metric = item["differences"][0]["metric"]
            for outcome in ("won", "lost"):
                ids = item[outcome][metric]
                self.line(Text(f"{metric} {outcome}: {len(ids)} questions", style="bold"))
                for name in ids[:most]:
                    before, after = questions[item["baseline"]][name], questions[item["name"]][name]
                    self.line(f"  {before['query']}")
                    self.line(f"    {_outcome(before, metric)} -> {_outcome(after, metric)}")

    def evaluation(self, summary: Mapping[str, Any]) -> None:
        """Print the table of an evaluation."""
        rows = _evaluation_rows(summary["metrics"])
        for group, metrics in summary["groups"].items():
            rows += [[f"  {summary['group_by']} {group}: {row[0]}", *row[1:]] for row in _evaluation_rows(metrics)]
        level = round(100 * summary["confidence"])
        self.table(["metric", "n", "mean", f"{level} % interval"], rows)
        self.truncated(summary["truncated"], summary.get("lengths") or ())
        self.line(f"Everything is in {summary['run_dir']}, the questions in {summary['predictions']}")


def _readable(text: str | Text) -> str | Text:
    """Return a text fit for a terminal, with its styles unless something in it had to be made visible."""
    shown = readable(str(text))
    return text if isinstance(text, Text) and shown == text.plain else Text(shown, style=getattr(text, "style", ""))


def _comparison_row(item: Mapping[str, Any]) -> list[str | Text]:
    row = _difference_row(item)
    return [*row[:-1], str(item["won"]), str(item["lost"]), row[-1]]


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


def _changes(row: Mapping[str, Any], metric: str) -> list[str]:
    """Return a way's differences to the untuned and to the pooled model; empty where it is that model."""
    cells = []
    for other in ("to_untuned", "to_pooled"):
        change = row.get(other, {}).get(metric)
        interval = change["difference"] if change else None
        cells.append(f"{interval['mean']:+.4f} [{interval['low']:+.4f}, {interval['high']:+.4f}]" if interval else "")
    return cells


def _outcome(prediction: Mapping[str, Any], metric: str) -> str:
    said = prediction.get("chosen", prediction.get("answer"))
    value = f"{prediction['metrics'][metric]:.3f}"
    return f"{value} '{said}'" if said is not None else value


def _loaded_value(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value / 2**20:.0f} MiB" if name.endswith("_bytes") else str(value)


def _default(row: Mapping[str, Any]) -> str:
    return "required" if row["required"] else str(row["default"])
