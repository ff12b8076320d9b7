"""`fedrag components`: what a config can name, and the settings of each."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fedrag_cli.cli.session import Session, in_session


@in_session()
def command(
    current: Session,
    name: Annotated[
        str | None, typer.Argument(help="Show the settings of the components of this type or kind.")
    ] = None,
) -> None:
    """List the registered components, those of installed plug-ins included."""
    from fedrag_cli.config.json_schema import component_settings
    from fedrag_cli.config.problems import suggestion
    from fedrag_cli.errors import ConfigError
    from fedrag_cli.registry import registry

    found = [component for component in registry().all() if name in (None, component.kind, component.name)]
    if not found:
        known = {component.kind for component in registry().all()} | {c.name for c in registry().all()}
        raise ConfigError(f"There is no component or kind '{name}'{suggestion(name, known)}.")
    listed: list[dict[str, Any]] = [
        {
            "kind": component.kind,
            "type": component.name,
            "help": component.help,
            "origin": component.origin,
            "settings": component_settings(component.config_class) if current.json_output or name is not None else [],
        }
        for component in found
    ]
    current.result({"components": listed}, lambda renderer: renderer.components(listed, settings=name is not None))
