"""`fedrag compare`: paired differences between runs on the same questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedrag_cli.cli.options import ConfidenceOption
from fedrag_cli.cli.session import Session, in_session
from fedrag_cli.errors import EXIT_FAILED, ConfigError


@in_session()
def command(
    current: Session,
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Run directories; the first is compared with. A single run is compared with itself before training. "
            "RUN:STAGE names another of its evaluations, such as RUN:before.",
        ),
    ],
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw the differences into this file (.png, .pdf or .svg).")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite a file that is no plot of fedrag compare with --plot.")
    ] = False,
    examples: Annotated[
        int, typer.Option("--examples", min=0, help="Print so many questions won and lost, for the first metric.")
    ] = 0,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-under",
            metavar="METRIC=VALUE",
            help="End with exit code 1 where a compared run's metric is under the value (above it, for losses).",
        ),
    ] = None,
    fail_if_worse: Annotated[
        bool, typer.Option("--fail-if-worse", help="End with exit code 1 where a metric is shown to be worse.")
    ] = False,
    confidence: ConfidenceOption = None,
) -> None:
    """Say what runs have over each other: differences with intervals, questions won and lost, a verdict in words."""
    thresholds = dict(_threshold(text) for text in fail_under or ())
    from fedrag_cli.reports.compare import compare_runs, interval_settings, load_compared, questions_of
    from fedrag_cli.reports.interval_plots import plot_comparisons, require_plot_file

    if plot is not None:
        require_plot_file(plot, force=force)
    evaluated = load_compared(runs)
    settings = interval_settings(evaluated[0].name, confidence)
    found = compare_runs(evaluated, settings, thresholds, fail_if_worse=fail_if_worse)
    if plot is not None:
        plot_comparisons(found["comparisons"], plot)
        found["plot"] = str(plot)
    current.result(found, lambda renderer: renderer.comparison(found))
    if plot is not None and not current.quiet:
        current.renderer.line(f"Wrote {plot}")
    if examples and not current.json_output and not current.quiet:
        current.renderer.won_and_lost(found, questions_of(evaluated), examples)
    for failure in found["failures"]:
        current.renderer.line(f"Failed: {failure}")
    if found["failures"]:
        raise typer.Exit(EXIT_FAILED)


def _threshold(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError as error:
        raise ConfigError(
            f"--fail-under takes METRIC=VALUE, such as mrr=0.8, not '{text}'.", "Write a metric and a number."
        ) from error
