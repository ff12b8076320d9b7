"""Values of rows: finding them by column, checking them, and keeping the rest as metadata."""

from __future__ import annotations

import ast
import datetime
import difflib
import io
import itertools
import json
import math
import re
import tokenize
import warnings
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from fedrag_cli.data.readers import Row, Table, kind_of
from fedrag_cli.data.row_problems import BadValueError
from fedrag_cli.errors import DataError

HALF_SURROGATE = re.compile("[\ud800-\udfff]")
# Larger floats may have been rounded to the whole number that they are.
LARGEST_EXACT = 2**53

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

    Raises:
        BadValueError: The row has no such column.
    """
    try:
        value = _find(values, column)
    except KeyError:
        raise BadValueError(f"has no '{column}'") from None
    # An array of numpy, as pandas holds lists.
    return value.tolist() if getattr(value, "ndim", 0) else value


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
    answers = _items(_unwrapped(get_value(values, column)), separator)
    if not answers:
        raise BadValueError(f"{column} is an empty list")
    if len(answers) == 1:
        return (_answer(answers[0], column),)
    named = ((answer, f"{column} {count} of {len(answers)}") for count, answer in enumerate(answers, start=1))
    return tuple(dict.fromkeys(_answer(answer, name) for answer, name in named))


def optional_answers_value(values: Mapping[str, Any], column: str, separator: str | None = None) -> tuple[str, ...]:
    """Return the answers of a column as `answers_value`; absent, null, blank and an empty list are none."""
    value = _unwrapped(get_value(values, column)) if has_value(values, column) else None
    if is_missing(value) or value == [] or (isinstance(value, str) and not value.strip()):
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
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return ()
    return tuple(dict.fromkeys(checked_id(item, column) for item in _items(value, separator)))


def id_value(values: Mapping[str, Any], column: str) -> str:
    """Return the one id of a column.

    Raises:
        BadValueError: It is missing, blank or of a wrong type.
    """
    return checked_id(get_value(values, column), column)


def checked_id(value: Any, name: str) -> str:
    """Return an id as text, stripped.

    Args:
        value: A text or a whole number, which tables with gaps hold as a float.
        name: Name of the value in messages.

    Raises:
        BadValueError: It is neither, or blank.
    """
    if _is_number(value) and _is_whole(value):
        return _number_text(value)
    if not isinstance(value, str):
        raise BadValueError(f"{name} {_missing_or_kind(value, 'a text or a whole number')}")
    return checked_text(value, name)


def checked_text(value: str, name: str) -> str:
    """Return a text, stripped.

    Raises:
        BadValueError: It is blank, or has half of a surrogate pair, which no tokenizer and no file can take.
    """
    text = value.strip()
    if not text:
        raise BadValueError(f"{name} is {'blank' if value else 'empty'}")
    if HALF_SURROGATE.search(text):
        raise BadValueError(f"{name} is no valid Unicode text: it has half of a surrogate pair")
    return text


def lists_of_cells(values: Mapping[str, Any], columns: Iterable[str]) -> dict[str, Any]:
    """Return a row of CSV or TSV with the lists that some of its cells hold.

    Lists stand there as in JSON or as Python writes them (`['six', '6 am']`), objects with a list in `text` likewise.

    Raises:
        BadValueError: A cell looks like a list, but cannot be read as one.
    """
    return {**values, **{name: _list_of_cell(values[name], name) for name in columns if values.get(name)}}


def metadata_of(values: Mapping[str, Any], used: Iterable[str]) -> dict[str, Any]:
    """Return the values of a row that are not used otherwise and not missing, in types that JSON has.

    Raises:
        BadValueError: One of them is no valid Unicode text.
    """
    rest: Mapping[str, Any] = values
    for column in used:
        rest = _without(rest, column)
    metadata = {name: _json_value(value) for name, value in rest.items()}
    for name, value in metadata.items():
        if HALF_SURROGATE.search(json.dumps([name, value], ensure_ascii=False)):
            raise BadValueError(f"{name!a} is no valid Unicode text: it has half of a surrogate pair")
    return {name: value for name, value in metadata.items() if value is not None}


def is_missing(value: Any) -> bool:
    """Tell whether a value stands for none: null, NaN, or the NaT and NA of pandas."""
    if value is None or type(value).__name__ in ("NaTType", "NAType"):
        return True
    return isinstance(value, Real | Decimal) and bool(value != value)


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


def _unwrapped(value: Any) -> Any:
    """Return the list of answers in an object of SQuAD's schema."""
    return get_value(value, "text") if isinstance(value, Mapping) and "text" in value else value


def _items(value: Any, separator: str | None) -> Sequence[Any]:
    if isinstance(value, str) and separator is not None:
        return value.split(separator)
    return value if isinstance(value, list | tuple) else [value]


def _answer(value: Any, name: str) -> str:
    if _is_number(value):
        return _number_text(value)
    if isinstance(value, datetime.date | datetime.time) and not is_missing(value):
        return _date_text(value)
    if not isinstance(value, str):
        raise BadValueError(f"{name} {_missing_or_kind(value, 'a text')}")
    return checked_text(value, name)


def _is_number(value: Any) -> bool:
    if isinstance(value, Integral):
        return not isinstance(value, bool)
    return isinstance(value, Real | Decimal) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) or (value == int(value) and abs(value) < LARGEST_EXACT)


def _number_text(value: Any) -> str:
    """Return a number as people write it: `84`, also where a table holds 84.0."""
    if _is_whole(value):
        return str(int(value))
    return format(value.normalize(), "f") if isinstance(value, Decimal) else str(value)


def _date_text(value: datetime.date | datetime.time) -> str:
    """Return a date, a time or both in ISO 8601; pandas holds dates as their midnight."""
    if isinstance(value, datetime.datetime):
        return value.isoformat(" ").removesuffix(" 00:00:00")
    return value.isoformat()


def _list_of_cell(text: str, name: str) -> Any:
    cell = text.strip()
    is_quoted = cell.startswith(("['", '["', "{'", '{"'))
    if not is_quoted and cell[:1] + cell[-1:] not in ("[]", "()", "{}"):
        return text
    value = _literal(cell)
    if isinstance(value, list) or (isinstance(value, Mapping) and isinstance(value.get("text"), list | tuple)):
        return value
    if isinstance(value, tuple | set) and all(isinstance(item, str) for item in value):
        # Of a set, Python does not keep the order.
        return _literal(f"[{cell[1:-1]}]")
    if value is None and (is_quoted or (cell[0] == "[" and "," in cell)):
        raise BadValueError(
            f"{name} looks like a list, but cannot be read as one: {_shortened(cell)} "
            '(write it as in JSON, ["six", "6 am"]; with `list_separator` set, no cell is taken for a list)'
        )
    return text


def _literal(cell: str) -> Any:
    """Return what a cell means in JSON or Python; None where it means nothing there."""
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    try:
        tokens = [token.type for token in tokenize.generate_tokens(io.StringIO(cell).readline)]
        # Python joins neighbouring texts, but numpy writes lists without commas.
        if (tokenize.STRING, tokenize.STRING) in itertools.pairwise(type for type in tokens if type != tokenize.NL):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.literal_eval(cell)
    except (ValueError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError):
        return None


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def _missing_or_kind(value: Any, expected: str) -> str:
    if is_missing(value):
        return "is missing (null)"
    if isinstance(value, float) and math.isinf(value):
        return "is infinite"
    return f"is {kind_of(value)}, not {expected}"


def _json_value(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if is_missing(value):
        return None
    if _is_number(value) and _is_whole(value):
        return int(value)
    if isinstance(value, float):
        # JSON has no infinity.
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str | bool):
        return value
    if isinstance(value, datetime.date | datetime.time):
        return _date_text(value)
    if isinstance(value, Mapping):
        return {str(key): _json_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner) for inner in value]
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)
