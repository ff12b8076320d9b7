"""The settings of a config dataclass, for people and for editors to read."""

from __future__ import annotations

import dataclasses
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
    """Return the help of each setting; pydantic knows only those that the class itself writes, not inherited ones."""
    help: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(base):
            properties = TypeAdapter(base).json_schema()["properties"]
            help |= {name: field["description"] for name, field in properties.items() if "description" in field}
    return help
