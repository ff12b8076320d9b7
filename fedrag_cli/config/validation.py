"""Checking values against the schema: every error at once, in words, with a suggestion for a misspelt key."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from fedrag_cli.config.fields import dataclass_at, is_optional
from fedrag_cli.config.problems import ConfigProblem, KeyPath, format_path, in_order, suggestion
from fedrag_cli.config.references import outside_reference, without_values
from fedrag_cli.config.schema import Config
from fedrag_cli.config.source import ConfigTree

EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
}
_MOST_SHOWN = 300


@functools.cache
def config_adapter() -> TypeAdapter[Config]:
    """Return pydantic's adapter of the whole config, registered components included."""
    return TypeAdapter(Config)


def validate_values(values: dict[str, Any], tree: ConfigTree) -> tuple[Config | None, list[ConfigProblem]]:
    """Validate resolved values.

    Args:
        values: The config as plain dicts, lists and scalars.
        tree: Where the values came from.

    Returns:
        The config, or None with all that is wrong.
    """
    try:
        return config_adapter().validate_python(values), []
    except ValidationError as error:
        problems = [_problem(details, values, tree) for details in error.errors(include_url=False)]
    return None, in_order(_one_for_each_path(problems))


def _one_for_each_path(problems: Sequence[ConfigProblem]) -> Iterator[ConfigProblem]:
    """Join what the members of a union say about the same value."""
    by_path: dict[str, list[ConfigProblem]] = {}
    for problem in problems:
        by_path.setdefault(problem.path, []).append(problem)
    for path, same in by_path.items():
        messages = dict.fromkeys(problem.message for problem in same)
        yield ConfigProblem(same[0].position, path, "; or ".join(messages))


def _problem(details: ErrorDetails, values: dict[str, Any], tree: ConfigTree) -> ConfigProblem:
    path, owner = _locate(details["loc"], values)
    if details["type"] in ("union_tag_invalid",):
        path = (*path, "type")
    reference = outside_reference(tree.tree, path) or ""
    message = without_values(_message(details, path, owner, tree), reference)
    return ConfigProblem(tree.position(path), format_path(path), message)


def _locate(location: tuple[str | int, ...], values: Any) -> tuple[KeyPath, type | None]:
    """Turn pydantic's location into a key path, and find the dataclass that the last key belongs to.

    A location also names the chosen `type:` of a component and the tried members of a union; these are no keys.
    """
    path: list[str | int] = []
    owner: type | None = Config
    current: Any = values
    inner: type | None = Config
    for position, part in enumerate(location):
        last = position == len(location) - 1
        is_key = isinstance(part, int) or (inner is not None and part in _field_names(inner))
        if inner is not None and not is_key and not (last and isinstance(current, dict) and part in current):
            continue
        if inner is None and not isinstance(part, int):
            continue
        owner = inner
        path.append(part)
        current = _child(current, part)
        inner = dataclass_at(owner, part, current) if owner is not None and isinstance(part, str) else None
    return tuple(path), owner


def _child(value: Any, key: str | int) -> Any:
    try:
        return value[key]
    except (KeyError, IndexError, TypeError):
        return None


def _field_names(owner: type) -> list[str]:
    return [field.name for field in dataclasses.fields(owner)]


def _message(details: ErrorDetails, path: KeyPath, owner: type | None, tree: ConfigTree) -> str:
    kind, given = details["type"], details["input"]
    shown = _shown(given, path, tree)
    context: dict[str, Any] = details.get("ctx") or {}
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"is no setting here{suggestion(path[-1], _field_names(owner) if owner else ())}"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return "is required"
    if kind == "union_tag_invalid":
        tags = [tag.strip().strip("'") for tag in str(context.get("expected_tags", "")).split(",")]
        tag = context.get("tag")
        named = f"'{tag}'" if outside_reference(tree.tree, path) is None else shown
        return f"there is no type {named}{suggestion(tag, tags)}"
    if kind == "literal_error":
        options = [
            option.strip().strip("'") for option in str(context.get("expected", "")).replace(" or ", ",").split(",")
        ]
        listed = [*options, "null"] if owner is not None and is_optional(owner, str(path[-1])) else options
        return f"{shown} is not one of {', '.join(listed)}{_close(given, options)}"
    if kind == "value_error":
        return f"{shown} {context.get('error')}"
    if kind in ("dataclass_type", "dict_type", "union_tag_not_found"):
        return f"needs settings below it ('key: value' lines), not {shown}"
    if kind in EXPECTED:
        return f"must be {EXPECTED[kind]}, not {shown}"
    if kind == "string_too_short":
        return "must not be empty"
    message = details["msg"].replace("Input should be", "must be")
    return f"{message[0].lower()}{message[1:]}, not {shown}"


def _shown(given: object, path: KeyPath, tree: ConfigTree) -> str:
    """Write a value as Python does, but what comes from outside of the config as its reference: it may be a secret."""
    reference = outside_reference(tree.tree, path)
    if reference is not None:
        return f"the value of {reference}"
    if isinstance(given, dict):
        return f"{{{', '.join(f'{key!r}: {_shown(item, (*path, key), tree)}' for key, item in given.items())}}}"
    if isinstance(given, list):
        return f"[{', '.join(_shown(item, (*path, index), tree) for index, item in enumerate(given))}]"
    text = repr(given)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _close(given: object, options: list[str]) -> str:
    """Return a suggestion among the options with the numbers of what is given: 16bit does not mean 8bit."""
    numbers = re.findall(r"\d+", str(given))
    alike = [option for option in options if not numbers or re.findall(r"\d+", option) == numbers]
    if isinstance(given, int) and len(alike) == 1:
        return f" (did you mean '{alike[0]}'?)"
    text = suggestion(given, alike)
    return text if "did you mean" in text else ""
