"""The settings of a config dataclass, for people and for editors to read."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter


def component_settings(config_class: type) -> list[dict[str, Any]]:
    """Return name, default and help of each setting of a config dataclass.

    Args:
        config_class: A dataclass made with `config_class`.
    """
    schema = TypeAdapter(config_class).json_schema()
    required, help = set(schema.get("required", ())), setting_help(config_class)
    return [
        {"name": name, "required": name in required, "default": field.get("default"), "help": help.get(name, "")}
        for name, field in schema["properties"].items()
        if name != "type"
    ]


def setting_help(config_class: type) -> dict[str, str]:
    """Return the help of each setting: the docstring below its field, inherited ones included."""
    help: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(base):
            help |= _field_docstrings(base)
    return help


@functools.cache
def _field_docstrings(owner: type) -> dict[str, str]:
    try:
        body = _class_bodies(inspect.getsourcefile(owner) or "").get(owner.__qualname__, [])
    except (OSError, TypeError, SyntaxError):
        return {}
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


@functools.cache
def _class_bodies(file: str) -> dict[str, list[ast.stmt]]:
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    return {node.name: node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
