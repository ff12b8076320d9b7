"""What an evaluation found: values by metric and question, means with intervals; and a file to go on from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedrag_cli.config import EvaluationConfig
from fedrag_cli.errors import DataError
from fedrag_cli.evaluation.bootstrap import Interval, metric_interval, metric_mean
from fedrag_cli.rag.lengths import Lengths
from fedrag_cli.runs.files import append_line, os_errors, whole_lines, write_text_atomically

Values = dict[int, float]
"""A metric's value by the position of the question."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one evaluation.

    Args:
        n: Number of questions.
        values: For each metric its value for each question that it applies to, in the order of the questions.
        predictions: A record for each question.
        truncated: How many queries and prompts were cut.
        groups: The same values for each group of questions, where they are grouped.
        lengths: How long questions and prompts are beside the limits of the models.
    """

    n: int
    values: dict[str, list[float]]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    truncated: dict[str, int] = field(default_factory=dict)
    groups: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    lengths: list[Lengths] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        n: int,
        values: Mapping[str, Values],
        groups: Sequence[str | None],
        predictions: list[dict[str, Any]],
        truncated: dict[str, int],
        lengths: list[Lengths],
    ) -> Evaluation:
        """Make an evaluation of values by position, and of the group of each question (None without groups)."""
        ordered = {name: [row[position] for position in sorted(row)] for name, row in values.items()}
        named = sorted({group for group in groups if group is not None})
        by_group = {
            group: {
                name: members
                for name, row in values.items()
                if (members := [row[position] for position in sorted(row) if groups[position] == group])
            }
            for group in named
        }
        return cls(n, ordered, predictions, truncated, by_group, lengths)

    def intervals(self, settings: EvaluationConfig, seed: int) -> dict[str, Interval]:
        """Return the mean of each metric with its bootstrap interval."""
        return _intervals(self.values, settings, seed)

    def group_intervals(self, settings: EvaluationConfig, seed: int) -> dict[str, dict[str, Interval]]:
        """Return the same for each group of questions."""
        return {group: _intervals(values, settings, seed) for group, values in self.groups.items()}

    def means(self) -> dict[str, float]:
        """Return the mean of each metric."""
        return {name: metric_mean(name, values) for name, values in self.values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return all but the predictions as plain values."""
        stored: dict[str, Any] = {"n": self.n, "values": self.values, "truncated": self.truncated}
        stored["lengths"] = [dataclasses.asdict(item) for item in self.lengths]
        return {**stored, "groups": self.groups} if self.groups else stored

    def write_predictions(self, path: Path) -> None:
        """Write the predictions, a JSON line a question."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.predictions)
        write_text_atomically(path, lines)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evaluation:
        """Make an evaluation of what `to_dict` gave."""
        lengths = [Lengths(**item) for item in values.get("lengths", ())]
        return cls(values["n"], values["values"], [], values["truncated"], values.get("groups", {}), lengths)


def _intervals(values: Mapping[str, list[float]], settings: EvaluationConfig, seed: int) -> dict[str, Interval]:
    return {
        name: metric_interval(name, row, settings.confidence, settings.resamples, seed) for name, row in values.items()
    }


class EvaluationMemory:
    """Results by kind and key, in memory and, where a path is given, in a file of JSON lines, one a batch.

    Args:
        path: The file; a line that a kill cut off is dropped.

    Raises:
        DataError: The file is damaged.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Read what the file holds."""
        self._values: dict[tuple[str, str], Any] = {}
        self._path = path
        if path is not None and path.exists():
            with os_errors(path):
                self._read(path)

    def get(self, kind: str, key: str) -> Any:
        """Return a result, or None where it was not computed yet."""
        return self._values.get((kind, key))

    def put(self, kind: str, values: Mapping[str, Any]) -> None:
        """Keep one batch of results of a kind."""
        self._values.update({(kind, key): value for key, value in values.items()})
        if self._path is None:
            return
        with os_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self._path, {"kind": kind, "values": values})

    def _read(self, path: Path) -> None:
        try:
            for line in whole_lines(path):
                record = json.loads(line)
                self._values.update({(record["kind"], key): value for key, value in record["values"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"'{path}', which holds the evaluation so far, is damaged: {error}",
                "Remove the file; the questions are evaluated anew.",
            ) from error
