"""`fedrag report`: collects what a report of finished runs shows, without changing the runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fedrag_cli.config import EvaluationConfig
from fedrag_cli.evaluation.comparison import Comparison, Evaluated, compare, metric_table
from fedrag_cli.runs.atomic import write_text_atomically
from fedrag_cli.runs.comparison_plot import draw_comparisons
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.model_card import portable_argument
from fedrag_cli.runs.plots import png_of
from fedrag_cli.runs.report import render_report
from fedrag_cli.trainer_managers.comparing import (
    interval_settings,
    load_compared,
    load_evaluated,
    questions_of,
    split_stage,
    stages_of,
)
from fedrag_cli.trainer_managers.report_questions import Questions, won_and_lost
from fedrag_cli.trainer_managers.report_runs import describe_run, what_differs


def write_report(names: Sequence[str], path: Path, confidence: float | None, examples: int) -> dict[str, Any]:
    """Write a report of runs.

    Args:
        names: Run directories or RUN:STAGE, as for `build_report`.
        path: The HTML file.
        confidence: Level of the intervals; None for that of the first run's config.
        examples: How many questions won and lost are shown for each metric.

    Returns:
        The path of the report, and what it says of each comparison.

    Raises:
        ConfigError: A folder is no run, or it has evaluated nothing.
        DataError: Records are missing or damaged, or runs have no question in common.
        FedRAGError: The file cannot be written.
    """
    report = build_report(names, confidence, examples)
    write_text_atomically(path, render_report(report))
    known = ("baseline", "name", "baseline_label", "label", "questions", "differences", "verdict")
    verdicts = [{key: item[key] for key in known} for item in report["comparisons"]]
    return {"report": str(path), "confidence": report["confidence"], "verdicts": verdicts}


def build_report(names: Sequence[str], confidence: float | None, examples: int) -> dict[str, Any]:
    """Collect what a report shows.

    The first run is compared with; a single one with itself before training where it was trained, and with nothing
    where it was only evaluated.

    Args:
        names: Run directories, or RUN:STAGE for another evaluation of the run than its last.
        confidence: Level of the intervals; None for that of the first run's config.
        examples: How many questions won and lost are shown for each metric.

    Returns:
        What `render_report` takes.
    """
    names = [name.rstrip("/") for name in names]
    comparing = len(names) > 1 or _was_trained(names[0])
    evaluated = load_compared(names) if comparing else [load_evaluated(names[0])]
    settings = interval_settings(evaluated[0].name, confidence)
    questions = questions_of(evaluated)
    compared = [compare(evaluated[0], other, settings, evaluated[0].seed) for other in evaluated[1:]]
    comparisons = [_comparison(item, questions, examples) for item in compared]
    by_path = {path: describe_run(path) for path in (split_stage(name)[0] for name in names)}
    runs = list(by_path.values())
    evaluations = [_evaluation(item, by_path[split_stage(item.name)[0]]["group_by"], settings) for item in evaluated]
    return {
        "title": f"Report on {', '.join(run['name'] for run in runs)}",
        "created": f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC, by fedrag {metadata.version('fedrag-cli')}",
        "confidence": settings.confidence,
        "comparisons": comparisons,
        "evaluations": evaluations,
        "metric_names": list(dict.fromkeys(name for item in evaluations for name in item["metrics"])),
        "runs": runs,
        "differing": what_differs(runs),
        "has_plots": any(run["plots"] for run in runs),
        "has_questions": bool(comparisons) and examples > 0,
        "commands": _commands(names, settings, examples, comparing=bool(comparisons)),
    }


def _was_trained(name: str) -> bool:
    """Return whether a single name stands for a run that has more to show than one evaluation."""
    path, stage = split_stage(name)
    stages = stages_of(RunDirectory.open(path))
    return stage is None and "before" in stages and len(stages) > 1


def _comparison(comparison: Comparison, questions: Questions, examples: int) -> dict[str, Any]:
    item = comparison.to_dict()
    return {
        **item,
        "statements": [{"verdict": verdict, "text": text} for verdict, text in comparison.statements().items()],
        "picture": png_of(draw_comparisons([item])),
        "by_metric": won_and_lost(item, questions, examples),
    }


def _evaluation(item: Evaluated, group_by: str | None, settings: EvaluationConfig) -> dict[str, Any]:
    groups = sorted({str(row["group"]) for row in item.predictions if "group" in row})
    members = {
        group: [row for row in item.predictions if "group" in row and str(row["group"]) == group] for group in groups
    }
    return {
        "label": item.title,
        "metrics": metric_table(item, settings, item.seed),
        "group_by": group_by or "group",
        "groups": {
            group: metric_table(Evaluated(item.name, rows), settings, item.seed) for group, rows in members.items()
        },
    }


def _commands(names: Sequence[str], settings: EvaluationConfig, examples: int, *, comparing: bool) -> list[str]:
    shown = [portable_argument(name) for name in names]
    options = ["--confidence", f"{settings.confidence:g}"]
    comparison = [shlex.join(["fedrag", "compare", *shown, *options])] if comparing else []
    return [*comparison, shlex.join(["fedrag", "report", *shown, "--examples", str(examples), *options])]
