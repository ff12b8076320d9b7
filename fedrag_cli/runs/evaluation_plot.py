"""Draws what an evaluation found: each metric with its interval, for all questions and for each group."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedrag_cli.config.metrics import METRIC_UNBOUNDED
from fedrag_cli.runs.plots import LINE_COLOURS, label_of, new_figure, save_figure, tidy

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
