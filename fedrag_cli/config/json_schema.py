"""The config's JSON Schema for editors, and its settings for people."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
from pathlib import Path
from typing import Any

from fedrag_cli.config.fields import adapter_of, slots_of
from fedrag_cli.config.schema import Config
from fedrag_cli.registry import registry


def component_settings(config_class: type) -> list[dict[str, Any]]:
    """Return name, default and help of each setting of a config dataclass."""
    schema = adapter_of(config_class).json_schema()
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
            help |= _docstrings(base)
    settings = [field.name for field in dataclasses.fields(config_class)]
    return {name: text for name, text in help.items() if name in settings}


@functools.cache
def _docstrings(owner: type) -> dict[str, str]:
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


DIALECT = "https://json-schema.org/draft/2020-12/schema"
INTERPOLATION = {"type": "string", "pattern": r"\$\{.+\}"}


def config_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a config file, with the registered components.

    Every setting may also be an interpolation (`${...}`), and nothing is required at the top, because a file may
    extend another one.
    """
    schema = adapter_of(Config).json_schema()
    definitions = schema.pop("$defs")
    helps = {owner.__name__: setting_help(owner) for owner in _config_classes()}
    for name, definition in definitions.items():
        for setting, help in helps.get(name, {}).items():
            definition["properties"][setting].setdefault("description", help)
        definition.pop("required", None)
        definition["properties"] = {
            setting: _or_interpolation(field) for setting, field in definition.get("properties", {}).items()
        }
    schema.pop("required", None)
    for setting, help in helps[Config.__name__].items():
        schema["properties"][setting].setdefault("description", help)
    extends = {"type": "string", "description": "Path of a config that this one builds on."}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    return {"$schema": DIALECT, **schema, "$defs": definitions}


def _config_classes() -> set[type]:
    """Return the dataclasses of the whole config, those of the registered components included."""
    found: set[type] = set()
    waiting: list[type] = [Config, *(component.config_class for component in registry().all())]
    while waiting:
        owner = waiting.pop()
        found.add(owner)
        inner = (slot for field in dataclasses.fields(owner) for slot in slots_of(owner, field.name))
        waiting.extend(slot for slot in inner if isinstance(slot, type) and slot not in found)
    return found


def _or_interpolation(field: dict[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
    if field.get("type") == "string" or "const" in field:
        return {**about, **field} if "const" in field else {**about, "anyOf": [field, INTERPOLATION]}
    return {**about, "anyOf": [*_options(field), INTERPOLATION]}


def _options(field: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a field may be; without a `type:` several components fit, so exactly one (`oneOf`) asks too much."""
    options = field.get("anyOf") or field.get("oneOf")
    return [field] if options is None else [inner for option in options for inner in _options(option)]
