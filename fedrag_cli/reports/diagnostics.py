"""What the log tells about a training beside its loss: collected for plots, summary and model card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrag_cli.reports.plots import (
    FEWEST_POINTS_TO_SMOOTH,
    LINE_COLOURS,
    LINE_MARKERS,
    new_figure,
    running_mean,
    save_figure,
    tidy,
)
from fedrag_cli.runs.metrics_log import latest_by_step
from fedrag_cli.text import markdown_code, markdown_text, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# The fields of `train_step` that are diagnostics, and what they are.
LABELS = {
    "grad_norm": "gradient norm",
    "lm_disagrees": "share where the LM's best passage is another than the retriever's",
    "retriever_entropy": "entropy of the retriever over the passages (nats)",
    "lm_entropy": "entropy of the LM over the passages (nats)",
    "supervised_share": "supervised share of all tokens",
}
MOST_PHASES = 6
"""Of more phases, as a federation of many rounds has, the last ones are shown."""
_MOST_MODULES = 5

Points = list[tuple[float, float]]


def step_values(events: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Points]]:
    """Collect the diagnostics of the steps.

    Args:
        events: The events of a run's log; steps that a resumed run repeated count once.

    Returns:
        By phase and name the points (step, value); values that are missing or not finite are left out.
    """
    found: dict[str, dict[str, Points]] = {}
    for event in latest_by_step(events, "train_step"):
        for name in LABELS:
            value = event.get(name)
            if value is not None and math.isfinite(value):
                phase = found.setdefault(event.get("phase", ""), {})
                phase.setdefault(name, []).append((float(event["step"]), float(value)))
    return dict(list(found.items())[-MOST_PHASES:])


def moved_modules(events: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return how far each phase moved each module, from its last event `moved`.

    Args:
        events: The events of a run's log.

    Returns:
        By phase and module `distance` and `relative`, in the order of the model.
    """
    found = {event.get("phase", ""): dict(event["modules"]) for event in events if event.get("event") == "moved"}
    return dict(list(found.items())[-MOST_PHASES:])


def summarise(events: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the diagnostics of a run for its summary.

    Args:
        events: The events of the run's log.

    Returns:
        By phase: `steps`, with the mean of each value over the first and over the last fifth of the steps, and
        `moved`, the modules that moved most for their size. Empty for a log without any.
    """
    log = list(events)
    values, moved = step_values(log), moved_modules(log)
    return {
        phase: {
            "steps": {name: _first_and_last(points) for name, points in values.get(phase, {}).items()},
            "moved": _most(moved.get(phase, {})),
        }
        for phase in dict.fromkeys([*values, *moved])
    }


def diagnostics_section(diagnostics: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the section of the model card.

    Args:
        diagnostics: As `summarise` gives them.

    Returns:
        Markdown; empty where there is nothing.
    """
    if not diagnostics:
        return ""
    rows = [
        [phase, LABELS[name], f"{change['first']:.4g}", f"{change['last']:.4g}"]
        for phase, part in diagnostics.items()
        for name, change in part["steps"].items()
    ]
    moved = [
        f"- {markdown_text(phase)}: {', '.join(_movement(item) for item in part['moved'])}"
        for phase, part in diagnostics.items()
        if part["moved"]
    ]
    parts = ["## Diagnostics"]
    if rows:
        parts.append("Means over the first and over the last fifth of the steps:")
        parts.append(table(["Phase", "Value", "First", "Last"], rows, numbers=(2, 3)))
    if moved:
        parts.append("What moved most, as the L2 distance relative to the norm of its trained weights before:")
        parts.append("\n".join(moved))
    return "\n\n".join(parts)


def _movement(item: Mapping[str, Any]) -> str:
    return f"{markdown_code(item['module'])} {100 * item['relative']:.3g} %"


def _first_and_last(points: Points) -> dict[str, float]:
    fifth = math.ceil(len(points) / 5)
    values = [value for _, value in points]
    return {"first": _mean(values[:fifth]), "last": _mean(values[-fifth:])}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _most(modules: Mapping[str, Mapping[str, float | None]]) -> list[dict[str, Any]]:
    known: list[dict[str, Any]] = [{"module": name, **moved} for name, moved in modules.items() if moved["relative"]]
    return sorted(known, key=lambda item: float(item["relative"]), reverse=True)[:_MOST_MODULES]


# Each panel: its title, its unit, the largest value it can have (None where there is none), and its lines.
_PANELS: tuple[tuple[str, str, float | None, dict[str, str]], ...] = (
    ("gradient norm", "L2 norm", None, {"grad_norm": "gradient norm"}),
    ("LM and retriever disagree", "share of examples", 1.0, {"lm_disagrees": "disagree"}),
    ("entropy over the passages", "nats", None, {"retriever_entropy": "retriever", "lm_entropy": "language model"}),
    ("supervised tokens", "share of all tokens", 1.0, {"supervised_share": "supervised"}),
)


def plot_diagnostics(events: Iterable[Mapping[str, Any]], path: Path) -> bool:
    """Draw the diagnostics of the steps, a row of panels for each phase.

    Args:
        events: The events of the run's log.
        path: The PNG file.

    Returns:
        Whether there was anything to draw.

    Raises:
        FedRAGError: The file cannot be written.
    """
    phases = step_values(events)
    rows = {phase: [panel for panel in _PANELS if panel[3].keys() & values] for phase, values in phases.items()}
    if not rows:
        return False
    columns = max(len(panels) for panels in rows.values())
    figure = new_figure((0.8 + 4.4 * columns, 3.4 * len(rows)))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes_of_row, (phase, panels) in zip(grid, rows.items(), strict=True):
        for axes, (title, unit, top, lines) in zip(axes_of_row, panels, strict=False):
            _draw_steps(axes, phases[phase], lines, top)
            axes.set_title(f"{phase}: {title}", fontsize=11)
            axes.set_ylabel(unit)
        for axes in axes_of_row[len(panels) :]:
            axes.set_visible(False)
    save_figure(figure, path)
    return True


def plot_movement(events: Iterable[Mapping[str, Any]], path: Path) -> bool:
    """Draw how far each phase moved each module, relative to its weights before, as bars in the order of the model.

    Args:
        events: The events of the run's log.
        path: The PNG file.

    Returns:
        Whether there was anything to draw.

    Raises:
        FedRAGError: The file cannot be written.
    """
    phases = moved_modules(events)
    if not phases:
        return False
    columns = min(2, len(phases))
    lines = -(-len(phases) // columns)
    most = max(len(modules) for modules in phases.values())
    figure = new_figure((0.8 + 5.6 * columns, lines * (1.3 + 0.27 * most)))
    grid = list(figure.subplots(lines, columns, squeeze=False).flatten())
    for axes, (phase, modules) in zip(grid, phases.items(), strict=False):
        _draw_movement(axes, modules)
        # The first module belongs at the top; matplotlib counts upwards. Bars are equally thick in all panels.
        axes.set_ylim(most - 0.4, -0.6)
        axes.set_title(phase, fontsize=11)
    for axes in grid[len(phases) :]:
        axes.set_visible(False)
    save_figure(figure, path)
    return True


def _draw_steps(axes: Axes, values: Mapping[str, Points], lines: Mapping[str, str], top: float | None) -> None:
    from matplotlib.ticker import MaxNLocator

    for position, (name, text) in enumerate(lines.items()):
        if name in values:
            _draw_line(axes, values[name], text, position)
    highest = max(value for name in lines for _, value in values.get(name, []))
    # All axes start at 0, so that heights can be compared; a share that comes near 1 is shown as a part of 1.
    axes.set_ylim(0, 1.03 * top if top is not None and highest > top / 2 else 1.1 * highest or 1.0)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=9)
    tidy(axes, grid="both")


def _draw_line(axes: Axes, points: Points, text: str, position: int) -> None:
    colour = LINE_COLOURS[position % len(LINE_COLOURS)]
    steps, values = zip(*points, strict=True)
    if len(points) < FEWEST_POINTS_TO_SMOOTH:
        marker = LINE_MARKERS[position % len(LINE_MARKERS)]
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=4, label=text)
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    smooth = running_mean(values, window=max(5, len(values) // 20))
    axes.plot(steps, smooth, color=colour, linewidth=2, label=text)


def _draw_movement(axes: Axes, modules: Mapping[str, Mapping[str, float | None]]) -> None:
    names: Sequence[str] = list(modules)
    shares = [100 * (moved["relative"] or 0.0) for moved in modules.values()]
    rows = range(len(names))
    axes.barh(rows, shares, height=0.7, color=LINE_COLOURS[0])
    for row, (share, moved) in enumerate(zip(shares, modules.values(), strict=True)):
        note = f"{share:.2g} %" if moved["relative"] is not None else f"from 0 by {moved['distance']:.2g}"
        axes.annotate(note, (share, row), (4, 0), textcoords="offset points", verticalalignment="center", fontsize=8)
    axes.set_yticks(rows, names, fontsize=8.5)
    axes.set_xlim(0, 1.18 * max(shares) or 1)
    axes.set_xlabel("L2 distance, in % of the norm of the trained weights before")
    axes.tick_params(axis="y", length=0)
    tidy(axes, grid="x")
