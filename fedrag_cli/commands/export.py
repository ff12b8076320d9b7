"""`fedrag export-flower-app`: the federation as an app that a stock Flower SuperLink and its SuperNodes run.

The app holds the server's config and two modules of a few lines; the code is the installed `fedrag-cli`. Each node
names the config with its own data: `flower-supernode --node-config 'config="/path/to/site.yaml"'`.
"""

from __future__ import annotations

import functools
from pathlib import Path

import yaml
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedrag_cli.commands.federation import require_federation, settings_of
from fedrag_cli.commands.run_data import load_run_data
from fedrag_cli.commands.serve import task_without_data
from fedrag_cli.config import ConfigSource, load_config
from fedrag_cli.config.validation import require_training, trains_with_generator
from fedrag_cli.errors import ConfigError
from fedrag_cli.federated.config import public_settings
from fedrag_cli.federated.flower_api import client_app, server_app
from fedrag_cli.federated.task import FLTask
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.runs.files import os_errors, replace_directory_atomically
from fedrag_cli.trainer_managers.build import build_manager

PACKAGE = "fedrag_flower_app"
PROJECT = f"""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedrag-flower-app"
version = "1.0.0"
description = "Federated tuning of a RAG system; all code comes from the installed fedrag-cli"
license = "Apache-2.0"
# fedrag-cli and what it needs are installed already, on the SuperLink and on every SuperNode.
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["{PACKAGE}"]

[tool.flwr.app]
publisher = "fedrag"
fab-include = ["{PACKAGE}/*.py", "{PACKAGE}/*.yaml"]

[tool.flwr.app.components]
serverapp = "{PACKAGE}.server_app:app"
clientapp = "{PACKAGE}.client_app:app"

[tool.flwr.app.config]
# Folder for the tuned model, on the machine of the SuperLink.
output = "tuned-model"
"""
SERVER_MODULE = '''\
"""The server app: initial weights and rounds as config.yaml says."""

from pathlib import Path

from fedrag_cli.commands.export import exported_server_app

app = exported_server_app(Path(__file__).with_name("config.yaml"))
'''
CLIENT_MODULE = '''\
"""The client app: trains on the data of the config that the node names."""

from fedrag_cli.commands.export import exported_client_app

app = exported_client_app()
'''


def export_flower_app(source: ConfigSource, directory: Path) -> list[Path]:
    """Write a Flower app around the server's config into a folder, and return its files.

    Raises:
        ConfigError: A file is there already, or the mode tunes both sides.
    """
    require_federation(source.config)
    files = {
        directory / "pyproject.toml": PROJECT,
        directory / PACKAGE / "__init__.py": "",
        directory / PACKAGE / "server_app.py": SERVER_MODULE,
        directory / PACKAGE / "client_app.py": CLIENT_MODULE,
        directory / PACKAGE / "config.yaml": _public_yaml(source),
    }
    present = [str(path) for path in files if path.exists()]
    if present:
        raise ConfigError(
            f"There is something in the way: {', '.join(present)}.", "Choose another folder; nothing is overwritten."
        )
    for path, text in files.items():
        with os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return list(files)


def _public_yaml(source: ConfigSource) -> str:
    """Return the config without what concerns this machine alone, such as data and keys: the app goes to every node."""
    config = yaml.safe_load(source.to_yaml())
    del config["dataset"]
    for component in config["rag_system"].values():
        if isinstance(component, dict):
            # Whoever runs the app decides for their machine.
            component.pop("trust_remote_code", None)
    if config.get("federated") is not None:
        config["federated"] = public_settings(config["federated"])
    text: str = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return text


def exported_server_app(config_file: Path) -> ServerApp:
    """Return the server app of an exported config; models are loaded when a run starts."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = load_config(config_file)
        task = task_without_data(config)
        server_app(task)(grid=grid, context=context)
        output = str(context.run_config.get("output") or "")
        if output:
            rag_system = task.trainer.rag_system
            with replace_directory_atomically(Path(output)) as target:
                rag_system.require_trainable(task.side).save(target)

    return app


def exported_client_app() -> ClientApp:
    """Return the client app; the node's config says which data and models it has."""
    return client_app(lambda context: _task_of(str(context.node_config.get("config", ""))))


@functools.cache
def _task_of(config_file: str) -> FLTask:
    if not config_file:
        raise ConfigError(
            "This SuperNode names no config.",
            "Start it with --node-config 'config=\"/path/to/site.yaml\"'.",
        )
    config = load_config(config_file)
    require_training(config)
    data = load_run_data(config)
    rag_system = build_rag_system(config, nodes=data.nodes, with_generator=trains_with_generator(config))
    manager = build_manager(config, rag_system, train=data.train, validation=data.validation)
    settings = settings_of(config)
    # Flower may start a process for each message, and noise that was given must not be drawn again by the next one.
    adds_noise = settings.privacy is not None and settings.privacy.at == "client"
    record = Path(config.run.output_dir) / f"{Path(config_file).stem}-flower-app" if adds_noise else None
    return manager.get_federated_task(settings, record)
