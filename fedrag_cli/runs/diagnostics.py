"""What the log tells about a training beside its loss: collected for plots, summary and model card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedrag_cli.runs.markdown import table
from fedrag_cli.runs.metrics_log import latest_by_step
from fedrag_cli.text import markdown_code, markdown_text

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
