"""`fedrag report`: one HTML file of finished runs, which loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fedrag_cli.config import EvaluationConfig
from fedrag_cli.config.fields import LOWER_IS_BETTER, is_folder, is_there
from fedrag_cli.errors import ConfigError
from fedrag_cli.evaluation.comparison import Comparison, Evaluated, compare, metric_table
from fedrag_cli.reports.compare import (
    interval_settings,
    load_compared,
    load_evaluated,
    questions_of,
    split_stage,
    stages_of,
)
from fedrag_cli.reports.interval_plots import draw_comparisons
from fedrag_cli.reports.model_card import portable_argument
from fedrag_cli.reports.plots import picture_of
from fedrag_cli.reports.run_description import Questions, describe_run, what_differs, won_and_lost
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.files import write_text_atomically
from fedrag_cli.text import readable

GENERATOR = "fedrag report"
VERDICT_MARKS = {"better": "✓", "worse": "✗", "no difference shown": "○"}
VERDICT_CLASSES = {"better": "better", "worse": "worse", "no difference shown": "undecided"}
EXPLANATIONS = {
    r"mrr": "Mean reciprocal rank: 1 divided by the rank of the first relevant passage, 0 where none was found.",
    r"hit@(\d+)": "1 where a relevant passage is among the first {0}, else 0.",
    r"recall@(\d+)": "The share of the relevant passages that are among the first {0}, each text counted once.",
    r"ndcg@(\d+)": "How early the relevant passages come among the first {0}; 1 is the best order.",
    r"exact_match": "1 where the answer is an accepted one, apart from case, articles and punctuation, else 0.",
    r"f1": "Overlap of the words of the answer with those of the accepted answer that is nearest, from 0 to 1.",
    r"rouge1": "Overlap of single words with the accepted answer that is nearest, from 0 to 1.",
    r"rouge2": "Overlap of pairs of words with the accepted answer that is nearest, from 0 to 1.",
    r"rougeL": "Longest common sequence of words with the accepted answer that is nearest, from 0 to 1.",
    r"accuracy": "1 where the most likely of the choices is an accepted answer, else 0.",
    r"negative_log_likelihood": "How unlikely the generator finds the accepted answer, per token, in nats.",
    r"perplexity": "How many tokens the generator hesitates between at each token of the accepted answer.",
}


def render_report(report: Mapping[str, Any]) -> str:
    """Return the page that shows what `build_report` has collected.

    Every value is escaped. Should one ever not be, the page's policy forbids to load anything and to run any script
    but its own.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fedrag_cli.reports", "report_page"),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str | int]] = {
        "number": lambda value: f"{value:.4f}",
        "signed": lambda value: f"{value:+.4f}",
        "interval": lambda item: f"[{item['low']:.4f}, {item['high']:.4f}]",
        "signed_interval": lambda item: f"[{item['low']:+.4f}, {item['high']:+.4f}]",
        "percent": lambda share: f"{100 * share:g} %",
        "score": lambda value: f"{value:.3f}",
        "data_uri": lambda picture: "data:image/png;base64," + base64.b64encode(picture).decode("ascii"),
        # So that the texts in all pictures have the size of the page's; a PNG's first chunk begins with its width.
        "width": lambda picture: round(int.from_bytes(picture[16:20], "big") * 0.55),
        "verdict_mark": VERDICT_MARKS.__getitem__,
        "verdict_class": VERDICT_CLASSES.__getitem__,
        "explained": explain_metric,
    }
    environment.filters |= filters
    environment.tests["lower_better"] = LOWER_IS_BETTER.__contains__
    assert environment.loader is not None
    script = environment.loader.get_source(environment, "script.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    page = environment.get_template("page.html.j2")
    return page.render(report, generator=GENERATOR, policy=policy, script=script).lstrip()


def shown(value: Any) -> Any:
    """Return a value as the page may show it; what is marked as safe is ours."""
    return readable(value) if type(value) is str else value


def explain_metric(name: str) -> str:
    """Say in a sentence what a metric measures, for one question."""
    for pattern, text in EXPLANATIONS.items():
        if found := re.fullmatch(pattern, name):
            return text.format(*found.groups())
    return ""


def require_replaceable(path: Path, *, force: bool) -> None:
    """Raise ConfigError where a file is a folder, or, unless it is forced, no report of ours."""
    if is_folder(path):
        raise ConfigError(f"'{path}' is a folder.", "Name a file, such as report.html, with --output.")
    if force or not is_there(path):
        return
    with path.open("rb") as file:
        beginning = file.read(2000)
    if f'<meta name="generator" content="{GENERATOR}">'.encode() not in beginning:
        raise ConfigError(
            f"'{path}' is there already and is no report of fedrag.",
            "Name another file with --output, or overwrite it with --force.",
        )


def write_report(names: Sequence[str], path: Path, confidence: float | None, examples: int) -> dict[str, Any]:
    """Write a report of runs, and return its path and what it says of each comparison.

    Args:
        names: Run directories or RUN:STAGE, as for `build_report`.
        path: The HTML file.
        confidence: Level of the intervals; None for that of the first run's config.
        examples: How many questions won and lost are shown for each metric.

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
        "picture": picture_of(draw_comparisons([item])),
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
