"""Draws what the log of a run tells, as PNG files, and holds what all pictures have in common.

matplotlib is imported where something is drawn, and never through pyplot, whose windows and settings are global.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrag_cli.reports.diagnostics import moved_modules, step_values
from fedrag_cli.runs.files import write_bytes_atomically
from fedrag_cli.runs.metrics_log import Points, latest_by_step, values_by_phase
from fedrag_cli.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's colours, which stay apart for colour-blind eyes.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
LINE_COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9")
LINE_MARKERS = ("o", "s", "^", "D", "v", "P")
DOTS_PER_INCH = 150
# Below this many points a smoothed line would hide more than it shows.
FEWEST_POINTS_TO_SMOOTH = 20
LONGEST_LABEL = 60
WHOSE = {"clients": "clients' validation questions", "server": "server's questions"}


def new_panels(
    count: int, most_columns: int, margin: tuple[float, float], panel: tuple[float, float], **options: Any
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure and its panels, row by row.

    Args:
        count: Number of panels.
        most_columns: How many of them stand in a row at most.
        margin: Width and height in inches beside the panels.
        panel: Width and height in inches of each.
        options: Options of matplotlib's `Figure.subplots`.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(count, most_columns)
    rows = math.ceil(count / columns)
    size = (margin[0] + panel[0] * columns, margin[1] + panel[1] * rows)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for unused in panels[count:]:
        unused.set_visible(False)
    return figure, panels[:count]


def tidy(axes: Axes, *, title: str = "", title_size: int = 11, counts: str = "") -> None:
    """Give a panel its title and grid lines, and take the frame's upper and right line away.

    Args:
        axes: The panel.
        title: Its title.
        title_size: The title's size in points.
        counts: What x counts, such as steps; empty where x is a measured value, and y names rows.
    """
    from matplotlib.ticker import MaxNLocator

    # Where the title's place is given, matplotlib does not look for one beside everything else, which takes long.
    axes.set_title(title, fontsize=title_size, y=1.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.xaxis.grid(True, color="#E5E5E5", linewidth=0.8)
    if counts:
        axes.yaxis.grid(True, color="#E5E5E5", linewidth=0.8)
        axes.set_xlabel(counts)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_lines(axes: Axes, lines: Iterable[tuple[str, Points]], *, smooth: bool = False) -> None:
    """Draw labelled lines; one without points keeps its colour for other panels, and smooth ones show a mean."""
    for position, (label, points) in enumerate(lines):
        colour = LINE_COLOURS[position % len(LINE_COLOURS)]
        marker = LINE_MARKERS[position % len(LINE_MARKERS)]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        if smooth and len(points) >= FEWEST_POINTS_TO_SMOOTH:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, running_mean(values), color=colour, linewidth=2, label=label)
        else:
            size = 4 if smooth else 5
            axes.plot(steps, values, color=colour, marker=marker, markersize=size, linewidth=1.6, label=label)


def draw_legend(axes: Axes) -> None:
    """Name a panel's lines in it."""
    axes.legend(frameon=False, fontsize=9)


def running_mean(values: Sequence[float]) -> list[float]:
    """Average each value with its neighbours, a twentieth of all; at the ends, with those that there are."""
    half = max(5, len(values) // 20) // 2
    neighbours = (values[max(0, position - half) : position + half + 1] for position in range(len(values)))
    return [sum(group) / len(group) for group in neighbours]


def label_of(text: str) -> str:
    """Return a foreign text, such as a client's or a group's name, as a picture may show it: without mathematics."""
    shown = printable(text, LONGEST_LABEL).replace("$", r"\$")
    # matplotlib leaves labels out that begin with an underscore.
    return f" {shown}" if shown.startswith("_") else shown


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file."""
    write_bytes_atomically(path, picture_of(figure))


def picture_of(figure: Figure, format: str = "png", metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a figure as the content of a file, which says of itself what the metadata say."""
    # By itself, matplotlib lays a figure out by drawing it once more.
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)
        figure.set_layout_engine(None)
    content = io.BytesIO()
    figure.savefig(content, format=format, dpi=DOTS_PER_INCH, metadata=dict(metadata or {}))
    return content.getvalue()


def plot_log(events: Sequence[Mapping[str, Any]], directory: Path) -> list[Path]:
    """Draw all that a run's log has something of, and return the files."""
    written = plot_curves(events, directory)
    for name, plot in (
        ("diagnostics.png", plot_diagnostics),
        ("movement.png", plot_movement),
        ("federation.png", plot_federation),
    ):
        if plot(events, directory / name):
            written.append(directory / name)
    return written


def plot_curves(events: Iterable[Mapping[str, Any]], directory: Path | str) -> list[Path]:
    """Draw the curves of a run's log, one panel a phase, and return the files.

    - `loss.png`: the training loss of each step, faint, with a running mean; the validation loss as markers.
    - `validation.png`: the other validation metrics, where there are any.
    - `learning_rate.png`: the course of the learning rate.

    Steps that a resumed run repeated are drawn once, and values that are not finite are left out.
    """
    log = list(events)
    steps, validations = latest_by_step(log, "train_step"), latest_by_step(log, "validation")
    training = values_by_phase(steps, lambda event: {"training": event.get("loss")})
    validation = values_by_phase(validations, lambda event: {"validation": event["metrics"].get("loss")})
    losses = {
        phase: training.get(phase, {}) | validation.get(phase, {}) for phase in dict.fromkeys([*training, *validation])
    }
    metrics = values_by_phase(
        validations, lambda event: {name: value for name, value in event["metrics"].items() if name != "loss"}
    )
    rates = values_by_phase(steps, lambda event: {"learning rate": event.get("learning_rate")})
    drawings: list[tuple[str, str, dict[str, dict[str, Points]], Callable[[Axes, dict[str, Points]], None]]] = [
        ("loss.png", "loss", losses, _draw_loss),
        ("validation.png", "validation metric", metrics, _draw_metrics),
        ("learning_rate.png", "learning rate", rates, _draw_learning_rate),
    ]
    written = []
    for name, y_label, curves_of_phase, draw in drawings:
        if not curves_of_phase:
            continue
        figure, panels = new_panels(len(curves_of_phase), 2, (0.8, 0), (5.2, 3.6))
        for axes, (phase, curves) in zip(panels, curves_of_phase.items(), strict=True):
            draw(axes, curves)
            axes.set_ylabel(y_label)
            tidy(axes, title=phase, counts="step")
        save_figure(figure, Path(directory) / name)
        written.append(Path(directory) / name)
    return written


def _draw_loss(axes: Axes, curves: dict[str, Points]) -> None:
    if training := curves.get("training"):
        steps, losses = zip(*training, strict=True)
        if len(training) < FEWEST_POINTS_TO_SMOOTH:
            axes.plot(steps, losses, color=BLUE, linewidth=1.8, marker="o", markersize=4, label="training")
        else:
            axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8, label="training, each step")
            axes.plot(steps, running_mean(losses), color=BLUE, linewidth=2, label="training, running mean")
    if validation := curves.get("validation"):
        steps, losses = zip(*validation, strict=True)
        axes.plot(steps, losses, "--", color=ORANGE, linewidth=1, marker="D", markersize=6, label="validation")
    draw_legend(axes)


def _draw_metrics(axes: Axes, curves: dict[str, Points]) -> None:
    draw_lines(axes, curves.items())
    draw_legend(axes)


def _draw_learning_rate(axes: Axes, curves: dict[str, Points]) -> None:
    steps, rates = zip(*curves["learning rate"], strict=True)
    marker = "o" if len(steps) < FEWEST_POINTS_TO_SMOOTH else ""
    axes.plot(steps, rates, color=BLUE, linewidth=1.8, marker=marker, markersize=4)
    axes.set_ylim(0, max(*rates, 1e-12) * 1.08)
    axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.3g}")


# Each panel: its title, its unit, the largest value it can have (None where there is none), and its lines.
_DIAGNOSTICS: tuple[tuple[str, str, float | None, dict[str, str]], ...] = (
    ("gradient norm", "L2 norm", None, {"grad_norm": "gradient norm"}),
    ("LM and retriever disagree", "share of examples", 1.0, {"lm_disagrees": "disagree"}),
    ("entropy over the passages", "nats", None, {"retriever_entropy": "retriever", "lm_entropy": "language model"}),
    ("supervised tokens", "share of all tokens", 1.0, {"supervised_share": "supervised"}),
)


def plot_diagnostics(events: Iterable[Mapping[str, Any]], path: Path) -> bool:
    """Draw the diagnostics of the steps, a row of panels for each phase; return whether there were any."""
    phases = step_values(events)
    rows = {phase: [panel for panel in _DIAGNOSTICS if panel[3].keys() & values] for phase, values in phases.items()}
    if not rows:
        return False
    columns = max(len(panels) for panels in rows.values())
    figure, grid = new_panels(columns * len(rows), columns, (0.8, 0), (4.4, 3.4))
    for number, (phase, panels) in enumerate(rows.items()):
        row = grid[number * columns : (number + 1) * columns]
        for unused in row[len(panels) :]:
            unused.set_visible(False)
        for axes, (title, unit, top, names) in zip(row, panels, strict=False):
            lines = [(label, phases[phase].get(name, [])) for name, label in names.items()]
            draw_lines(axes, lines, smooth=True)
            highest = max(value for _, points in lines for _, value in points)
            # All axes start at 0, so that heights can be compared; a share that comes near 1 is shown as a part of 1.
            axes.set_ylim(0, 1.03 * top if top is not None and highest > top / 2 else 1.1 * highest or 1.0)
            if len(lines) > 1:
                draw_legend(axes)
            axes.set_ylabel(unit)
            tidy(axes, title=f"{phase}: {title}", counts="step")
    save_figure(figure, path)
    return True


def plot_movement(events: Iterable[Mapping[str, Any]], path: Path) -> bool:
    """Draw how far each phase moved each module, relative to its weights before; return whether there were any."""
    phases = moved_modules(events)
    if not phases:
        return False
    most = max(len(modules) for modules in phases.values())
    figure, panels = new_panels(len(phases), 2, (0.8, 0), (5.6, 1.3 + 0.27 * most))
    for axes, (phase, modules) in zip(panels, phases.items(), strict=True):
        shares = [100 * (moved["relative"] or 0.0) for moved in modules.values()]
        rows = range(len(shares))
        axes.barh(rows, shares, height=0.7, color=BLUE)
        for row, (share, moved) in enumerate(zip(shares, modules.values(), strict=True)):
            note = f"{share:.2g} %" if moved["relative"] is not None else f"from 0 by {moved['distance']:.2g}"
            axes.annotate(note, (share, row), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_yticks(rows, list(modules), fontsize=8.5)
        axes.set_xlim(0, 1.18 * max(shares) or 1)
        axes.set_xlabel("L2 distance, in % of the norm of the trained weights before")
        axes.tick_params(axis="y", length=0)
        # The first module belongs at the top; matplotlib counts upwards. Bars are equally thick in all panels.
        axes.set_ylim(most - 0.4, -0.6)
        tidy(axes, title=phase)
    save_figure(figure, path)
    return True


def plot_federation(events: Iterable[Mapping[str, Any]], path: Path) -> bool:
    """Draw the rounds of a federation; return whether there were any.

    The first panel has each client's training loss, with a cross where an update was refused; one panel follows for
    each metric of the global model. Rounds that were repeated after a restart are drawn once.
    """
    losses: dict[str, dict[int, float]] = {}
    metrics: dict[str, dict[str, dict[int, float]]] = {}
    refused = set()
    for event in events:
        if event["event"] == "client_update":
            if not event["accepted"]:
                refused.add(event["round"])
            elif event["metrics"].get("loss") is not None:
                losses.setdefault(event["client"], {})[event["round"]] = event["metrics"]["loss"]
        elif event["event"] == "federated_evaluation":
            for name, value in event["metrics"].items():
                if value is not None:
                    of_metric = metrics.setdefault(name, {})
                    of_metric.setdefault(WHOSE[event["by"]], {})[event["round"]] = value
    series = {"training loss of the clients": dict(sorted(losses.items()))} if losses else {}
    series |= metrics
    if not series:
        return False
    figure, panels = new_panels(len(series), 2, (0.8, 0), (5.2, 3.6))
    for axes, (label, values) in zip(panels, series.items(), strict=True):
        draw_lines(axes, [(label_of(name), sorted(rounds.items())) for name, rounds in values.items()])
        axes.set_ylabel(label)
        tidy(axes, counts="round")
    if losses and refused:
        top = max(loss for rounds in losses.values() for loss in rounds.values())
        marks = sorted(refused)
        panels[0].plot(marks, [top] * len(marks), "x", color=ORANGE, markersize=9, label="an update was refused")
    for axes in panels:
        draw_legend(axes)
    save_figure(figure, path)
    return True
