"""The plots are written, are PNG files, and show what the events hold."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedrag_cli.errors import FedRAGError
from fedrag_cli.reports.interval_plots import plot_difference
from fedrag_cli.reports.plots import label_of, plot_curves, plot_federation


def training(phase: str, steps: int) -> list[dict[str, Any]]:
    return [
        {
            "event": "train_step",
            "phase": phase,
            "step": step,
            "loss": math.exp(-step / 20) + 0.1 * (step % 3),
            "learning_rate": 2e-5 * (1 - step / steps),
        }
        for step in range(1, steps + 1)
    ]


def validation(phase: str, step: int, **metrics: float | None) -> dict[str, Any]:
    return {"event": "validation", "phase": phase, "step": step, "metrics": metrics}


def difference(metric: str, verdict: str, mean: float) -> dict[str, Any]:
    return {
        "metric": metric,
        "n": 40,
        "before": 0.5,
        "after": 0.5 + mean,
        "difference": {"mean": mean, "low": mean - 0.05, "high": mean + 0.05, "n": 40},
        "verdict": verdict,
        "confidence": 0.95,
    }


def size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    return width, height


def test_all_curves_of_two_phases(tmp_path: Path) -> None:
    events = [
        {"event": "start", "time": "now"},
        *training("1-retriever", 60),
        validation("1-retriever", 30, loss=0.4, mrr=0.6),
        validation("1-retriever", 60, loss=0.3, mrr=0.7),
        *training("2-generator", 5),
        validation("2-generator", 5, loss=1.5),
    ]
    written = plot_curves(events, tmp_path / "plots")
    assert [path.name for path in written] == ["loss.png", "validation.png", "learning_rate.png"]
    # Two panels beside each other, but only one phase has metrics other than the loss.
    assert size(written[0])[0] == size(written[2])[0] > size(written[1])[0]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(path.name for path in written)


def test_panels_stand_in_two_columns(tmp_path: Path) -> None:
    one = plot_curves(training("1-retriever", 3), tmp_path / "one")[0]
    three = plot_curves([event for phase in "abc" for event in training(phase, 3)], tmp_path / "three")[0]
    assert size(three)[1] == 2 * size(one)[1]


def test_a_single_step_and_repeated_steps(tmp_path: Path) -> None:
    events = [*training("1-retriever", 1), *training("1-retriever", 1)]
    assert [path.name for path in plot_curves(events, tmp_path)] == ["loss.png", "learning_rate.png"]


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    events = [
        {"event": "train_step", "phase": "a", "step": 1, "loss": None, "learning_rate": 0.0},
        {"event": "train_step", "phase": "a", "step": 2, "loss": float("nan"), "learning_rate": 0.0},
        validation("a", 2, loss=None, mrr=None),
    ]
    assert [path.name for path in plot_curves(events, tmp_path)] == ["learning_rate.png"]


def test_validation_alone(tmp_path: Path) -> None:
    written = plot_curves([validation("a", 2, loss=0.5)], tmp_path)
    assert [path.name for path in written] == ["loss.png"]


def test_no_events_make_no_file(tmp_path: Path) -> None:
    assert plot_curves([], tmp_path / "plots") == []
    assert plot_curves([{"event": "start"}], tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()


def test_the_differences(tmp_path: Path) -> None:
    few = [difference("mrr", "better", 0.1)]
    many = [*few, difference("hit@10", "no difference shown", 0.0), difference("recall@100", "worse", -0.2)]
    plot_difference(few, tmp_path / "few.png")
    plot_difference(many, tmp_path / "plots" / "many.png")
    assert size(tmp_path / "plots" / "many.png")[1] > size(tmp_path / "few.png")[1]


def test_no_difference_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FedRAGError, match="no difference"):
        plot_difference([], tmp_path / "difference.png")


def test_names_are_no_mathematics_and_hold_no_codes(tmp_path: Path) -> None:
    names = ["$\\frac$", "\x1b[2J\n\ud800", "_hidden", "x" * 3000]
    events = [
        {"event": "client_update", "accepted": True, "client": name, "round": 1, "metrics": {"loss": 1.0}}
        for name in names
    ]
    assert plot_federation(events, tmp_path / "federation.png")
    width, _ = size(tmp_path / "federation.png")
    assert width < 3000
    assert [label_of(name) for name in names[:3]] == [r"\$\frac\$", r"\x1b[2J\n\ud800", " _hidden"]


def test_the_plots_leave_matplotlib_alone(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "import fedrag_cli.reports.plots as plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.plot_curves([{'event': 'train_step', 'phase': 'a', 'step': 1, 'loss': 1.0}], sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program, str(tmp_path)], check=True)
