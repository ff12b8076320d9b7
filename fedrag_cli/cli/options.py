"""Options and arguments that several commands share."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedrag_cli.errors import ConfigError

if TYPE_CHECKING:
    from fedrag_cli.config import ConfigSource

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print tracebacks and the libraries' warnings.")]
ConfigArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG] [KEY=VALUE]...",
        help="YAML file (fedrag.yaml by default), and settings that win over it, such as trainer.mode=generator.",
    ),
]

ConfigOrRunArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG_OR_RUN] [KEY=VALUE]...",
        help="YAML file (fedrag.yaml by default) or run directory, and settings that win over it.",
    ),
]
ConfidenceOption = Annotated[
    float | None,
    typer.Option(
        "--confidence", min=0.5, max=0.999, help="Level of the intervals; by default that of the first run's config."
    ),
]
AddressOption = Annotated[
    str, typer.Option("--address", "-a", metavar="HOST:PORT", help="Where the federation's server is.")
]

_OVERRIDE = re.compile(r"^[A-Za-z_]\w*(\.\w+)*=")


@dataclass(frozen=True)
class Arguments:
    """Positional arguments by meaning: a config or run directory, `key.path=value` texts, and what is neither."""

    path: Path | None
    overrides: list[str]
    rest: list[str]


def sort_arguments(arguments: Sequence[str] | None, *, most_rest: int = 0) -> Arguments:
    """Tell path, overrides and at most so many further texts apart.

    Where a command takes further texts, such as a question, an override is what names a setting of the config: a
    question may have an equals sign too.
    """
    from fedrag_cli.config.fields import is_there

    overrides: list[str] = []
    others: list[str] = []
    for argument in arguments or ():
        is_override = _is_setting(argument) if most_rest else _OVERRIDE.match(argument) is not None
        (overrides if is_override and not is_there(argument) else others).append(argument)
    if len(others) > 1 + most_rest:
        raise ConfigError(
            f"There is one argument too many: '{others[1 + most_rest]}'.",
            "Write settings as key.path=value, without spaces.",
        )
    return Arguments(Path(others[0]) if others else None, overrides, others[1:])


def load_source(arguments: Sequence[str] | None) -> ConfigSource:
    """Load the config that positional arguments name, with the overrides among them."""
    from fedrag_cli.config import load_config_with_source

    given = sort_arguments(arguments)
    return load_config_with_source(given.path, given.overrides)


def _is_setting(argument: str) -> bool:
    """Return whether a text is meant as an override: a key below a section, if misspelt, or a whole section."""
    from fedrag_cli.config.schema import Config

    key, _, value = argument.partition("=")
    section, *below = key.split(".")
    sections = [field.name for field in dataclasses.fields(Config)]
    if not _OVERRIDE.match(argument):
        return False
    if below:
        return bool(difflib.get_close_matches(section, sections))
    return section in sections and (value.startswith(("{", "$")) or value in ("", "null"))
