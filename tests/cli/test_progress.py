"""How long work shows itself: rates and times left of slow units, on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedrag_cli.cli.progress import PlainReporter, TerminalReporter, rate_text


class Clock:
    """A clock that stands still until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("fedrag_cli.cli.progress.time.monotonic", found)
    monkeypatch.setattr("rich.progress.monotonic", found, raising=False)
    return found


@pytest.mark.parametrize(
    ("rate", "text"), [(241.27, "241.3 steps/s"), (1.0, "1.0 steps/s"), (0.052, "0.05 steps/s"), (0.004, "250 s/step")]
)
def test_slow_rates_keep_their_digits(rate: float, text: str) -> None:
    assert rate_text(rate, "step") == text


def shown_after(clock: Clock, seconds: float, before: int, steps: int, width: int = 200) -> str:
    """Return the last line of a bar after so many steps of so many seconds each."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    reporter = TerminalReporter(console)
    with reporter.task("1-retriever", 1, "step") as advance:
        progress = reporter._live
        assert progress is not None
        progress.get_time = clock
        for task in progress._tasks.values():
            task._get_time = clock
            task.start_time = clock()
        advance.total(52)
        advance(before)
        for step in range(steps):
            clock.now += seconds
            advance(1)
            reporter.event("train_step", loss=0.5, step=step)
        other = Console(file=io.StringIO(), width=width)
        with other.capture() as capture:
            other.print(progress.get_renderable())
    return capture.get().rstrip()


def test_units_slower_than_half_a_minute_have_rate_and_time_left(clock: Clock) -> None:
    line = shown_after(clock, 40.0, 0, 13)
    assert " ".join(line.split()[-10:]) == "13/52 steps 0.03 steps/s 0:08:40 elapsed 0:26:00 left loss 0.5000"


def test_what_an_earlier_part_has_done_does_not_count_for_the_rate(clock: Clock) -> None:
    line = shown_after(clock, 200.0, 40, 2)
    assert " ".join(line.split()[-10:]) == "42/52 steps 200 s/step 0:06:40 elapsed 0:33:20 left loss 0.5000"


def test_before_there_is_a_rate_nothing_is_said_to_be_left(clock: Clock) -> None:
    line = shown_after(clock, 40.0, 0, 0)
    assert line.split()[-4:] == ["0/52", "steps", "0:00:00", "elapsed"]


def test_a_narrow_terminal_shows_all_but_the_bar(clock: Clock) -> None:
    line = shown_after(clock, 40.0, 0, 13, width=80)
    assert len(line.splitlines()) == 1
    assert "0.03 steps/s 0:08:40 elapsed 0:26:00 left" in line


def test_the_bar_of_a_task_stays_when_it_ends_and_those_inside_it_go() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    reporter = TerminalReporter(console)
    with reporter.task("outer", 2, "step") as advance:
        with reporter.task("inner", 3, "text") as inner:
            inner(3)
        reporter.event("train_step", loss=0.25)
        advance(2)
    assert isinstance(console.file, io.StringIO)
    # What stands after the last line was wiped.
    last = console.file.getvalue().rpartition("\x1b[2K")[2]
    assert last.startswith("outer ")
    assert "2/2 steps" in last
    assert "loss 0.2500" in last
    assert "inner" not in last


def test_the_first_line_of_slow_units_has_a_rate(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=200)
    with PlainReporter(console).task("Answering", 135, "question") as advance:
        clock.now += 20.0
        advance(27)
        assert isinstance(console.file, io.StringIO)
        assert console.file.getvalue() == "Answering: 27/135 questions, 1.4 questions/s, 1 min 20 s left\n"


def test_lines_have_rate_and_time_left(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=200)
    with PlainReporter(console).task("1-retriever", 1, "step") as advance:
        advance.total(52)
        advance(40)
        for _ in range(2):
            clock.now += 200.0
            advance(1)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "1-retriever: 41/52 steps, 200 s/step, 36 min 40 s left",
        "1-retriever: 42/52 steps, 200 s/step, 33 min 20 s left",
        "1-retriever: 42/52 steps in 6 min 40 s",
    ]
