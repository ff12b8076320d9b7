"""Passages of Markdown texts: none crosses a heading, and code blocks stay whole where they fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from fedrag_cli.data.splitting import count_words, pack, sentence_spans

HEADING = re.compile(r" {0,3}#{1,6}[ \t]+(?P<title>.*)")
FENCE = re.compile(r" {0,3}(?P<marks>`{3,}(?=[^`]*$)|~{3,})(?P<rest>.*)")


@dataclass(frozen=True)
class Line:
    """One line of a Markdown text.

    Args:
        start: Where it starts.
        end: Where it ends, before white space and the line break.
        title: The heading that it is; empty where it is none.
        fence: Number of the code block that it is in, from 1; 0 outside of code.
    """

    start: int
    end: int
    title: str
    fence: int


def split_markdown(text: str, size: int, overlap: int, title: str = "") -> list[tuple[str, str]]:
    """Split a Markdown text into passages.

    A passage starts with its heading where it is the first below it. Headings with nothing below them go with the
    heading that follows. Headings are those with `#`.

    Args:
        text: The text.
        size: Most words of a passage.
        overlap: Words of whole sentences that a passage repeats from the one before it, at most.
        title: The title of passages above the first heading.

    Returns:
        The nearest heading and the text of each passage, in order.

    Raises:
        ConfigError: The overlap is not below the size.
    """
    passages = []
    for heading, lines in _sections(list(_lines(text))):
        spans = list(_spans(text, lines, size))
        body = max((line.end for line in lines if line.title), default=0)
        headings = sum(start < body for start, _ in spans)
        if 0 < headings < len(spans) and count_words(text[slice(*spans[headings])]) > size:
            # A sentence that is cut takes its headings into its first part.
            spans[: headings + 1] = [(spans[0][0], spans[headings][1])]
        passages += [(heading or title, passage) for passage in pack(text, spans, size, overlap)]
    return passages


def _lines(text: str) -> Iterator[Line]:
    start = count = 0
    marks = ""
    for line in text.split("\n"):
        end = start + len(line.rstrip())
        match = FENCE.fullmatch(line)
        if marks:
            yield Line(start, end, "", count)
            if match and match["marks"].startswith(marks) and not match["rest"].strip():
                marks = ""
        elif match:
            marks = match["marks"]
            count += 1
            yield Line(start, end, "", count)
        else:
            heading = HEADING.fullmatch(line)
            yield Line(start, end, _without_closing_marks(heading["title"]) if heading else "", 0)
        start += len(line) + 1


def _without_closing_marks(title: str) -> str:
    """Return the title of `# Title #`; a pattern that matches the marks at the end takes quadratic time."""
    title = title.strip(" \t")
    bare = title.rstrip("#")
    return bare.rstrip(" \t") if bare.endswith((" ", "\t")) else title


def _sections(lines: list[Line]) -> Iterator[tuple[str, list[Line]]]:
    title = ""
    section: list[Line] = []
    has_body = False
    for line in lines:
        if line.title:
            if has_body:
                yield title, section
                section, has_body = [], False
            title = line.title
        else:
            has_body = has_body or line.end > line.start
        section.append(line)
    yield title, section


def _spans(text: str, lines: list[Line], size: int) -> Iterator[tuple[int, int]]:
    for group in _groups(lines):
        start, end = group[0].start, group[-1].end
        if not group[0].fence:
            yield from ((start + first, start + last) for first, last in sentence_spans(text[start:end]))
        elif count_words(text[start:end]) <= size:
            yield start, end
        else:
            yield from ((line.start, line.end) for line in group)


def _groups(lines: list[Line]) -> Iterator[list[Line]]:
    """Yield headings by themselves, code blocks, and the lines between them."""
    group: list[Line] = []
    for line in lines:
        if group and (line.title or group[-1].title or line.fence != group[-1].fence):
            yield group
            group = []
        group.append(line)
    if group:
        yield group
