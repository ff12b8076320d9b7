"""The log keeps every complete event and survives a kill in the middle of a line."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from fedrag_cli.errors import DataError, FedRAGError
from fedrag_cli.runs.metrics_log import MetricsLog, latest_by_step, read_events, seconds_spent


def test_events_come_back_as_they_were_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.append("train_step", phase="1-retriever", step=1, loss=0.5, note="two\nlines, Köln")
    log.append("end")
    first, second = read_events(log.path)
    assert first.pop("time")
    assert first == {
        "event": "train_step",
        "phase": "1-retriever",
        "step": 1,
        "loss": 0.5,
        "note": "two\nlines, Köln",
    }
    assert list(second) == ["event", "time"]
    assert datetime.fromisoformat(second["time"]).utcoffset() == timedelta(0)
    assert len(log.path.read_bytes().splitlines()) == 2


def test_a_second_log_appends(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).append("first")
    MetricsLog(path).append("second")
    assert [event["event"] for event in read_events(path)] == ["first", "second"]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(
        "validation", step=3, loss=float("nan"), metrics={"mrr": 0.5, "loss": float("inf")}, values=(1.0, float("-inf"))
    )
    event = read_events(log.path)[0]
    assert event["loss"] is None
    assert event["metrics"] == {"mrr": 0.5, "loss": None}
    assert event["values"] == [1.0, None]
    assert event["non_finite"] == ["loss", "metrics.loss", "values.1"]
    assert "NaN" not in log.path.read_text()


@pytest.mark.parametrize("name", ["time", "non_finite"])
def test_fields_of_the_log_itself_are_refused(tmp_path: Path, name: str) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(FedRAGError, match=name):
        log.append("train_step", **{name: 1})
    assert read_events(log.path) == []


@pytest.mark.parametrize("torn", ['{"event": "b", "lo', "{", '{"event": "b"}'])
def test_a_torn_last_line_is_passed_over_and_then_removed(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "a"}\n' + torn)
    assert [event["event"] for event in read_events(path)] == ["a"]
    MetricsLog(path).append("c")
    assert [event["event"] for event in read_events(path)] == ["a", "c"]


def test_a_log_of_one_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event"')
    assert read_events(path) == []
    MetricsLog(path)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("broken", ["{", "[1]", "", "\x00\x00"])
def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"event": "a"}}\n{broken}\n{{"event": "b"}}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        read_events(path)


def test_a_missing_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Cannot read"):
        read_events(tmp_path / "metrics.jsonl")


def test_a_log_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FedRAGError, match="Cannot write"):
        MetricsLog(tmp_path / "file" / "metrics.jsonl")


def test_repeated_steps_keep_their_last_event() -> None:
    events = [
        {"event": "train_step", "phase": "1-retriever", "step": 1, "loss": 3.0},
        {"event": "train_step", "phase": "1-retriever", "step": 2, "loss": 2.0},
        {"event": "train_step", "phase": "1-retriever", "step": 3, "loss": 1.0},
        {"event": "validation", "phase": "1-retriever", "step": 3, "metrics": {}},
        {"event": "train_step", "phase": "1-retriever", "step": 2, "loss": 2.5},
        {"event": "train_step", "phase": "1-retriever", "step": 3, "loss": 1.5},
        {"event": "train_step", "phase": "10-generator", "step": 2, "loss": 9.0},
        {"event": "train_step", "phase": "10-generator", "step": 1, "loss": 8.0},
    ]
    kept = latest_by_step(events, "train_step")
    assert [(event["phase"], event["step"], event["loss"]) for event in kept] == [
        ("1-retriever", 1, 3.0),
        ("1-retriever", 2, 2.5),
        ("1-retriever", 3, 1.5),
        ("10-generator", 1, 8.0),
        ("10-generator", 2, 9.0),
    ]
    assert latest_by_step(events, "evaluation") == []


def test_events_without_a_phase_are_one_phase() -> None:
    events = [{"event": "train_step", "step": step} for step in (2, 1, 2)]
    assert [event["step"] for event in latest_by_step(events, "train_step")] == [1, 2]


def test_an_event_without_a_step_is_an_error() -> None:
    with pytest.raises(DataError, match="no step"):
        latest_by_step([{"event": "train_step"}], "train_step")


def test_every_line_is_json_by_itself(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(50):
        log.append("train_step", step=step)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == list(range(50))


def test_the_time_of_a_run_is_that_of_its_parts_without_the_pauses_between_them() -> None:
    def at(minute: int, second: int, event: str) -> dict[str, str]:
        return {"event": event, "time": f"2026-11-25T10:{minute:02}:{second:02}.500+00:00"}

    first = [at(0, 0, "started"), at(0, 10, "train_step"), at(0, 12, "stopped")]
    assert seconds_spent([]) == 0.0
    assert seconds_spent(first[:1]) == 0.0
    assert seconds_spent(first) == 12.0
    killed = [at(5, 0, "started"), at(5, 3, "train_step")]
    assert seconds_spent([*first, *killed]) == 15.0
    assert seconds_spent([*first, *killed, at(20, 0, "started")]) == 15.0
    assert seconds_spent([*first, *killed, at(20, 0, "started"), at(21, 1, "evaluation")]) == 76.0
