"""What the log tells about a training beside its loss: collected for plots, summary and model card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fedrag_cli.runs.metrics_log import Points, latest_by_step, values_by_phase
from fedrag_cli.text import markdown_code, markdown_text, table

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


def step_values(events: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Points]]:
    """Return the diagnostics of the steps, by phase and name."""
    steps = latest_by_step(events, "train_step")
    found = values_by_phase(steps, lambda event: {name: event.get(name) for name in LABELS})
    return dict(list(found.items())[-MOST_PHASES:])


def moved_modules(events: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return how far each phase moved each module, in the order of the model: its `distance`, and how much `relative`.

    Of the events `moved` the last one of each phase counts.
    """
    found = {event.get("phase", ""): dict(event["modules"]) for event in events if event.get("event") == "moved"}
    return dict(list(found.items())[-MOST_PHASES:])


def summarise(events: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the diagnostics of a run for its summary; nothing for a log without any.

    Returns:
        By phase: `steps`, with the mean of each value over the first and over the last fifth of the steps, and
        `moved`, the modules that moved most for their size.
    """
    log = list(events)
    values, moved = step_values(log), moved_modules(log)
    return {
        phase: {
            "steps": {name: _first_and_last(points) for name, points in values.get(phase, {}).items()},
            "moved": _most_moved(moved.get(phase, {})),
        }
        for phase in dict.fromkeys([*values, *moved])
    }


def diagnostics_section(diagnostics: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the section of the model card; nothing where `summarise` has found nothing."""
    if not diagnostics:
        return ""
    rows = [
        [phase, LABELS[name], f"{change['first']:.4g}", f"{change['last']:.4g}"]
        for phase, part in diagnostics.items()
        for name, change in part["steps"].items()
    ]
    moved = [
        f"- {markdown_text(phase)}: "
        + ", ".join(f"{markdown_code(item['module'])} {100 * item['relative']:.3g} %" for item in part["moved"])
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


def _first_and_last(points: Points) -> dict[str, float]:
    fifth = math.ceil(len(points) / 5)
    values = [value for _, value in points]
    return {"first": sum(values[:fifth]) / fifth, "last": sum(values[-fifth:]) / fifth}


def _most_moved(modules: Mapping[str, Mapping[str, float | None]]) -> list[dict[str, Any]]:
    known: list[dict[str, Any]] = [{"module": name, **moved} for name, moved in modules.items() if moved["relative"]]
    return sorted(known, key=lambda item: float(item["relative"]), reverse=True)[:_MOST_MODULES]
