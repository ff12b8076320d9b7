"""References in a config (`${run.name}`, `${oc.env:TOKEN}`): where they lead, and what to say where one fails."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationToMissingValueError,
    KeyValidationError,
    MissingMandatoryValue,
    UnsupportedInterpolationType,
)

from fedrag_cli.config.problems import KeyPath

_SETTING = re.compile(r"(?<!\\)\$\{\s*(\.*)([A-Za-z_]\w*(?:\.\w+|\[\d+\])*)\s*\}")
_RESOLVER = re.compile(r"(?<!\\)\$\{\s*[\w.]+\s*:")
_MOST_STEPS = 32


def origin(tree: DictConfig, path: KeyPath) -> KeyPath:
    """Return where a value is written: `path` itself, or the place that references to other settings lead to."""
    for _ in range(_MOST_STEPS):
        length, text = _first_reference(tree, path)
        match = _SETTING.fullmatch(text)
        if match is None:
            return path
        path = (*_target(match, path[:length]), *path[length:])
    return path


def expression(tree: DictConfig, path: KeyPath) -> str | None:
    """Return the text behind a value that a resolver such as `oc.env` gives, references to other settings written out.

    None where the value depends on no resolver, or is a part of what one gives.
    """
    path = origin(tree, path)
    length, text = _first_reference(tree, path)
    if length < len(path):
        return None
    for _ in range(_MOST_STEPS):
        written_out = _SETTING.sub(lambda match: _raw_text(tree, origin(tree, _target(match, path)), match[0]), text)
        if written_out == text:
            break
        text = written_out
    return text if _RESOLVER.search(text) else None


def referenced(text: str, path: KeyPath) -> Iterator[KeyPath]:
    """Yield the settings that a text at a path names, as in `${run.name}`."""
    yield from (_target(match, path) for match in _SETTING.finditer(text))


def outside_reference(tree: DictConfig, path: KeyPath) -> str | None:
    """Return the text behind a value that a resolver gives, as `expression`, or that is a part of what one gives."""
    found = (expression(tree, path[:length]) for length in range(1, len(path) + 1))
    return next((text for text in found if text is not None), None)


def without_values(text: str, reference: str) -> str:
    """Return a text with the values of the environment variables that a reference names replaced by their names."""
    for name in re.findall(r"oc\.env\s*:\s*(\w+)", reference):
        value = os.environ.get(name)
        text = text.replace(value, f"${{oc.env:{name}}}") if value else text
    return text


def failure(error: Exception) -> str:
    """Return in words why a reference cannot be resolved."""
    text = str(error).partition("\n")[0]
    if match := re.search(r"Environment variable '(.+)' not found", text):
        return f"the environment variable '{match[1]}' is not set"
    if isinstance(error, MissingMandatoryValue | InterpolationToMissingValueError):
        return "has no value yet ('???')"
    if isinstance(error, InterpolationKeyError) and (match := re.search(r"'(.+?)' not found", text)):
        meant = f" (write ${{oc.env:{match[1]}}} for the environment variable)" if match[1] in os.environ else ""
        return f"refers to '{match[1]}', which the config does not set{meant}"
    if match := re.search(r"Error resolving key '(.+?)'", text):
        return f"refers to '{match[1]}', which leads out of the config"
    if isinstance(error, UnsupportedInterpolationType):
        name = text.rpartition(" ")[2]
        return f"has the unknown resolver '{name}' (write ${{oc.env:NAME}} for an environment variable)"
    if text.startswith("GrammarParseError"):
        # Its own text quotes a piece of what it could not read.
        return "stands for a text that cannot be read as a value"
    if "Recursive interpolation" in text:
        return "refers to itself"
    return text[:1].lower() + text[1:]


def _first_reference(tree: DictConfig, path: KeyPath) -> tuple[int, str]:
    """Return the first reference on the way to a value, and how many keys lead to it; an empty text where is none."""
    node: Any = tree
    for length, key in enumerate(path, start=1):
        if not isinstance(node, DictConfig | ListConfig) or node._is_none() or node._is_missing():
            break
        try:
            child = node._get_node(key)  # type: ignore[arg-type]
        except (KeyError, IndexError, KeyValidationError):
            break
        if child is not None and child._is_interpolation():  # type: ignore[union-attr]
            return length, str(child._value())  # type: ignore[union-attr]
        node = child
    return len(path), ""


def _target(match: re.Match[str], path: KeyPath) -> KeyPath:
    keys = tuple(int(key[1:]) if key[0] == "[" else key for key in re.findall(r"\w+|\[\d+", match[2]))
    return (*path[: -len(match[1])], *keys) if match[1] else keys


def _raw_text(tree: DictConfig, path: KeyPath, otherwise: str) -> str:
    """Return the text of a value before references are followed; another text where there is no value."""
    _, text = _first_reference(tree, path)
    value = text or resolved(tree, path)
    return otherwise if value is None else str(value)


def escape(text: str) -> str:
    """Return a text as it has to be written so that it is read as itself, not as a reference."""
    return text.replace("${", "\\${")


def resolved(tree: DictConfig, path: KeyPath) -> Any:
    """Return the value of a path, references followed; None where there is none."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    return OmegaConf.select(tree, key)
