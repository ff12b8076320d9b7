"""Texts that others wrote, made fit for screens, logs and Markdown: visible, on one line, and short."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate

LONGEST, LONGEST_NOTE = 200, 4000
# Letters and marks that Unicode calls printable, but that show as nothing.
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
# What Persian, Indic scripts and emoji join and vary their characters with; texts of people keep it.
_JOINERS = re.compile("[\u200c\u200d\ufe00-\ufe0f]")
# What JSON leaves as it is, though terminals obey it, or UTF-8 cannot hold it.
_UNSEEN = re.compile("[\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
# What means something within a line of Markdown, begins HTML, or makes a link of an address.
_MARKDOWN = re.compile(r"([\\`*_\[\]<>#|~&$@]|:(?=//)|(?<=www)\.)", re.IGNORECASE)


def printable(text: object, limit: int = LONGEST) -> str:
    r"""Return a foreign text on one line, with escapes such as `\x1b` in place of what cannot be seen.

    Control and escape codes, line ends, marks that turn the direction of writing, zero-width characters, lone
    surrogates and unassigned code points all become visible. What is longer than the limit is cut, and ends in dots;
    what is no text is shown as Python shows it.
    """
    # What is cut off costs nothing, however long it is.
    known = text if isinstance(text, str) else _short_repr(text, limit)
    pieces = [_visible(character) for character in known[: limit + 1]]
    if sum(map(len, pieces)) <= limit:
        return "".join(pieces)
    ends = accumulate(map(len, pieces))
    return "".join(piece for piece, end in zip(pieces, ends, strict=True) if end <= limit - 3) + "..."


def readable(text: str, limit: int | None = None) -> str:
    """Return a text, of several lines perhaps, as it may go to a terminal: what steers terminals becomes visible."""
    if limit is not None and len(text) > limit:
        return f"{readable(text[:limit])}..."
    if text.isascii() and text.isprintable():
        return text
    lines = text.replace("\r\n", "\n")
    return "".join(
        character if character in "\n\t" or _JOINERS.match(character) else _visible(character) for character in lines
    )


def shape_text(shape: Iterable[object]) -> str:
    """Return the shape of a tensor as Python writes it, but for the end of one with very many dimensions."""
    sizes = list(shape)
    shown = [printable(size, 20) for size in sizes[:8]]
    if len(sizes) > 8:
        return f"({', '.join(shown)}, ... {len(sizes)} dimensions)"
    return f"({', '.join(shown)}{',' if len(sizes) == 1 else ''})"


def json_text(value: object) -> str:
    """Return indented JSON whose texts are as people read them, but for what steers terminals, as JSON escapes it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def markdown_text(text: object, limit: int = LONGEST) -> str:
    """Return a foreign text as Markdown that shows it as it is, without tables, links, code or HTML of its own."""
    return _MARKDOWN.sub(r"\\\1", printable(text, limit))


def markdown_code(text: object, limit: int = LONGEST) -> str:
    """Return a foreign text as code in Markdown, between more backticks than it has in a row."""
    shown = printable(text, limit)
    longest = max((len(ticks) for ticks in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    # A blank at both ends keeps backticks at the ends apart from the fence, and is taken off again.
    return f"{fence} {shown} {fence}" if longest or not shown.strip() else f"{fence}{shown}{fence}"


def _visible(character: str) -> str:
    if character.isprintable() and not _INVISIBLE.match(character):
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def _short_repr(value: object, limit: int) -> str:
    if isinstance(value, int) and value.bit_length() > 4 * limit:
        # Python refuses to write very long numbers.
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, bytes | list | tuple):
        value = value[:limit]
    return str(value)


LONGEST_CELL = 2000


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), code: Sequence[int] = ()
) -> str:
    """Return a table in Markdown; `numbers` and `code` are columns that are aligned right or shown as code."""

    def shown(cell: str, column: int) -> str:
        if column in code and cell:
            return markdown_code(cell, LONGEST_CELL).replace("|", "\\|")
        return markdown_text(cell, LONGEST_CELL)

    rule = ["---:" if column in numbers else "---" for column in range(len(header))]
    escaped = [[shown(cell, column) for column, cell in enumerate(row)] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *escaped])


def fenced(text: str, language: str) -> str:
    """Return lines of code in Markdown, between more backticks than they have in a row."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{readable(text).rstrip()}\n{fence}"
