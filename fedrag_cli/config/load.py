"""Loading a config: read, resolve, validate, check, and make its paths absolute."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedrag_cli.config.checks import check_config
from fedrag_cli.config.paths import absolute_paths
from fedrag_cli.config.problems import ConfigProblem, InvalidConfigError, KeyPath, format_path
from fedrag_cli.config.schema import Config
from fedrag_cli.config.source import DEFAULT_CONFIG, ConfigTree, read_tree
from fedrag_cli.config.validation import validate_values


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
        values = _plain(self.config)
        for path, expression in _interpolations(self.tree.tree, ()):
            _put_reference(values, path, expression, self.tree.folder(path))
        return OmegaConf.to_yaml(OmegaConf.create(values), resolve=False, sort_keys=False)


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
    problems = unresolved + [problem for problem in problems if problem.path not in broken]
    if config is not None and not problems:
        config = absolute_paths(config, tree)
        problems = [
            ConfigProblem(tree.position(path), format_path(path), message) for path, message in check_config(config)
        ]
    if problems or config is None:
        raise InvalidConfigError(problems)
    return ConfigSource(config, tree)


def _resolve(tree: ConfigTree) -> tuple[dict[str, Any], list[ConfigProblem]]:
    """Resolve every interpolation by itself, so that all that fail are reported at once."""
    problems: list[ConfigProblem] = []

    def resolve(node: DictConfig | ListConfig, key: Any, path: KeyPath) -> Any:
        try:
            value = node[key]
        except (OmegaConfBaseException, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            problems.append(ConfigProblem(tree.position(path), format_path(path), reason))
            return None
        if isinstance(value, DictConfig):
            return {str(inner): resolve(value, inner, (*path, str(inner))) for inner in value}
        if isinstance(value, ListConfig):
            return [resolve(value, index, (*path, index)) for index in range(len(value))]
        return value

    values = {str(key): resolve(tree.tree, key, (str(key),)) for key in tree.tree}
    return values, problems


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _interpolations(node: DictConfig | ListConfig, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    keys = list(node.keys()) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        inner = (*path, str(key) if isinstance(node, DictConfig) else key)
        if OmegaConf.is_interpolation(node, key):
            child = node._get_node(key)
            yield inner, str(child._value())  # type: ignore[union-attr]
            continue
        child = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(child, DictConfig | ListConfig):
            yield from _interpolations(child, inner)


def _put_reference(values: Any, path: KeyPath, expression: str, folder: Path | None) -> None:
    for key in path[:-1]:
        values = values[key]
    resolved = values[path[-1]]
    # A relative reference would be resolved against the place of the written file, so its folder goes in front.
    if folder is not None and isinstance(resolved, str) and _lies_in(resolved, folder):
        expression = f"{folder.resolve()}/{expression}"
    values[path[-1]] = expression


def _lies_in(resolved: str, folder: Path) -> bool:
    return Path(resolved).is_absolute() and Path(resolved).is_relative_to(folder.resolve())
