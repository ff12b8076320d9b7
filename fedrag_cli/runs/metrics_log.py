"""The log of a run: `metrics.jsonl`, one event a line, only ever appended to.

A line counts once its newline is there. What follows the last newline was cut off by a kill: readers pass over it, and
the next writer removes it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedrag_cli.errors import DataError, FedRAGError
from fedrag_cli.runs.files import os_errors, whole_lines

_RESERVED = ("time", "non_finite")
Points = list[tuple[float, float]]


class MetricsLog:
    """Appends events to a log, which is made where it is missing, and whose end is removed where a kill cut it off."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            whole_lines(self.path)

    def append(self, event: str, **fields: Any) -> None:
        """Append one event, with fields made of dict, list, tuple, str, int, float, bool and None.

        JSON has no NaN and no infinity: such numbers are written as null, and `non_finite` lists their names
        (`metrics.loss` for one inside a mapping).

        Raises:
            FedRAGError: If the line cannot be written, or a field is named `time` or `non_finite`.
        """
        for name in _RESERVED:
            if name in fields:
                raise FedRAGError(f"The log writes the field '{name}' itself; name the field of '{event}' otherwise.")
        non_finite: list[str] = []
        record: dict[str, Any] = {"event": event, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        record |= {name: _finite(value, name, non_finite) for name, value in fields.items()}
        if non_finite:
            record["non_finite"] = non_finite
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        with os_errors(self.path):
            self._write(line)

    def _write(self, line: bytes) -> None:
        # One call of os.write has no buffer that a kill could lose, and O_APPEND keeps the lines of two writers whole.
        # Without O_BINARY, Windows writes other ends of lines.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        descriptor = os.open(self.path, flags, 0o644)
        try:
            # The disk takes part of a line only when it is full; the next call then raises the error that says so.
            while line:
                line = line[os.write(descriptor, line) :]
        finally:
            os.close(descriptor)


def read_events(path: Path | str) -> list[dict[str, Any]]:
    """Return the events of a log in their order, without what a kill cut off at its end.

    Raises:
        DataError: If the log is missing or cannot be read, or a complete line is no JSON object.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.", "Check that it is a run directory.") from error
    complete_lines = content.split(b"\n")[:-1]
    return [_parse(line, number, path) for number, line in enumerate(complete_lines, start=1)]


def latest_by_step(events: Iterable[Mapping[str, Any]], event: str) -> list[dict[str, Any]]:
    """Return the last event of this name of each step, because a resumed run repeats the steps after its checkpoint.

    Events without a `phase` are one phase of their own. Phases stand in the order in which they first appear, and steps
    rise within each.

    Raises:
        DataError: If such an event has no step.
    """
    by_phase: dict[str, dict[int, dict[str, Any]]] = {}
    for record in events:
        if record.get("event") != event:
            continue
        if "step" not in record:
            raise DataError(f"An event '{event}' of the log has no step.", "The log was not written by fedrag.")
        by_phase.setdefault(record.get("phase", ""), {})[record["step"]] = dict(record)
    return [by_step[step] for by_step in by_phase.values() for step in sorted(by_step)]


def values_by_phase(
    events: Iterable[Mapping[str, Any]], values_of: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> dict[str, dict[str, Points]]:
    """Return, by phase and name, the points (step, value) of the events whose value is a finite number."""
    found: dict[str, dict[str, Points]] = {}
    for event in events:
        for name, value in values_of(event).items():
            if value is not None and math.isfinite(value):
                phase = found.setdefault(event.get("phase", ""), {})
                phase.setdefault(name, []).append((float(event["step"]), float(value)))
    return found


def seconds_spent(events: Iterable[Mapping[str, Any]]) -> float:
    """Return how long a run has worked so far, without the pauses between its parts.

    A part begins with `started`, and counts up to the last event before the next one, as a part that was killed could
    not write down its end.
    """
    total, start, last = 0.0, None, None
    for record in events:
        time = datetime.fromisoformat(str(record["time"]))
        if record["event"] == "started":
            total += (last - start).total_seconds() if start is not None and last is not None else 0.0
            start = time
        last = time
    return total + ((last - start).total_seconds() if start is not None and last is not None else 0.0)


def _parse(line: bytes, number: int, path: Path | str) -> dict[str, Any]:
    hint = "Lines are never changed once written; restore the log, or remove that line."
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}:{number}: is no JSON ({error}).", hint) from error
    if not isinstance(record, dict):
        raise DataError(f"{path}:{number}: is no JSON object.", hint)
    return record


def _finite(value: Any, name: str, non_finite: list[str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        non_finite.append(name)
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item, f"{name}.{key}", non_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, f"{name}.{position}", non_finite) for position, item in enumerate(value)]
    return value
