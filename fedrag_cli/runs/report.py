"""Renders a report of runs as one HTML file, which loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedrag_cli.config.fields import is_folder, is_there
from fedrag_cli.config.metrics import LOWER_IS_BETTER
from fedrag_cli.errors import ConfigError
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
    """Write a report.

    Every value is escaped. Should one ever not be, the page's policy forbids to load anything and to run any script
    but its own.

    Args:
        report: What the page shows, as `fedrag_cli.trainer_managers.report.build_report` collects it.

    Returns:
        The whole page.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fedrag_cli.runs", "report_page"),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str | int]] = {
        "number": lambda value: f"{value:.4f}",
        "signed": lambda value: f"{value:+.4f}",
        "interval": _interval,
        "signed_interval": _signed_interval,
        "percent": lambda share: f"{100 * share:g} %",
        "score": lambda value: f"{value:.3f}",
        "data_uri": _data_uri,
        "width": _width,
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
    """Make sure that a report may be written into a file.

    Args:
        path: The file.
        force: Whether a file that is no report may be overwritten.

    Raises:
        ConfigError: It is a folder, or a file that is no report of ours.
    """
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


def _interval(item: Mapping[str, float]) -> str:
    return f"[{item['low']:.4f}, {item['high']:.4f}]"


def _signed_interval(item: Mapping[str, float]) -> str:
    return f"[{item['low']:+.4f}, {item['high']:+.4f}]"


def _data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode("ascii")


def _width(picture: bytes) -> int:
    """Return how wide a PNG is shown, so that the texts in all pictures have the size of the page's."""
    # The first chunk of a PNG begins with the width in pixels.
    return round(int.from_bytes(picture[16:20], "big") * 0.55)
