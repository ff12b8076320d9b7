"""Loading a config: read, resolve, validate, check, and make its paths absolute; what it names that is not there."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedrag_cli.config.fields import Marker, is_folder, is_there, locate_model, markers_of, whole_path
from fedrag_cli.config.problems import ConfigProblem, Finding, InvalidConfigError, KeyPath, format_path, in_order
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
        return self._written[0]

    def outside_values(self) -> dict[str, tuple[str, Any]]:
        """Return the settings that come from outside of the config, such as the environment.

        Returns:
            By key path, the reference as `to_yaml` writes it, and the value that it has now as JSON can hold it.
        """
        return self._written[1]

    @cached_property
    def _written(self) -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
        outside: dict[str, tuple[str, Any]] = {}
        return self._with_references(self.config, (), outside), outside

    def _with_references(self, value: Any, path: KeyPath, outside: dict[str, tuple[str, Any]]) -> Any:
        """Return a value as it is written, and note what comes from outside."""
        reference = expression(self.tree.tree, path) if path else None
        if reference is not None:
            reference = self._folder_of_reference(value, path) + reference
            plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
            outside[format_path(path)] = reference, plain
            return reference
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
            return {name: self._with_references(getattr(value, name), (*path, name), outside) for name in names}
        if isinstance(value, list | tuple):
            return [self._with_references(item, (*path, index), outside) for index, item in enumerate(value)]
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
    broken = {problem.path for problem in unresolved}
    problems = [problem for problem in problems + _missing_data(values, tree) if problem.path not in broken]
    problems = in_order(unresolved + problems)
    if config is not None and not problems:
        config = absolute_paths(config, tree)
        problems = in_order(tree.problems([*check_config(config), *_written_secrets(config, tree)]))
    if problems or config is None:
        raise InvalidConfigError([_with_dropped_settings(problem, tree) for problem in problems])
    return ConfigSource(config, tree)


def absolute_paths(config: T, tree: ConfigTree, path: KeyPath = ()) -> T:
    """Return a copy of a config dataclass, which stands at a path of the whole config, with absolute paths.

    A relative one counts from the folder of the file that names it, and from the current folder where the command line
    does; output folders always count from the current folder.
    """
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, inner = getattr(config, field.name), (*path, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = absolute_paths(value, tree, inner)
        elif isinstance(value, str):
            changes[field.name] = _absolute(value, markers_of(type(config), field.name), tree.folder(inner) or Path())
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _absolute(value: str, markers: Sequence[Any], folder: Path) -> str:
    if Marker.OUTPUT_PATH in markers:
        return str(whole_path(Path(value).expanduser()))
    is_model = Marker.MODEL in markers and "://" not in value
    if not is_model and Marker.PATH not in markers:
        return value
    path = whole_path(folder / Path(value).expanduser())
    # What is neither written as a path nor exists is a hub id.
    written_as_path = value.startswith((".", "/", "~")) or value.endswith(".gguf")
    return value if is_model and not written_as_path and not is_there(path) else str(path)


def config_warnings(config: Config, tree: ConfigTree) -> list[ConfigProblem]:
    """Return what a loaded config names and is not there, and what training would miss.

    These are no errors: the files may be made, and the package be installed, on the machine that runs the config.
    """
    found = [
        (path, message)
        for path, value, markers in _texts(config)
        if (message := _missing(path[0], value, markers)) is not None
    ]
    if config.dataset.train is None and config.federated is None:
        found.append((("dataset", "train"), "is not set; all commands but those that train can do without"))
    return tree.problems(found)


def _missing(section: str | int, value: str, markers: Sequence[Any]) -> str | None:
    """Return what is wrong with the file, folder or model that a text of a section names."""
    if section == "rag_system" and Marker.MODEL in markers:
        try:
            locate_model(value)
        except ModelError as error:
            return error.message.rstrip(".")
    if section == "rag_system" and Marker.FOLDER in markers and not is_folder(value):
        return f"there is no folder '{value}'"
    # A hub id is no path; absolute_paths has made paths absolute.
    if section != "dataset" or not {Marker.PATH, Marker.MODEL} & set(markers) or not Path(value).is_absolute():
        return None
    if not is_there(value):
        return f"'{value}' does not exist"
    if Marker.FILE in markers and is_folder(value):
        return f"'{value}' is a folder, but a file is expected"
    if Marker.FOLDER in markers and not is_folder(value):
        return f"'{value}' is a file, but a folder is expected"
    return None


def _written_secrets(config: Config, tree: ConfigTree) -> Iterator[Finding]:
    """Yield the secrets that stand in a file or on the command line, from where they would get into runs."""
    for path, _, markers in _texts(config):
        if Marker.SECRET in markers and not _FROM_ENVIRONMENT.fullmatch(expression(tree.tree, path) or ""):
            yield path, "must not be written down; put it into the environment and write ${oc.env:NAME}"


def _texts(section: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str, list[Any]]]:
    """Yield key path, value and markers of each text of a section."""
    for field in dataclasses.fields(section):
        value, inner = getattr(section, field.name), (*path, field.name)
        if dataclasses.is_dataclass(value):
            yield from _texts(value, inner)
        elif isinstance(value, str):
            yield inner, value, markers_of(type(section), field.name)


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
    return tree.problems([(path, "is required")])


def _resolve(tree: ConfigTree) -> tuple[dict[str, Any], list[ConfigProblem]]:
    """Resolve every interpolation by itself, so that all that fail are reported at once."""
    problems: list[Finding] = []

    def resolve(node: DictConfig | ListConfig, key: Any, path: KeyPath) -> Any:
        if len(path) > _MOST_LEVELS:
            problems.append((path, "is nested too deeply"))
            return None
        try:
            value = node[key]
        except (OmegaConfBaseException, ValueError, KeyError) as error:
            problems.append((path, without_values(failure(error), outside_reference(tree.tree, path) or "")))
            return None
        if isinstance(value, DictConfig):
            return {str(inner): resolve(value, inner, (*path, str(inner))) for inner in value}
        if isinstance(value, ListConfig):
            return [resolve(value, index, (*path, index)) for index in range(len(value))]
        return value

    values = {str(key): resolve(tree.tree, key, (str(key),)) for key in tree.tree}
    return values, tree.problems(problems)
