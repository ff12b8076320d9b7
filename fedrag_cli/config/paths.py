"""Making the config's paths absolute, so that a run can be resumed from anywhere."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from fedrag_cli.config.fields import ModelMarker, OutputPathMarker, PathMarker, is_there, markers_of, whole_path
from fedrag_cli.config.problems import KeyPath
from fedrag_cli.config.source import ConfigTree

T = TypeVar("T")


def absolute_paths(config: T, tree: ConfigTree, path: KeyPath = ()) -> T:
    """Return a copy of a config dataclass with absolute paths.

    Args:
        config: Any config dataclass.
        tree: Where its values came from; a relative path counts from the folder of the file that names it, and from
            the current folder where the command line names it. Output folders always count from the current folder.
        path: The dataclass's place in the whole config.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, inner = getattr(config, field.name), (*path, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = absolute_paths(value, tree, inner)
        elif isinstance(value, str):
            changes[field.name] = _absolute(value, markers_of(type(config), field.name), tree.folder(inner) or Path())
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _absolute(value: str, markers: tuple[object, ...], folder: Path) -> str:
    if any(isinstance(marker, OutputPathMarker) for marker in markers):
        return str(whole_path(Path(value).expanduser()))
    if any(isinstance(marker, PathMarker) for marker in markers):
        return str(whole_path(folder / Path(value).expanduser()))
    if any(isinstance(marker, ModelMarker) for marker in markers):
        return _absolute_model(value, folder)
    return value


def _absolute_model(reference: str, folder: Path) -> str:
    """Resolve a reference that is meant as a path; what is neither written as one nor exists is a hub id."""
    if "://" in reference:
        return reference
    candidate = whole_path(folder / Path(reference).expanduser())
    written_as_path = reference.startswith((".", "/", "~")) or reference.endswith(".gguf")
    return str(candidate) if written_as_path or is_there(candidate) else reference
