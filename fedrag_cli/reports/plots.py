"""Draws a run's curves and what the run changed, as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrag_cli.config.fields import METRIC_UNBOUNDED
from fedrag_cli.errors import FedRAGError
from fedrag_cli.runs.files import write_bytes_atomically
from fedrag_cli.runs.metrics_log import latest_by_step
from fedrag_cli.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine


# Okabe and Ito's colours, which stay apart for colour-blind eyes.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
REFUSED_COLOUR = _ORANGE
LINE_COLOURS = (_BLUE, _ORANGE, _GREEN, "#CC79A7", "#E69F00", "#56B4E9")
LINE_MARKERS = ("o", "s", "^", "D", "v", "P")
VERDICT_COLOURS = {"better": _GREEN, "worse": _ORANGE, "no difference shown": _GREY}
_DOTS_PER_INCH = 150
# Below this many points a smoothed line would hide more than it shows.
FEWEST_POINTS_TO_SMOOTH = 20

Points = list[tuple[float, float]]
LONGEST_LABEL = 60


def plot_curves(events: Iterable[Mapping[str, Any]], directory: Path | str) -> list[Path]:
    """Draw the curves of a run, one panel a phase.

    - `loss.png`: the training loss of each step, faint, with a running mean; the validation loss as markers.
    - `validation.png`: the other validation metrics, where there are any.
    - `learning_rate.png`: the course of the learning rate.

    Steps that a resumed run repeated are drawn once, and values that are not finite are left out.

    Args:
        events: The events of the run's log: `train_step` with `phase`, `step`, `loss` and `learning_rate`, and
            `validation` with `phase`, `step` and `metrics`. Others are passed over.
        directory: Where the files go; it is made where it is missing.

    Returns:
        The files that were written; none for a log without such events.

    Raises:
        DataError: If an event has no step.
        FedRAGError: If a file cannot be written.
    """
    log = list(events)
    steps = latest_by_step(log, "train_step")
    validations = latest_by_step(log, "validation")
    training_loss = _points(steps, lambda event: {"training": event.get("loss")})
    learning_rate = _points(steps, lambda event: {"learning rate": event.get("learning_rate")})
    validation_loss = _points(validations, lambda event: {"validation": event["metrics"].get("loss")})
    validation_metrics = _points(
        validations, lambda event: {name: value for name, value in event["metrics"].items() if name != "loss"}
    )

    loss_curves = {
        phase: training_loss.get(phase, {}) | validation_loss.get(phase, {})
        for phase in dict.fromkeys([*training_loss, *validation_loss])
    }
    drawings: list[tuple[str, dict[str, dict[str, Points]], str, Callable[[Axes, dict[str, Points]], None]]] = [
        ("loss.png", loss_curves, "loss", _draw_loss),
        ("validation.png", validation_metrics, "validation metric", _draw_metrics),
        ("learning_rate.png", learning_rate, "learning rate", _draw_learning_rate),
    ]
    written = []
    for name, curves_of_phase, y_label, draw in drawings:
        if curves_of_phase:
            path = Path(directory) / name
            save_figure(_panels(curves_of_phase, y_label, draw), path)
            written.append(path)
    return written


def plot_difference(differences: Sequence[Mapping[str, Any]], path: Path | str) -> None:
    """Draw what a run changed: each metric before and after, and the difference with its interval.

    Args:
        differences: For each metric `metric`, `n`, `before`, `after`, `difference` (with `mean`, `low` and `high`),
            `verdict` and `confidence`, as `MetricDifference.to_dict` gives them. At least one.
        path: The PNG file.

    Raises:
        FedRAGError: If there is no difference to draw, or the file cannot be written.
    """
    if not differences:
        raise FedRAGError("There is no difference to draw.", "Evaluate at least one metric before and after.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.5 + 0.55 * len(differences)), layout=_spaced_layout())
    values, changes = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.1))
    rows = range(len(differences))
    _draw_before_and_after(values, differences)
    _draw_differences(changes, differences)
    values.set_yticks(rows, [_metric_label(item) for item in differences], fontsize=9)
    # The first metric belongs at the top; matplotlib counts upwards.
    values.set_ylim(len(differences) - 0.4, -0.6)
    values.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, fontsize=9, borderaxespad=0.3)
    save_figure(figure, Path(path))


def _points(
    events: Iterable[Mapping[str, Any]], values_of: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> dict[str, dict[str, Points]]:
    """Collect, for each phase and name, the points (step, value) whose value is a finite number."""
    curves: dict[str, dict[str, Points]] = {}
    for event in events:
        for name, value in values_of(event).items():
            if value is not None and math.isfinite(value):
                phase = curves.setdefault(event.get("phase", ""), {})
                phase.setdefault(name, []).append((float(event["step"]), float(value)))
    return curves


def _panels(
    curves_of_phase: Mapping[str, dict[str, Points]],
    y_label: str,
    draw: Callable[[Axes, dict[str, Points]], None],
) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(2, len(curves_of_phase))
    rows = math.ceil(len(curves_of_phase) / columns)
    figure = Figure(figsize=(0.8 + 5.2 * columns, 3.6 * rows), layout=_spaced_layout())
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (phase, curves) in zip(grid, curves_of_phase.items(), strict=False):
        draw(axes, curves)
        axes.set_title(phase, fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes, grid="both")
    for axes in grid[len(curves_of_phase) :]:
        axes.set_visible(False)
    return figure


def _draw_loss(axes: Axes, curves: dict[str, Points]) -> None:
    if training := curves.get("training"):
        steps, losses = zip(*training, strict=True)
        if len(training) < FEWEST_POINTS_TO_SMOOTH:
            axes.plot(steps, losses, color=_BLUE, linewidth=1.8, marker="o", markersize=4, label="training")
        else:
            axes.plot(steps, losses, color=_BLUE, alpha=0.25, linewidth=0.8, label="training, each step")
            smooth = running_mean(losses, window=max(5, len(losses) // 20))
            axes.plot(steps, smooth, color=_BLUE, linewidth=2, label="training, running mean")
    if validation := curves.get("validation"):
        steps, losses = zip(*validation, strict=True)
        axes.plot(
            steps, losses, color=_ORANGE, linestyle="--", linewidth=1, marker="D", markersize=6, label="validation"
        )
    axes.legend(frameon=False, fontsize=9)


def _draw_metrics(axes: Axes, curves: dict[str, Points]) -> None:
    for position, (name, points) in enumerate(curves.items()):
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps,
            values,
            color=LINE_COLOURS[position % len(LINE_COLOURS)],
            marker=LINE_MARKERS[position % len(LINE_MARKERS)],
            markersize=5,
            linewidth=1.6,
            label=name,
        )
    axes.legend(frameon=False, fontsize=9)


def _draw_learning_rate(axes: Axes, curves: dict[str, Points]) -> None:
    from matplotlib.ticker import FuncFormatter

    steps, rates = zip(*curves["learning rate"], strict=True)
    marker = "o" if len(steps) < FEWEST_POINTS_TO_SMOOTH else ""
    axes.plot(steps, rates, color=_BLUE, linewidth=1.8, marker=marker, markersize=4)
    axes.set_ylim(0, max(*rates, 1e-12) * 1.08)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.3g}"))


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Average each value with its neighbours; at the ends, with those that there are."""
    half = window // 2
    neighbours = (values[max(0, position - half) : position + half + 1] for position in range(len(values)))
    return [sum(group) / len(group) for group in neighbours]


def _draw_before_and_after(axes: Axes, differences: Sequence[Mapping[str, Any]]) -> None:
    rows = range(len(differences))
    before = [item["before"] for item in differences]
    after = [item["after"] for item in differences]
    axes.hlines(rows, before, after, color="#BBBBBB", linewidth=2, zorder=1)
    # A ring around a smaller dot shows both where nothing changed.
    axes.scatter(before, rows, s=80, facecolor="white", edgecolor=_GREY, linewidth=1.6, label="before", zorder=2)
    axes.scatter(after, rows, s=35, color=_BLUE, label="after", zorder=3)
    axes.margins(x=0.12)
    axes.set_xlabel("mean over the questions")
    tidy(axes, grid="x")


def _draw_differences(axes: Axes, differences: Sequence[Mapping[str, Any]]) -> None:
    axes.axvline(0, color="black", linewidth=1)
    for row, item in enumerate(differences):
        colour = VERDICT_COLOURS[item["verdict"]]
        mean, low, high = (item["difference"][name] for name in ("mean", "low", "high"))
        axes.hlines(row, low, high, color=colour, linewidth=2.5)
        axes.plot(mean, row, color=colour, marker="o", markersize=7)
        axes.text(
            1.02,
            row,
            f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]\n{item['verdict']}",
            transform=axes.get_yaxis_transform(),
            verticalalignment="center",
            fontsize=8.5,
            color=colour,
        )
    axes.margins(x=0.08)
    axes.set_xlabel(f"after - before, with {_percent(differences)} interval")
    axes.tick_params(axis="y", length=0)
    tidy(axes, grid="x")


def _metric_label(item: Mapping[str, Any]) -> str:
    return f"{item['metric']} (n = {item['n']})\n{item['before']:.3f} \N{RIGHTWARDS ARROW} {item['after']:.3f}"


def _percent(differences: Sequence[Mapping[str, Any]]) -> str:
    levels = sorted({item["confidence"] for item in differences})
    return " or ".join(f"{100 * level:g} %" for level in levels)


def _spaced_layout() -> ConstrainedLayoutEngine:
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)


def new_figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure of a size in inches, with room around its panels."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout=_spaced_layout())


def label_of(text: str) -> str:
    """Return a foreign text, such as a client's or a group's name, as a picture may show it: without mathematics."""
    shown = printable(text, LONGEST_LABEL).replace("$", r"\$")
    # matplotlib leaves labels out that begin with an underscore.
    return f" {shown}" if shown.startswith("_") else shown


def tidy(axes: Axes, grid: str) -> None:
    """Take the frame's upper and right line away, and draw grid lines along x, y or both."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if grid in ("x", "both"):
        axes.xaxis.grid(True, color="#E5E5E5", linewidth=0.8)
    if grid in ("y", "both"):
        axes.yaxis.grid(True, color="#E5E5E5", linewidth=0.8)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file."""
    write_bytes_atomically(path, png_of(figure))


def png_of(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    return picture_of(figure, "png", {})


def picture_of(figure: Figure, format: str, metadata: Mapping[str, str]) -> bytes:
    """Return a figure as the content of a file.

    Args:
        figure: The figure.
        format: png, pdf or svg.
        metadata: What the file says of itself, by matplotlib's names for the format.
    """
    content = io.BytesIO()
    figure.savefig(content, format=format, dpi=_DOTS_PER_INCH, metadata=dict(metadata))
    return content.getvalue()


ALL = "all"


def plot_evaluation(summary: Mapping[str, Any], path: Path) -> None:
    """Draw an evaluation's metrics as dots with intervals, a panel a metric, a row a group.

    Args:
        summary: `metrics` and `groups` with `mean`, `low`, `high` and `n`, and the `confidence`.
        path: The PNG file.
    """
    metrics = list(summary["metrics"])
    rows = {ALL: summary["metrics"], **summary["groups"]}
    figure = new_figure((1.8 + 2.9 * min(len(metrics), 4), 1.4 + 0.32 * len(rows) * -(-len(metrics) // 4)))
    columns = min(len(metrics), 4)
    panels = figure.subplots(-(-len(metrics) // 4), columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(metrics) :]:
        panel.set_visible(False)
    labels = list(rows)
    for number, (panel, metric) in enumerate(zip(panels.flat, metrics, strict=False)):
        for place, name in enumerate(labels):
            found = rows[name].get(metric)
            if found is None:
                continue
            colour = LINE_COLOURS[0] if name == ALL else LINE_COLOURS[2]
            panel.hlines(place, found["low"], found["high"], color=colour, linewidth=2.5)
            panel.plot(found["mean"], place, color=colour, marker="o", markersize=6)
        panel.set_title(f"{metric}  {summary['metrics'][metric]['mean']:.3f}", fontsize=10)
        panel.set_yticks(range(len(labels)), [_label(name, rows[name], metrics) for name in labels], fontsize=9)
        panel.set_ylim(len(labels) - 0.5, -0.5)
        if metric not in METRIC_UNBOUNDED:
            panel.set_xlim(-0.02, 1.02)
        if number % columns == 0:
            panel.set_xlabel(f"mean, {100 * summary['confidence']:g} % interval", fontsize=8)
        tidy(panel, grid="x")
    save_figure(figure, path)


def _label(name: str, found: Mapping[str, Any], metrics: list[str]) -> str:
    counts = [found[metric]["n"] for metric in metrics if metric in found]
    return f"{label_of(name)} (n = {max(counts)})" if counts else label_of(name)


MOST_COLUMNS = 3
COLOURS = {"untuned": "#6E6E6E", "federated": LINE_COLOURS[0], "pooled": LINE_COLOURS[2]}


def plot_baselines(comparison: Mapping[str, Any], path: Path) -> None:
    """Draw each way's metrics with their intervals, and write the paired difference to the untuned model beside them.

    Args:
        comparison: `rows` with `name`, `metrics` and `to_untuned`, and the `confidence`.
        path: The PNG file.
    """
    rows = comparison["rows"]
    metrics = list(rows[0]["metrics"])
    columns = min(len(metrics), MOST_COLUMNS)
    lines = -(-len(metrics) // columns)
    figure = new_figure((2.2 + 3.6 * columns, lines * (1.1 + 0.36 * len(rows))))
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(metrics) :]:
        panel.set_visible(False)
    for panel, metric in zip(panels.flat, metrics, strict=False):
        for place, row in enumerate(rows):
            found = row["metrics"][metric]
            colour = COLOURS.get(row["name"], LINE_COLOURS[4])
            panel.hlines(place, found["low"], found["high"], color=colour, linewidth=2.2)
            panel.plot(found["mean"], place, "o", color=colour, markersize=6)
            note = f"{found['mean']:.3f}"
            if "to_untuned" in row:
                change = row["to_untuned"][metric]["difference"]
                note += f"  ({change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}])"
            panel.annotate(
                note, (found["mean"], place), xytext=(0, 6), textcoords="offset points", fontsize=7, ha="center"
            )
        panel.axvline(rows[0]["metrics"][metric]["mean"], color=COLOURS["untuned"], linewidth=0.8, linestyle=":")
        panel.set_yticks(range(len(rows)), [label_of(row["name"]) for row in rows], fontsize=9)
        panel.set_ylim(len(rows) - 0.5, -0.7)
        panel.set_title(metric, fontsize=10)
        panel.set_xlabel(
            f"mean with {100 * comparison['confidence']:g} % interval (paired difference to untuned)", fontsize=7.5
        )
        panel.margins(x=0.18)
        tidy(panel, grid="x")
    save_figure(figure, path)


WHOSE = {"clients": "clients' validation questions", "server": "server's questions"}
Series = dict[str, dict[int, float]]


def plot_federation(events: Iterable[Mapping[str, Any]], path: Path) -> bool:
    """Draw the rounds of a federation.

    The first panel has each client's training loss, with a cross where an update was refused; one panel follows for
    each metric of the global model. Rounds that were repeated after a restart are drawn once.

    Args:
        events: The events of the server's log.
        path: The PNG file.

    Returns:
        Whether there was anything to draw.

    Raises:
        FedRAGError: The file cannot be written.
    """
    losses, refused, metrics = _collect(events)
    panels = int(bool(losses)) + len(metrics)
    if not panels:
        return False
    columns = min(2, panels)
    rows = -(-panels // columns)
    figure = new_figure((0.8 + 5.2 * columns, 3.6 * rows))
    grid = list(figure.subplots(rows, columns, squeeze=False).flatten())
    if losses:
        _draw_losses(grid[0], losses, refused)
    for axes, (metric, series) in zip(grid[int(bool(losses)) :], metrics.items(), strict=False):
        _draw_series(axes, series, metric)
    for axes in grid[panels:]:
        axes.set_visible(False)
    save_figure(figure, path)
    return True


def _collect(events: Iterable[Mapping[str, Any]]) -> tuple[Series, dict[str, list[int]], dict[str, Series]]:
    losses: Series = {}
    refused: dict[str, list[int]] = {}
    metrics: dict[str, Series] = {}
    for event in events:
        if event["event"] == "client_update":
            if not event["accepted"]:
                refused.setdefault(event["client"], []).append(event["round"])
            elif event["metrics"].get("loss") is not None:
                losses.setdefault(event["client"], {})[event["round"]] = event["metrics"]["loss"]
        elif event["event"] == "federated_evaluation":
            for name, value in event["metrics"].items():
                if value is not None:
                    metrics.setdefault(name, {}).setdefault(event["by"], {})[event["round"]] = value
    return losses, refused, metrics


def _draw_losses(axes: Axes, losses: Series, refused: Mapping[str, list[int]]) -> None:
    _draw_series(axes, dict(sorted(losses.items())), "training loss of the clients")
    top = max(value for values in losses.values() for value in values.values())
    marks = sorted({number for numbers in refused.values() for number in numbers})
    if marks:
        axes.plot(marks, [top] * len(marks), "x", color=REFUSED_COLOUR, markersize=9, label="an update was refused")
        axes.legend(frameon=False, fontsize=9)


def _draw_series(axes: Axes, series: Series, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for position, (name, points) in enumerate(series.items()):
        rounds = sorted(points)
        axes.plot(
            rounds,
            [points[number] for number in rounds],
            color=LINE_COLOURS[position % len(LINE_COLOURS)],
            marker=LINE_MARKERS[position % len(LINE_MARKERS)],
            markersize=5,
            linewidth=1.6,
            label={"clients": "clients' validation questions", "server": "server's questions"}.get(
                name, label_of(name)
            ),
        )
    axes.legend(frameon=False, fontsize=9)
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes, grid="both")
