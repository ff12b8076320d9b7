"""Draws ways of tuning beside each other: untuned, each site alone, federated, pooled; a panel a metric."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedrag_cli.runs.plots import LINE_COLOURS, label_of, new_figure, save_figure, tidy

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
