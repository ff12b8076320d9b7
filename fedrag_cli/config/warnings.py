"""What is right in a config, but not there: files, models and data that a command would miss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedrag_cli.config.fields import ModelMarker, PathMarker, is_folder, is_there, markers_of
from fedrag_cli.config.models import locate_model
from fedrag_cli.config.problems import ConfigProblem, KeyPath, format_path
from fedrag_cli.config.schema import Config
from fedrag_cli.config.source import ConfigTree
from fedrag_cli.errors import ModelError

# Sources that are one file, and those that are a folder.
_FILES = ("file", "squad")
_FOLDERS = ("beir",)


def config_warnings(config: Config, tree: ConfigTree) -> list[ConfigProblem]:
    """Return what a config names and is not there, and what training would miss.

    These are no errors: the files may be made, and the package be installed, on the machine that runs the config.

    Args:
        config: A loaded config, its paths absolute.
        tree: Where its values came from.
    """
    found = [*_missing_data(config), *_missing_models(config.rag_system, ("rag_system",)), *_without_training(config)]
    return [ConfigProblem(tree.position(path), format_path(path), message) for path, message in found]


def _missing_data(config: Config) -> Iterator[tuple[KeyPath, str]]:
    for field in dataclasses.fields(config.dataset):
        source = getattr(config.dataset, field.name)
        for name, value in _marked(source, PathMarker, ModelMarker):
            path, where = Path(value), ("dataset", field.name, name)
            # A hub id is no path; absolute_paths has made paths absolute.
            if not path.is_absolute():
                continue
            if not is_there(path):
                yield where, f"'{path}' does not exist"
            elif source.type in _FILES and path.is_dir():
                yield where, f"'{path}' is a folder, but a file is expected"
            elif source.type in _FOLDERS and not path.is_dir():
                yield where, f"'{path}' is a file, but a folder is expected"


def _missing_models(section: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _missing_models(value, (*path, field.name))
    adapter = getattr(section, "adapter", None)
    if adapter is not None and not is_folder(adapter):
        yield (*path, "adapter"), f"there is no folder '{adapter}'"
    for name, reference in _marked(section, ModelMarker):
        try:
            locate_model(reference)
        except ModelError as error:
            yield (*path, name), error.message.rstrip(".")


def _without_training(config: Config) -> Iterator[tuple[KeyPath, str]]:
    if config.dataset.train is None and config.federated is None:
        yield ("dataset", "train"), "is not set; all commands but those that train can do without"


def _marked(section: Any, *markers: type) -> Iterator[tuple[str, str]]:
    """Yield names and values of a section's texts that have one of the markers."""
    for field in dataclasses.fields(section) if section is not None else ():
        value = getattr(section, field.name)
        if isinstance(value, str) and any(
            isinstance(found, markers) for found in markers_of(type(section), field.name)
        ):
            yield field.name, value
