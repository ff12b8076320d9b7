"""Using what a run has tuned: its config, pointed at its own models and store."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedrag_cli.config import Config, ConfigSource, load_config_with_source
from fedrag_cli.config.fields import is_folder
from fedrag_cli.errors import ConfigError, DataError
from fedrag_cli.runs.directory import RunDirectory

FIXED_BY_A_RUN = (
    *(
        f"rag_system.retriever.{name}"
        for name in (
            "type", "model", "query_model", "passage_model", "revision", "passage_prompt", "max_length", "similarity",
        )
    ),
    *(f"rag_system.generator.{name}" for name in ("type", "model", "adapter", "revision")),
    *(f"rag_system.knowledge_store.{name}" for name in ("type", "path", "url", "collection")),
)  # fmt: skip


def load_config_or_run(path: Path | None, overrides: Sequence[str]) -> tuple[Config, ConfigSource]:
    """Load a config file (`fedrag.yaml` by default), or the config of a run directory with the tuned models in it.

    Raises:
        ConfigError: The run is not finished, the config is wrong, or an override names what the run has fixed.
    """
    if path is None or not is_folder(path):
        source = load_config_with_source(path, overrides)
        return source.config, source
    run = RunDirectory.open(path)
    run.require_finished()
    evaluation = run.manifest().get("evaluation")
    if evaluation is not None:
        raise ConfigError(
            f"'{path}' is an evaluation, which has no models of its own.",
            f"Give what it evaluated: {evaluation['of'] or path / 'config.yaml'}",
        )
    for override in overrides:
        key = override.partition("=")[0]
        if key in FIXED_BY_A_RUN or any(fixed.startswith(key + ".") for fixed in FIXED_BY_A_RUN):
            raise ConfigError(
                f"{key} is fixed by the run in '{path}', whose tuned models are used.",
                f"Leave it out, or use the run's config with other models: {path / 'config.yaml'} {override}",
            )
    source = load_config_with_source(run.config_file, overrides)
    return with_tuned_models(source.config, run), source


def with_tuned_models(config: Config, run: RunDirectory) -> Config:
    """Return the config with the run's tuned retriever, generator and knowledge store in the place of the old ones.

    Raises:
        DataError: What the run has tuned is gone.
    """
    if missing := run.missing_models():
        raise DataError(
            f"The tuned models of the run in '{run.path}' are gone: {', '.join(missing)}.",
            "Put them back from a copy, or train again with the run's config.yaml.",
        )
    rag_system = config.rag_system
    if run.retriever.is_dir():
        rag_system = dataclasses.replace(rag_system, retriever=_tuned(rag_system.retriever, run.retriever))
    if run.generator.is_dir():
        rag_system = dataclasses.replace(rag_system, generator=_tuned(rag_system.generator, run.generator))
    if run.knowledge_store.is_dir():
        # A run keeps its store in its own folder, also where it started from one on a server.
        store = rag_system.knowledge_store.in_folder(run.knowledge_store)
        rag_system = dataclasses.replace(rag_system, knowledge_store=store)
    return dataclasses.replace(config, rag_system=rag_system)


def _tuned(settings: Any, directory: Path) -> Any:
    """Return the settings of the model that a run has saved in a directory."""
    if not hasattr(settings, "tuned_in"):
        raise ConfigError(
            f"What the run has saved in '{directory}' cannot be used: the config of type '{settings.type}' does not "
            "say how (it has no method tuned_in).",
            "Ask for it where the plug-in comes from.",
        )
    return settings.tuned_in(directory)
