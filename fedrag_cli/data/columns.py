"""Values of rows: finding them by column, checking them, and keeping the rest as metadata."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedrag_cli.data.problems import BadValueError
from fedrag_cli.data.readers import Row, Table, kind_of
from fedrag_cli.errors import DataError

HALF_SURROGATE = re.compile("[\ud800-\udfff]")

USUAL_NAMES = {
    "query": ("question", "input", "prompt", "instruction"),
    "response": ("answer", "answers", "answers.text", "output", "completion", "target"),
    "text": ("passage", "content", "contents", "body", "context", "document"),
}


def has_value(values: Mapping[str, Any], column: str) -> bool:
    """Tell whether a row has a column, which may be null."""
    try:
        _find(values, column)
    except KeyError:
        return False
    return True


def get_value(values: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column.

    Args:
        values: The row.
        column: Name of the column; a dot reaches into nested values.

    Raises:
        BadValueError: The row has no such column.
    """
    try:
        return _find(values, column)
    except KeyError:
        raise BadValueError(f"has no '{column}'") from None


def require_column(table: Table, rows: Sequence[Row], column: str, key: str) -> None:
    """Check that at least one row has a column.

    Args:
        table: Where the rows are from.
        rows: The rows that can be read; with none of them, nothing is checked.
        column: Name of the column.
        key: The config key that names it, such as `columns.response`.

    Raises:
        DataError: No row has it.
    """
    if not rows or any(has_value(row.values, column) for row in rows):
        return
    present = column_names(rows)
    usual = [name for name in USUAL_NAMES.get(column, ()) if name in present]
    close = difflib.get_close_matches(column, present, n=1) or usual[:1]
    hint = f"Set `{key}` to the name of the column that holds it"
    raise DataError(
        f"{table.name} has no column '{column}'; its columns are: {', '.join(present) or 'none'}.",
        f"{hint}: did you mean '{close[0]}'?" if close else f"{hint}.",
    )


def column_names(rows: Iterable[Row]) -> list[str]:
    """Return the columns of rows in the order of appearance, nested ones with their dots."""
    names: dict[str, None] = {}
    for row in rows:
        for name, value in row.values.items():
            names[name] = None
            if isinstance(value, Mapping):
                names.update({f"{name}.{inner}": None for inner in value})
    return list(names)


def text_value(values: Mapping[str, Any], column: str) -> str:
    """Return the text of a column, stripped.

    Args:
        values: The row.
        column: Name of the column.

    Raises:
        BadValueError: It is missing, no text, or blank.
    """
    value = get_value(values, column)
    if not isinstance(value, str):
        raise BadValueError(f"{column} {_missing_or_kind(value, 'a text')}")
    return checked_text(value, column)


def answers_value(values: Mapping[str, Any], column: str, separator: str | None = None) -> tuple[str, ...]:
    """Return the distinct accepted answers of a column, stripped.

    Args:
        values: The row.
        column: Name of the column; it holds one answer, a list of answers, or an object with such a list in `text`.
        separator: What separates several answers in one text.

    Raises:
        BadValueError: There is no answer, or one of them is blank or of a wrong type.
    """
    value = get_value(values, column)
    if isinstance(value, Mapping) and "text" in value:
        value = value["text"]
    answers = _items(value, separator)
    if not answers:
        raise BadValueError(f"{column} is an empty list")
    if len(answers) == 1:
        return (_answer(answers[0], column),)
    named = ((answer, f"{column} {count} of {len(answers)}") for count, answer in enumerate(answers, start=1))
    return tuple(dict.fromkeys(_answer(answer, name) for answer, name in named))


def optional_answers_value(values: Mapping[str, Any], column: str, separator: str | None = None) -> tuple[str, ...]:
    """Return the answers of a column as `answers_value`; absent, null, blank and an empty list are none."""
    value = get_value(values, column) if has_value(values, column) else None
    if value is None or _is_nan(value) or value == [] or (isinstance(value, str) and not value.strip()):
        return ()
    return answers_value(values, column, separator)


def ids_value(values: Mapping[str, Any], column: str, separator: str | None = None) -> tuple[str, ...]:
    """Return the distinct ids of a column.

    Args:
        values: The row.
        column: Name of the column; it holds one id or a list of ids. Absent, null and blank are no ids.
        separator: What separates several ids in one text.

    Raises:
        BadValueError: One of several ids is blank, or one is of a wrong type.
    """
    value = get_value(values, column) if has_value(values, column) else None
    if value is None or _is_nan(value) or (isinstance(value, str) and not value.strip()):
        return ()
    return tuple(dict.fromkeys(checked_id(item, column) for item in _items(value, separator)))


def id_value(values: Mapping[str, Any], column: str) -> str:
    """Return the one id of a column.

    Args:
        values: The row.
        column: Name of the column.

    Raises:
        BadValueError: It is missing, blank or of a wrong type.
    """
    return checked_id(get_value(values, column), column)


def checked_id(value: Any, name: str) -> str:
    """Return an id as text, stripped.

    Args:
        value: A text or a whole number.
        name: Name of the value in messages.

    Raises:
        BadValueError: It is neither, or blank.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadValueError(f"{name} {_missing_or_kind(value, 'a text or a whole number')}")
    return checked_text(value, name)


def checked_text(value: str, name: str) -> str:
    """Return a text, stripped.

    Args:
        value: The text.
        name: Name of the value in messages.

    Raises:
        BadValueError: It is blank, or has half of a surrogate pair, which no tokenizer and no file can take.
    """
    text = value.strip()
    if not text:
        raise BadValueError(f"{name} is {'blank' if value else 'empty'}")
    if HALF_SURROGATE.search(text):
        raise BadValueError(f"{name} is no valid Unicode text: it has half of a surrogate pair")
    return text


def metadata_of(values: Mapping[str, Any], used: Iterable[str]) -> dict[str, Any]:
    """Return the values of a row that are not used otherwise, in types that JSON has.

    Args:
        values: The row.
        used: The used columns; a dot reaches into nested values.
    """
    rest: Mapping[str, Any] = values
    for column in used:
        rest = _without(rest, column)
    return {name: _json_value(value) for name, value in rest.items()}


def _find(value: Any, column: str) -> Any:
    if isinstance(value, Mapping):
        if column in value:
            return value[column]
        name, dot, rest = column.partition(".")
        if not dot:
            raise KeyError(column)
        return _find(value[name], rest)
    if isinstance(value, list | tuple) and value:
        return [_find(item, column) for item in value]
    raise KeyError(column)


def _without(values: Mapping[str, Any], column: str) -> dict[str, Any]:
    name, dot, rest = column.partition(".")
    if column in values or not dot:
        return {key: value for key, value in values.items() if key != column}
    inner = values.get(name)
    kept = _without(inner, rest) if isinstance(inner, Mapping) else {}
    return {key: kept if key == name else value for key, value in values.items() if key != name or kept}


def _items(value: Any, separator: str | None) -> Sequence[Any]:
    if isinstance(value, str) and separator is not None:
        return value.split(separator)
    return value if isinstance(value, list | tuple) else [value]


def _answer(value: Any, name: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise BadValueError(f"{name} {_missing_or_kind(value, 'a text')}")
    return checked_text(value, name)


def _missing_or_kind(value: Any, expected: str) -> str:
    if value is None or _is_nan(value):
        return "is missing (null)"
    if isinstance(value, float) and math.isinf(value):
        return "is infinite"
    return f"is {kind_of(value)}, not {expected}"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        # JSON has neither NaN nor infinity.
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner) for inner in value]
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)
