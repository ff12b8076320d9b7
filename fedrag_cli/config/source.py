"""Reading YAML: files, `extends`, command-line overrides, and the line on which every value stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._yaml import get_yaml_loader
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from fedrag_cli.config.fields import ComponentSlot, dataclass_at, slots_of, whole_path
from fedrag_cli.config.problems import ConfigProblem, Finding, InvalidConfigError, KeyPath, Position, format_path
from fedrag_cli.config.references import failure, origin, referenced
from fedrag_cli.config.schema import Config
from fedrag_cli.errors import ConfigError

COMMAND_LINE = "command line"
DEFAULT_CONFIG = "fedrag.yaml"

Positions = dict[KeyPath, Position]
Dropped = dict[KeyPath, list[str]]


@dataclass(frozen=True)
class ConfigTree:
    """The merged but unresolved config, where its values came from, and which settings went with another `type:`."""

    main_file: Path
    tree: DictConfig
    positions: Positions
    dropped: Dropped

    def position(self, path: KeyPath) -> Position:
        """Return the place of a value, or of the closest enclosing one that was written down."""
        for length in range(len(path), -1, -1):
            found = self.positions.get(path[:length])
            if found is not None:
                return found
        return Position(str(self.main_file), 1)

    def problems(self, findings: Iterable[Finding]) -> list[ConfigProblem]:
        """Return findings with their places."""
        return [ConfigProblem(self.position(path), format_path(path), message) for path, message in findings]

    def folder(self, path: KeyPath) -> Path | None:
        """Return the folder of the file that names a value; None for defaults and the command line.

        A value that is a reference to another setting counts as named where that one is written.
        """
        position = self.positions.get(origin(self.tree, path))
        return Path(position.file).parent if position is not None and position.line else None

    def dropped_settings(self, path: KeyPath) -> list[str]:
        """Return the names of settings that a component lost when it got another type, and was not given again."""
        return [name for name in self.dropped.get(path, []) if (*path, name) not in self.positions]


def read_tree(path: Path, overrides: Sequence[str]) -> ConfigTree:
    """Read a YAML file with all that it extends, and put the overrides (`key.path=value`, values in YAML) on top."""
    dropped: Dropped = {}
    tree, positions = _read_with_bases(path, (), dropped)
    for override in overrides:
        tree = _apply_override(tree, positions, dropped, override)
    _fill_in_defaults(tree)
    return ConfigTree(path, tree, positions, dropped)


def _read_with_bases(path: Path, chain: tuple[Path, ...], dropped: Dropped) -> tuple[DictConfig, Positions]:
    if (here := whole_path(path)) in chain:
        names = " -> ".join(str(link) for link in (*chain, here))
        raise ConfigError(f"'extends' goes in a circle: {names}", "Remove one of the 'extends' lines.")
    tree, positions = _read_file(path)
    place = positions.pop(("extends",), Position(str(path), 1))
    try:
        base_name = tree.pop("extends", None)
    except (OmegaConfBaseException, ValueError, KeyError) as error:
        raise _invalid(place, failure(error), "extends") from error
    if base_name is None:
        return tree, positions
    if not isinstance(base_name, str) or "\0" in base_name:
        raise _invalid(place, "must be the path of one YAML file", "extends")
    base, base_positions = _read_with_bases(path.parent / base_name, (*chain, here), dropped)
    _drop_replaced_components(base, tree, base_positions, dropped)
    return _merge(base, tree), base_positions | positions


def _read_file(path: Path) -> tuple[DictConfig, Positions]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            f"There is no config file '{path}'.", "Give the path of a YAML file, or make one with 'fedrag init DIR'."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"The config file '{path}' is not UTF-8 text: the byte 0x{error.object[error.start]:02x} at offset "
            f"{error.start} cannot be decoded.",
            "Save the file as UTF-8.",
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The config file '{path}' cannot be read: {error}", "Give the path of a YAML file."
        ) from error
    positions: Positions = {}
    try:
        # The loader of OmegaConf's own `create`, step by step: the nodes know on which lines they stand.
        loader = get_yaml_loader()(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise _invalid(Position(str(path), 1), "holds no settings (expected 'key: value' lines)")
        values = loader.construct_document(node)
        _collect_positions(node, (), str(path), positions)
        return OmegaConf.create(values), positions
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _invalid(Position(str(path), line), f"is no YAML: {error.problem}") from error
    except GrammarParseError as error:
        key = str(getattr(error, "full_key", ""))
        known = {format_path(inner): position for inner, position in positions.items()}
        message = "is a broken reference (write ${oc.env:NAME} or ${section.key}, and \\${ for the characters)"
        raise _invalid(known.get(key, Position(str(path), 1)), message, key) from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise _invalid(Position(str(path), 1), f"is no YAML: {_first_line(error)}") from error


def _invalid(position: Position, message: str, key: str = "") -> InvalidConfigError:
    return InvalidConfigError([ConfigProblem(position, key, message)])


def _collect_positions(node: yaml.Node, path: KeyPath, file: str, positions: Positions) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, key.value)
            positions[inner] = Position(file, key.start_mark.line + 1)
            _collect_positions(value, inner, file, positions)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            positions[(*path, index)] = Position(file, value.start_mark.line + 1)
            _collect_positions(value, (*path, index), file, positions)


def _apply_override(tree: DictConfig, positions: Positions, dropped: Dropped, override: str) -> DictConfig:
    key, separator, _ = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(
            f"'{override}' is no override.", "Write overrides as key.path=value, for instance trainer.mode=generator."
        )
    try:
        change = OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError(
            f"The override '{override}' cannot be read: {_first_line(error)}.",
            "Write its value as in YAML, in quotes where needed.",
        ) from error
    _drop_replaced_components(tree, change, positions, dropped)
    _place_override(change, (), Position(f"{COMMAND_LINE} ({override})", 0), positions)
    return _merge(tree, change)


def _place_override(section: DictConfig, path: KeyPath, place: Position, positions: Positions) -> None:
    """Note that the values of a section come from the command line; a section itself only adds to what is there."""
    for key in section:
        inner, value = (*path, str(key)), _raw(section, key)
        if isinstance(value, DictConfig):
            positions.setdefault(inner, place)
            _place_override(value, inner, place, positions)
        else:
            _forget(positions, inner)
            positions[inner] = place


def _forget(positions: Positions, path: KeyPath) -> None:
    """Forget where a value and all below it came from."""
    for known in [known for known in positions if known[: len(path)] == path]:
        del positions[known]


def _drop_replaced_components(
    base: DictConfig,
    change: DictConfig,
    positions: Positions,
    dropped: Dropped,
    path: KeyPath = (),
    owner: type | None = Config,
) -> None:
    """Drop a base's component where the change names another `type:`, so that settings of the old one do not linger."""
    for key in list(change.keys()):
        old, new = _raw(base, key), _raw(change, key)
        if not isinstance(old, DictConfig) or not isinstance(new, DictConfig):
            continue
        inner = (*path, str(key))
        slots = list(slots_of(owner, str(key))) if owner is not None else []
        default = next((slot.default for slot in slots if isinstance(slot, ComponentSlot)), None)
        if "type" in new and _raw(new, "type") != (_raw(old, "type") or default):
            dropped.setdefault(inner, []).extend(str(name) for name in old if name != "type")
            del base[key]
            _forget(positions, inner)
        else:
            section = next((slot for slot in slots if isinstance(slot, type)), None)
            _drop_replaced_components(old, new, positions, dropped, inner, section)


def _fill_in_defaults(tree: DictConfig) -> None:
    """Set what references name and nobody has set to the schema's defaults, so that the references can be followed."""
    written = OmegaConf.to_container(tree, resolve=False)
    for path, text in _texts(written, ()):
        for target in referenced(text, path):
            default = _default_of(written, target)
            if default is not dataclasses.MISSING:
                OmegaConf.update(tree, format_path(target), default)


def _texts(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _texts(item, (*path, key))


def _default_of(written: Any, path: KeyPath) -> Any:
    """Return the schema's default of a setting that is not written; MISSING where it is, or where there is none."""
    owner: type | None = Config
    for place, key in enumerate(path, start=1):
        field = next((field for field in dataclasses.fields(owner) if field.name == key), None) if owner else None
        if field is None or owner is None or not isinstance(written, dict):
            return dataclasses.MISSING
        if key in written:
            written = written[key]
            owner = dataclass_at(owner, field.name, written)
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        if place == len(path):
            return dataclasses.MISSING if dataclasses.is_dataclass(default) else default
        # A section that is off by default stays off.
        owner, written = (type(default), {}) if dataclasses.is_dataclass(default) else (None, {})
    return dataclasses.MISSING


def _raw(tree: DictConfig, key: Any) -> Any:
    """Return a value without resolving interpolations."""
    if key not in tree.keys():  # noqa: SIM118  (membership of a DictConfig hides keys whose value is missing)
        return None
    node = tree._get_node(key)
    return node if isinstance(node, DictConfig) else getattr(node, "_value", lambda: None)()


def _merge(base: DictConfig, change: DictConfig) -> DictConfig:
    try:
        merged = OmegaConf.merge(base, change)
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(
            f"The config cannot be put together: {_first_line(error)}.",
            "Where one file or override has a list, another cannot have 'key: value' settings, and the reverse.",
        ) from error
    assert isinstance(merged, DictConfig)
    return merged


def _first_line(error: Exception) -> str:
    """Return in a line why YAML cannot be read."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error).partition("\n")[0] or type(error).__name__
