"""Foreign texts on screens, in logs and in Markdown."""

from __future__ import annotations

import inspect
import io
import json
import re
import unicodedata
from contextlib import nullcontext
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from fedrag_cli.cli.federation_view import LiveFederationReporter
from fedrag_cli.cli.progress import PlainReporter, TerminalReporter
from fedrag_cli.cli.render import Renderer
from fedrag_cli.cli.session import print_json
from fedrag_cli.errors import ConfigError
from fedrag_cli.text import markdown_code, markdown_text, printable, readable, shape_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢 🦄", "plain é 漢 🦄"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x9b31m\x85", r"\x9b31m\x85"),
        ("\u202eabc\u2066\u200f", r"\u202eabc\u2066\u200f"),
        ("a\u200b\u200d\ufeffb", r"a\u200b\u200d\ufeffb"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\ud800", r"\ud800"),
        ("\u3164\ufe0f\U000e0101", r"\u3164\ufe0f\U000e0101"),
        ("[red]x[/red]", "[red]x[/red]"),
        (1.5, "1.5"),
        ([1, "\n"], r"[1, '\n']"),
    ],
)
def test_what_cannot_be_seen_is_shown_as_an_escape(text: object, shown: str) -> None:
    assert printable(text) == shown


def test_every_code_point_comes_out_visible() -> None:
    for start in range(0, 0x110000, 100):
        shown = printable("".join(map(chr, range(start, min(start + 100, 0x110000)))), 2000)
        assert shown.isprintable()
        assert not any(unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in shown)


def test_long_texts_are_cut() -> None:
    assert printable("x" * 10**7, 10) == "xxxxxxx..."
    assert printable("\x1b" * 60, 100) == r"\x1b" * 24 + "..."
    assert printable("x" * 10, 10) == "x" * 10
    assert printable(10**10_000) == "a whole number of 33220 bits"
    assert len(printable([1] * 10**6)) == 200
    assert shape_text([]) + shape_text([3]) + shape_text([2, 3]) == "()(3,)(2, 3)"
    assert shape_text([7] * 10**6) == "(7, 7, 7, 7, 7, 7, 7, 7, ... 1000000 dimensions)"


def test_people_keep_their_lines_and_their_scripts() -> None:
    assert readable("one\r\ntwo\tthree") == "one\ntwo\tthree"
    assert readable("می\u200cخواهم 👨\u200d👩") == "می\u200cخواهم 👨\u200d👩"
    assert readable("ab" * 10**6, 3) == "aba..."
    assert readable("\x1b[31m\u202e\r\ud800") == r"\x1b[31m\u202e\r\ud800"


def test_markdown_shows_foreign_texts_as_they_are() -> None:
    assert markdown_text("a|b\n*c* <img> [x](http://y) www.z.de") == (
        r"a\|b\\n\*c\* \<img\> \[x\](http\://y) www\.z.de"
    )
    assert markdown_text("w holds values that are not finite") == "w holds values that are not finite"
    assert markdown_code("plain") == "`plain`"
    assert markdown_code("a``b") == "``` a``b ```"
    assert markdown_code("") == "`  `"


HOSTILE = "\x1b[2J\x1b]8;;http://x\x07\x9b31m\u202e\u200b\ud800[red]x[/red]"


def terminal() -> tuple[Console, io.StringIO]:
    """Return a console as on a terminal, and what is written to it."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=300, color_system=None, highlight=False, emoji=False)
    return console, written


def is_harmless(text: str) -> bool:
    """Whether a terminal obeys nothing in a text but what Rich itself writes: styles and moves of the cursor."""
    own = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.replace("\x1b[2J", "cleared"))
    return all(character.isprintable() or character in "\n\t\r" for character in own) and "cleared" not in text


def events() -> list[tuple[str, dict[str, Any]]]:
    """Return events of a federation whose every text is hostile."""
    update = {"round": 1, "client": HOSTILE, "examples": 1, "seconds": 1.0, "bytes_received": 1, "metrics": {}}
    row = {"round": 1, "rounds": 2, "examples": 1, "loss": 1.0, "seconds": 1.0, "clients": [HOSTILE]}
    return [
        ("client", {"client": HOSTILE, "status": HOSTILE, "reason": HOSTILE}),
        ("waiting", {"ready": [HOSTILE], "wanted": 2}),
        ("round_started", {"round": 1, "rounds": 2, "clients": [HOSTILE], "bytes": 1}),
        ("client_update", {**update, "accepted": True}),
        ("client_update", {**update, "accepted": False, "reason": HOSTILE}),
        ("client_outlier", {"round": 1, "client": HOSTILE, "reason": HOSTILE}),
        ("round", {**row, "refused": {HOSTILE: HOSTILE}, "outliers": {HOSTILE: HOSTILE}}),
        ("federated_evaluation", {"round": 1, "by": "clients", "examples": 1, "metrics": {HOSTILE: 0.5}}),
        ("client_final", {"client": HOSTILE, "received": False, "reason": HOSTILE}),
    ]


@pytest.mark.parametrize("kind", [TerminalReporter, PlainReporter, LiveFederationReporter])
def test_no_reporter_hands_foreign_codes_to_the_terminal(kind: Any) -> None:
    console, written = terminal()
    reporter = kind(console)
    with reporter if hasattr(reporter, "__enter__") else nullcontext():
        for name, fields in events():
            reporter.event(name, **fields)
        with reporter.task(HOSTILE, 2, "step") as advance:
            advance(2)
        reporter.note(HOSTILE)
    shown = written.getvalue()
    assert is_harmless(shown)
    assert r"\x1b[2J" in shown
    # Markup is text like any other.
    assert "[red]x[/red]" in shown


@pytest.mark.parametrize("is_terminal", [True, False])
def test_no_result_hands_foreign_codes_to_the_terminal(is_terminal: bool) -> None:
    renderer = Renderer()
    renderer.console, written = terminal()
    renderer.output = renderer.console
    if not is_terminal:
        renderer.console = renderer.output = Console(file=written, width=300, highlight=False, emoji=False)
    source = {"id": HOSTILE, "score": 0.5, "text": HOSTILE}
    renderer.answer({"answer": HOSTILE + "\nsecond line", "without_context": False, "sources": [source]})
    renderer.error(ConfigError(HOSTILE, HOSTILE))
    renderer.table([HOSTILE, "b"], [[HOSTILE, Text("styled", style="red")]])
    renderer.fields({HOSTILE: HOSTILE})
    outcome = {"query": HOSTILE, "answer": HOSTILE, "metrics": {"f1": 0.5}}
    item = {"differences": [{"metric": "f1"}], "won": {"f1": ["q"]}, "lost": {"f1": []}, "baseline": "a", "name": "b"}
    renderer.won_and_lost({"comparisons": [item]}, {"a": {"q": outcome}, "b": {"q": outcome}}, 1)
    row = {"round": 1, "clients": [HOSTILE], "refused": {HOSTILE: "x"}, "outliers": {HOSTILE: "x"}, "examples": 1}
    renderer.federation_summary({"rounds": [row], "differences": [], "run_dir": HOSTILE})
    shown = written.getvalue()
    assert is_harmless(shown)
    assert "\nsecond line" in shown
    assert shown.count("[red]x[/red]") >= 8


def test_json_on_a_terminal_holds_no_codes_and_reads_back_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"answer": HOSTILE + "\x7f é 漢"})
    shown = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert "é 漢" in shown
    assert json.loads(shown)["answer"] == HOSTILE + "\x7f é 漢"


def test_a_report_holds_no_codes() -> None:
    from jinja2 import Environment

    from fedrag_cli.reports import html as report

    assert "finalize" in inspect.getsource(report.render_report)
    page = Environment(autoescape=True, finalize=report.shown).from_string("{{ text }}{{ mine|safe }}{{ number }}")
    assert is_harmless(page.render(text=HOSTILE + "<b>", mine="<p>", number=1))
    assert page.render(text="<b>", mine="<p>", number=1) == "&lt;b&gt;<p>1"
