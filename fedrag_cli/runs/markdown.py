"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Write a table.

    Args:
        header: Names of the columns.
        rows: A text for each column; bars in it are escaped.
        numbers: Positions of the columns that are aligned right.
    """
    rule = ["---:" if column in numbers else "---" for column in range(len(header))]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *escaped])
