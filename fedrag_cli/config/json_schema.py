"""The config's JSON Schema, for editors that complete and check YAML."""

from __future__ import annotations

import dataclasses
from typing import Any

from fedrag_cli.config.fields import slots_of
from fedrag_cli.config.listing import setting_help
from fedrag_cli.config.schema import Config
from fedrag_cli.config.validation import config_adapter
from fedrag_cli.registry import registry

DIALECT = "https://json-schema.org/draft/2020-12/schema"
INTERPOLATION = {"type": "string", "pattern": r"\$\{.+\}"}


def config_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a config file, with the registered components.

    Every setting may also be an interpolation (`${...}`), and nothing is required at the top, because a file may
    extend another one.
    """
    schema = config_adapter().json_schema()
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
