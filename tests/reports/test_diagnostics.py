"""What the log tells beside the loss: summary, plots and the model card's section."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedrag_cli.reports.diagnostics import diagnostics_section, moved_modules, step_values, summarise
from fedrag_cli.reports.model_card import model_card
from fedrag_cli.reports.plots import plot_diagnostics, plot_movement


def steps(phase: str, count: int, **values: Any) -> list[dict[str, Any]]:
    return [
        {
            "event": "train_step",
            "phase": phase,
            "step": step,
            "loss": 1.0,
            **{name: value(step) if callable(value) else value for name, value in values.items()},
        }
        for step in range(1, count + 1)
    ]


def moved(phase: str, **modules: float | None) -> dict[str, Any]:
    return {
        "event": "moved",
        "phase": phase,
        "modules": {
            name.replace("_", "."): {"distance": 0.5, "relative": relative} for name, relative in modules.items()
        },
    }


RETRIEVER = steps(
    "1-retriever",
    40,
    grad_norm=lambda step: 3.0 / step + 0.2 * (step % 3),
    lm_disagrees=lambda step: 0.8 - step / 80,
    retriever_entropy=lambda step: 1.9 - step / 50,
    lm_entropy=0.8,
)
GENERATOR = steps("2-generator", 6, grad_norm=1.0, supervised_share=0.07)
MOVED = [
    moved("1-retriever", embeddings=0.01, **{f"layer_{n}": 0.001 * n for n in range(12)}, pooler=0.0),
    moved("2-generator", layers_0=0.6, layers_1=None),
]


def test_the_first_and_the_last_fifth() -> None:
    events = steps("a", 10, grad_norm=float, lm_entropy=lambda step: None if step < 9 else 2.0)
    found = summarise(events)["a"]["steps"]
    assert found["grad_norm"] == {"first": 1.5, "last": 9.5}
    assert found["lm_entropy"] == {"first": 2.0, "last": 2.0}
    assert "lm_disagrees" not in found


def test_repeated_steps_and_phases_count_once() -> None:
    events = [*steps("a", 3, grad_norm=5.0), *steps("a", 3, grad_norm=1.0), moved("a", x=0.1), moved("a", x=0.2)]
    assert step_values(events)["a"]["grad_norm"] == [(1.0, 1.0), (2.0, 1.0), (3.0, 1.0)]
    assert moved_modules(events)["a"]["x"]["relative"] == 0.2
    many = [event for number in range(9) for event in steps(f"round-{number}", 1, grad_norm=1.0)]
    assert list(step_values(many)) == [f"round-{number}" for number in range(3, 9)]


def test_modules_that_moved_most() -> None:
    found = summarise(MOVED)
    assert [item["module"] for item in found["1-retriever"]["moved"]] == [
        "layer.11",
        "embeddings",
        "layer.10",
        "layer.9",
        "layer.8",
    ]
    assert [item["module"] for item in found["2-generator"]["moved"]] == ["layers.0"]


def test_the_section_of_the_model_card() -> None:
    card = model_card(
        {
            "run_name": "r",
            "status": "done",
            "mode": "alternating",
            "seed": 1,
            "command": ["fedrag", "train"],
            "tuned": {"retriever": None, "generator": None},
            "data": {},
            "diagnostics": summarise([*RETRIEVER, *GENERATOR, *MOVED]),
        }
    )
    section = card.split("## Diagnostics\n")[1].split("## ")[0]
    assert "| 1-retriever | entropy of the LM over the passages (nats) | 0.8 | 0.8 |" in section
    assert "| 2-generator | supervised share of all tokens | 0.07 | 0.07 |" in section
    assert "- 1-retriever: `layer.11` 1.1 %, `embeddings` 1 %," in section
    assert "- 2-generator: `layers.0` 60 %" in section
    assert "None" not in section
    assert diagnostics_section({}) == ""
    assert "|" not in diagnostics_section(summarise(MOVED))


def test_the_plots(tmp_path: Path) -> None:
    events = [{"event": "started"}, *RETRIEVER, *GENERATOR, *MOVED]
    assert plot_diagnostics(events, tmp_path / "plots" / "diagnostics.png")
    assert plot_movement(events, tmp_path / "plots" / "movement.png")
    for path in (tmp_path / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_single_step_and_values_of_zero(tmp_path: Path) -> None:
    assert plot_diagnostics(steps("a", 1, grad_norm=0.0, supervised_share=1.0), tmp_path / "one.png")
    assert plot_movement([moved("a", x=0.0)], tmp_path / "still.png")


@pytest.mark.parametrize("events", [[], [{"event": "started"}], steps("a", 2, grad_norm=float("nan"))])
def test_nothing_to_draw(tmp_path: Path, events: list[dict[str, Any]]) -> None:
    assert not plot_diagnostics(events, tmp_path / "plots" / "diagnostics.png")
    assert not plot_movement(events, tmp_path / "plots" / "movement.png")
    assert not (tmp_path / "plots").exists()
    assert summarise(events) == {}
