"""`fedrag compare`: what finished runs have over each other, from what they have recorded of each question."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedrag_cli.config import EvaluationConfig
from fedrag_cli.config.fields import LOWER_IS_BETTER, is_there
from fedrag_cli.errors import ConfigError, DataError
from fedrag_cli.evaluation.comparison import Comparison, Evaluated, compare, metric_table
from fedrag_cli.runs.directory import RunDirectory

SUFFIX = "-predictions.jsonl"
NEWEST_FIRST = ("evaluated", "after", "before")


def compare_runs(
    evaluated: Sequence[Evaluated],
    settings: EvaluationConfig,
    thresholds: Mapping[str, float],
    *,
    fail_if_worse: bool,
) -> dict[str, Any]:
    """Compare evaluations with the first of them.

    Args:
        evaluated: At least two, as `load_compared` reads them.
        settings: Confidence and resamples of the bootstrap.
        thresholds: What each metric of every compared run must reach (or, where lower is better, not exceed).
        fail_if_worse: Whether a metric that is shown to be worse counts as a failure.

    Raises:
        ConfigError: A threshold names no metric of a run.
        DataError: They have no question or no metric in common.
    """
    comparisons = [compare(evaluated[0], other, settings, evaluated[0].seed) for other in evaluated[1:]]
    tables = {item.name: metric_table(item, settings, item.seed) for item in evaluated}
    compared = {item.name: tables[item.name] for item in evaluated[1:]}
    failures = [failure for name, table in compared.items() for failure in _missed(name, table, thresholds)]
    if fail_if_worse:
        failures += [
            f"{item.other.title} is worse than {item.baseline.title}: {_worse(item)}"
            for item in comparisons
            if item.is_worse()
        ]
    return {
        "baseline": evaluated[0].name,
        "confidence": settings.confidence,
        "metrics": tables,
        "comparisons": [item.to_dict() for item in comparisons],
        "failures": failures,
    }


def load_compared(names: Sequence[str]) -> list[Evaluated]:
    """Read what runs, or RUN:STAGE, have recorded of each question; one alone is compared with itself before training.

    Raises:
        ConfigError: There is nothing to compare, or a folder is no run or one that is not finished.
        DataError: Records are missing or damaged.
    """
    compared = [name.rstrip("/") for name in names]
    if len(compared) == 1:
        if split_stage(compared[0])[1] is not None:
            raise ConfigError(f"There is nothing to compare '{compared[0]}' with.", "Name another run.")
        compared = [f"{compared[0]}:before", *compared]
    for name in compared:
        # Half of a run must not pass for the whole in CI.
        RunDirectory.open(split_stage(name)[0]).require_finished()
    return [load_evaluated(name) for name in compared]


def load_evaluated(name: str) -> Evaluated:
    """Read what a run, or RUN:STAGE, has recorded of each question.

    Raises:
        ConfigError: The folder is no run, or it has no such evaluation.
        DataError: The records are damaged, or those of a finished run's end are gone.
    """
    path, stage = split_stage(name)
    run = RunDirectory.open(path)
    stages = stages_of(run)
    if not stages:
        raise ConfigError(
            f"The run in '{path}' has evaluated nothing yet.",
            f"Evaluate it with: fedrag evaluate {path} and name the run directory that this prints.",
        )
    if stage is None:
        stage = next((known for known in NEWEST_FIRST if known in stages), stages[-1])
        if stage == "before" and run.manifest().get("status") == "done":
            raise DataError(
                f"The run in '{path}' is finished, but what it has recorded after training is gone.",
                f"Restore 'evaluation/after{SUFFIX}' in it, or name the evaluation before training: {path}:before",
            )
    if stage not in stages:
        raise ConfigError(f"The run in '{path}' has no evaluation '{stage}'.", f"It has: {', '.join(stages)}.")
    records = run.path / "evaluation" / f"{stage}{SUFFIX}"
    rows = _read(records)
    asked = (run.read_json_if_there(f"evaluation/{stage}.json") or {}).get("n", len(rows))
    if asked != len(rows):
        raise DataError(
            f"'{records}' is not whole: it has {len(rows)} questions of {asked}.",
            "Restore the file, or evaluate the run again.",
        )
    return Evaluated(name, rows, f"{short_name(run)} ({stage})", _whole(run.manifest().get("seed"), 0))


def interval_settings(name: str, confidence: float | None) -> EvaluationConfig:
    """Return the resamples, and unless another is given the confidence, with which a run draws its own intervals."""
    run, default = RunDirectory.open(split_stage(name)[0]), EvaluationConfig()
    try:
        stored = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))["evaluation"]
        # What the environment gave is there as a reference only.
        resamples = _whole(stored.get("resamples"), default.resamples)
        level = stored.get("confidence")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        resamples, level = default.resamples, None
    own = float(level) if isinstance(level, float | int) else default.confidence
    return EvaluationConfig(confidence=own if confidence is None else confidence, resamples=resamples)


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) else default


def questions_of(evaluated: Sequence[Evaluated]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the records of each question by the runs' names and the questions' ids."""
    return {item.name: {str(row["id"]): dict(row) for row in item.predictions} for item in evaluated}


def short_name(run: RunDirectory) -> str:
    """Return what a run is called for short: its name, and the end of its folder's."""
    return f"{run.manifest().get('run', run.path.parent.name)} {run.path.resolve().name[-6:]}"


def stages_of(run: RunDirectory) -> list[str]:
    """Return the names of a run's evaluations, such as before and after."""
    return sorted(file.name.removesuffix(SUFFIX) for file in (run.path / "evaluation").glob(f"*{SUFFIX}"))


def split_stage(name: str) -> tuple[Path, str | None]:
    """Return the run directory and the stage of RUN or RUN:STAGE."""
    if is_there(name) or ":" not in name:
        return Path(name), None
    path, _, stage = name.rpartition(":")
    return Path(path), stage


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        # Questions may hold other ends of lines than the one that JSON lines end with.
        rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
        if not all(isinstance(row["metrics"], dict) and "id" in row and "query" in row for row in rows):
            raise ValueError("a line has no id, query or metrics")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{path}' cannot be read: {error}", "Restore the file, or evaluate the run again.") from error
    return rows


def _missed(name: str, table: Mapping[str, Mapping[str, float]], thresholds: Mapping[str, float]) -> list[str]:
    missed = []
    for metric, threshold in thresholds.items():
        if metric not in table:
            raise ConfigError(
                f"'{name}' has no metric '{metric}' that --fail-under could look at.", f"It has: {', '.join(table)}."
            )
        mean = table[metric]["mean"]
        if metric in LOWER_IS_BETTER and mean > threshold:
            missed.append(f"{metric} of {name} is {mean:.4f}, above {threshold:g}")
        elif metric not in LOWER_IS_BETTER and mean < threshold:
            missed.append(f"{metric} of {name} is {mean:.4f}, under {threshold:g}")
    return missed


def _worse(item: Comparison) -> str:
    return ", ".join(difference.metric for difference in item.differences if difference.verdict == "worse")
