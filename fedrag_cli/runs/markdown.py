"""Tables and code in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedrag_cli.text import markdown_code, markdown_text, readable

LONGEST_CELL = 2000


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), code: Sequence[int] = ()
) -> str:
    """Write a table.

    Args:
        header: Names of the columns.
        rows: A text for each column, which is shown as it is and on one line.
        numbers: Positions of the columns that are aligned right.
        code: Positions of the columns that are shown as code.
    """

    def shown(cell: str, column: int) -> str:
        if column in code and cell:
            return markdown_code(cell, LONGEST_CELL).replace("|", "\\|")
        return markdown_text(cell, LONGEST_CELL)

    rule = ["---:" if column in numbers else "---" for column in range(len(header))]
    escaped = [[shown(cell, column) for column, cell in enumerate(row)] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *escaped])


def fenced(text: str, language: str) -> str:
    """Write lines of code, between more backticks than they have in a row."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{readable(text).rstrip()}\n{fence}"
