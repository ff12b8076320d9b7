"""Draws a federation's rounds: each client's loss, and the metrics of the global model after every round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrag_cli.runs.plots import LINE_COLOURS, LINE_MARKERS, REFUSED_COLOUR, label_of, new_figure, save_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
