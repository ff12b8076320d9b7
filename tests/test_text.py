"""Foreign texts on screens, in logs and in Markdown."""

from __future__ import annotations

import unicodedata

import pytest

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
    assert readable("\x1b[31m\u202e\r\ud800") == r"\x1b[31m\u202e\r\ud800"


def test_markdown_shows_foreign_texts_as_they_are() -> None:
    assert markdown_text("a|b\n*c* <img> [x](http://y) www.z.de") == (
        r"a\|b\\n\*c\* \<img\> \[x\](http\://y) www\.z.de"
    )
    assert markdown_text("w holds values that are not finite") == "w holds values that are not finite"
    assert markdown_code("plain") == "`plain`"
    assert markdown_code("a``b") == "``` a``b ```"
    assert markdown_code("") == "`  `"
