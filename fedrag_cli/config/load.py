"""Loading a config: read, resolve, validate, check, and make its paths absolute; what it names that is not there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedrag_cli.config.fields import (
    ModelMarker,
    OutputPathMarker,
    PathMarker,
    SecretMarker,
    is_folder,
    is_there,
    locate_model,
    markers_of,
    whole_path,
)
from fedrag_cli.config.problems import ConfigProblem, InvalidConfigError, KeyPath, format_path, in_order
from fedrag_cli.config.references import (
    escape,
    expression,
    failure,
    origin,
    outside_reference,
    resolved,
    without_values,
)
from fedrag_cli.config.schema import Config
from fedrag_cli.config.source import DEFAULT_CONFIG, ConfigTree, read_tree
from fedrag_cli.config.validation import check_config, validate_values
from fedrag_cli.errors import ModelError

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
    found = [
        *_missing_data_files(config),
        *_missing_models(config.rag_system, ("rag_system",)),
        *_without_training(config),
    ]
    return [ConfigProblem(tree.position(path), format_path(path), message) for path, message in found]


def _missing_data_files(config: Config) -> Iterator[tuple[KeyPath, str]]:
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


_MOST_LEVELS = 32
_FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*\w+\s*\}")


@dataclass(frozen=True)
class ConfigSource:
    """A loaded config together with what it was loaded from."""

    config: Config
    tree: ConfigTree

    def to_yaml(self) -> str:
        """Write the whole config with defaults and absolute paths; interpolations stay references.

        Keeping references keeps secrets out of the file: a value that came from the environment is read from there
        again when the file is loaded.
        """
        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()), resolve=False, sort_keys=False)

    def to_dict(self) -> dict[str, Any]:
        """Return what `to_yaml` writes."""
        values: dict[str, Any] = self._with_references(self.config, ())
        return values

    def outside_values(self) -> dict[str, tuple[str, Any]]:
        """Return the settings that come from outside of the config, such as the environment.

        Returns:
            By key path, the reference as `to_yaml` writes it, and the value that it has now as JSON can hold it.
        """
        return dict(self._outside_values(self.config, ()))

    def _outside_values(self, value: Any, path: KeyPath) -> Iterator[tuple[str, tuple[str, Any]]]:
        reference = self._reference(value, path)
        if reference is not None:
            plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
            yield format_path(path), (reference, plain)
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                yield from self._outside_values(getattr(value, field.name), (*path, field.name))
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                yield from self._outside_values(item, (*path, index))

    def _reference(self, value: Any, path: KeyPath) -> str | None:
        reference = expression(self.tree.tree, path) if path else None
        return None if reference is None else self._folder_of_reference(value, path) + reference

    def _with_references(self, value: Any, path: KeyPath) -> Any:
        reference = self._reference(value, path)
        if reference is not None:
            return reference
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
            return {name: self._with_references(getattr(value, name), (*path, name)) for name in names}
        if isinstance(value, list | tuple):
            return [self._with_references(item, (*path, index)) for index, item in enumerate(value)]
        return escape(value) if isinstance(value, str) else value

    def _folder_of_reference(self, value: Any, path: KeyPath) -> str:
        """Return the folder that a relative path counts from, because the written file may lie elsewhere."""
        given = resolved(self.tree.tree, origin(self.tree.tree, path))
        if not isinstance(value, str) or not isinstance(given, str) or given == value or Path(given).is_absolute():
            return ""
        bases = [whole_path(base) for base in (self.tree.folder(path), Path()) if base is not None]
        return next((f"{base}/" for base in bases if str(whole_path(base / given)) == value), "")


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Load and validate a config.

    Args:
        path: The YAML file; `fedrag.yaml` in the current folder by default.
        overrides: `key.path=value` texts that win over the file.

    Returns:
        The config, with defaults filled in, interpolations resolved and paths made absolute.

    Raises:
        InvalidConfigError: All that is wrong, each with file, line and key.
        ConfigError: The file is missing or cannot be read.
    """
    return load_config_with_source(path, overrides).config


def load_config_with_source(path: str | Path | None = None, overrides: Sequence[str] = ()) -> ConfigSource:
    """Load and validate a config, and keep what it was loaded from; see `load_config`."""
    tree = read_tree(Path(path) if path is not None else Path(DEFAULT_CONFIG), overrides)
    values, unresolved = _resolve(tree)
    config, problems = validate_values(values, tree)
    problems += _missing_data(values, tree)
    broken = {problem.path for problem in unresolved}
    problems = in_order(unresolved + [problem for problem in problems if problem.path not in broken])
    if config is not None and not problems:
        config = absolute_paths(config, tree)
        problems = [
            ConfigProblem(tree.position(path), format_path(path), message) for path, message in check_config(config)
        ]
        problems += _written_secrets(config, tree)
    if problems or config is None:
        raise InvalidConfigError([_with_dropped_settings(problem, tree) for problem in problems])
    return ConfigSource(config, tree)


def _with_dropped_settings(problem: ConfigProblem, tree: ConfigTree) -> ConfigProblem:
    """Say where a problem is about a setting that its component lost when it got another type."""
    lost = [
        name
        for path in tree.dropped
        for name in tree.dropped_settings(path)
        if f"{problem.path}.".startswith(f"{format_path(path)}.")
        and re.search(rf"\b{re.escape(name)}\b", f"{problem.path} {problem.message}")
    ]
    if not lost:
        return problem
    message = f"{problem.message} (the change of type dropped the former {', '.join(lost)})"
    return dataclasses.replace(problem, message=message)


def _written_secrets(value: Any, tree: ConfigTree, path: KeyPath = ()) -> list[ConfigProblem]:
    """Return the secrets that stand in a file or on the command line, from where they would get into runs."""
    problems: list[ConfigProblem] = []
    for field in dataclasses.fields(value):
        inner, held = (*path, field.name), getattr(value, field.name)
        if dataclasses.is_dataclass(held):
            problems += _written_secrets(held, tree, inner)
        is_secret = any(isinstance(marker, SecretMarker) for marker in markers_of(type(value), field.name))
        if is_secret and held is not None and not _FROM_ENVIRONMENT.fullmatch(expression(tree.tree, inner) or ""):
            message = "must not be written down; put it into the environment and write ${oc.env:NAME}"
            problems.append(ConfigProblem(tree.position(inner), format_path(inner), message))
    return problems


def _missing_data(values: dict[str, Any], tree: ConfigTree) -> list[ConfigProblem]:
    """Return what is missing of the data.

    The server of a federation can do without any, and an evaluation without context needs no passages.
    """
    dataset, evaluation = values.get("dataset"), values.get("evaluation")
    if values.get("federated") is not None or (dataset is not None and not isinstance(dataset, dict)):
        return []
    path: KeyPath = ("dataset",) if dataset is None else ("dataset", "corpus")
    without_context = isinstance(evaluation, dict) and evaluation.get("context") == "none"
    if dataset is not None and (without_context or dataset.get("corpus") is not None):
        return []
    return [ConfigProblem(tree.position(path), format_path(path), "is required")]


def _resolve(tree: ConfigTree) -> tuple[dict[str, Any], list[ConfigProblem]]:
    """Resolve every interpolation by itself, so that all that fail are reported at once."""
    problems: list[ConfigProblem] = []

    def resolve(node: DictConfig | ListConfig, key: Any, path: KeyPath) -> Any:
        if len(path) > _MOST_LEVELS:
            problems.append(ConfigProblem(tree.position(path), format_path(path), "is nested too deeply"))
            return None
        try:
            value = node[key]
        except (OmegaConfBaseException, ValueError, KeyError) as error:
            message = without_values(failure(error), outside_reference(tree.tree, path) or "")
            problems.append(ConfigProblem(tree.position(path), format_path(path), message))
            return None
        if isinstance(value, DictConfig):
            return {str(inner): resolve(value, inner, (*path, str(inner))) for inner in value}
        if isinstance(value, ListConfig):
            return [resolve(value, index, (*path, index)) for index in range(len(value))]
        return value

    values = {str(key): resolve(tree.tree, key, (str(key),)) for key in tree.tree}
    return values, problems
