"""A MkDocs hook that writes the tables of settings.md from the config's JSON Schema, so that the two cannot differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA = Path(__file__).resolve().parents[1] / "configs" / "fedrag.schema.json"
PAGE = "settings.md"
INTERPOLATION = r"\$\{.+\}"
NAMES_IN_YAML = {"array": "list", "object": "mapping"}


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Append the tables to their page."""
    return f"{markdown}\n{settings_tables()}" if page.file.src_uri == PAGE else markdown


def settings_tables() -> str:
    """Return a table for each part of the config, in the order of the schema."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    places: dict[str, str] = {}
    _find_places("", schema["properties"], schema["$defs"], places)
    tables = [_table(schema["properties"], schema["$defs"], places)]
    for name, path in places.items():
        part = schema["$defs"][name]
        kind = _type_of(part)
        heading = f"## `{path}`" + (f", `type: {kind}`" if kind else "")
        tables.append(f"{heading} {{ #{_anchor(path, part)} }}\n\n{part['description']}")
        tables.append(_table(part["properties"], schema["$defs"], places))
    return "\n\n".join(tables) + "\n"


def _find_places(path: str, properties: dict[str, Any], parts: dict[str, Any], places: dict[str, str]) -> None:
    """Fill in the key path at which each part of the config comes first."""
    for setting, about in properties.items():
        for name in filter(None, map(_part_of, _options(about))):
            if name not in places:
                places[name] = f"{path}{setting}"
                _find_places(f"{path}{setting}.", parts[name]["properties"], parts, places)


def _options(about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a setting may be; that any may be an interpolation is said once, in the text of the page."""
    options = about.get("anyOf") or about.get("oneOf") or [about]
    return [option for option in options if option.get("pattern") != INTERPOLATION]


def _part_of(option: dict[str, Any]) -> str | None:
    return option["$ref"].rpartition("/")[2] if "$ref" in option else None


def _type_of(part: dict[str, Any]) -> str | None:
    kind: str | None = part["properties"].get("type", {}).get("const")
    return kind


def _anchor(path: str, part: dict[str, Any]) -> str:
    return "-".join([*path.split("."), *filter(None, [_type_of(part)])])


def _table(properties: dict[str, Any], parts: dict[str, Any], places: dict[str, str]) -> str:
    rows = ["| setting | values | default | what it does |", "| --- | --- | --- | --- |"]
    for setting, about in properties.items():
        values = ", ".join(dict.fromkeys(_values(option, parts, places) for option in _options(about)))
        default = f"`{json.dumps(about['default'])}`" if "default" in about else ""
        cells = (f"`{setting}`", values, default, about["description"])
        rows.append(f"| {' | '.join(_cell(text) for text in cells)} |")
    return "\n".join(rows)


def _values(option: dict[str, Any], parts: dict[str, Any], places: dict[str, str]) -> str:
    name = _part_of(option)
    if name is not None:
        return f"[{_type_of(parts[name]) or 'section'}](#{_anchor(places[name], parts[name])})"
    literals = [option["const"]] if "const" in option else option.get("enum")
    if literals:
        return ", ".join(f"`{value}`" for value in literals)
    return NAMES_IN_YAML.get(option["type"], option["type"])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
