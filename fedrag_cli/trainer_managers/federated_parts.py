"""What server, client and simulation of a federation share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from fedrag_cli.config import Config, ConfigSource
from fedrag_cli.config.checks import require_generator, tuned_sides
from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.errors import ConfigError
from fedrag_cli.evaluation.evaluator import Evaluation
from fedrag_cli.runs.directory import SCHEMA_VERSION, RunDirectory
from fedrag_cli.trainer_managers.run_parts import differences_of, tuned_models


def settings_of(config: Config) -> FederatedConfig:
    """Return the federation's settings, or the defaults."""
    return config.federated or FederatedConfig()


def require_federation(config: Config) -> str:
    """Return the side that is tuned.

    Raises:
        ConfigError: The mode tunes both sides, or there is no generator.
    """
    require_generator(config, "training")
    sides = tuned_sides(config)
    if len(sides) > 1:
        raise ConfigError(
            "A federation tunes one side, but trainer.mode is alternating.",
            "Set trainer.mode to retriever or generator, and run a federation for each, one after the other.",
        )
    return sides[0]


def create_run(source: ConfigSource, command: Sequence[str], **federation: Any) -> RunDirectory:
    """Make a run directory whose manifest says which part of a federation it is.

    Args:
        source: A loaded config.
        command: The command line.
        federation: `role`, and what `fedrag resume` needs to take it up again.
    """
    run_config = source.config.run
    run = RunDirectory.create(
        run_config.output_dir, run_config.name, source.to_yaml(), command=command, seed=run_config.seed
    )
    run.update_manifest(federation=federation)
    return run


def federation_summary(
    run: RunDirectory,
    config: Config,
    *,
    role: str,
    counts: dict[str, int],
    split: str | None,
    before: Evaluation | None,
    after: Evaluation | None,
    rounds: list[dict[str, Any]],
    evaluations: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Return the summary of one part of a federation, as `summary.json` has it."""
    manifest = run.manifest()
    stored = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    sides = tuned_sides(config)
    settings = {side: stored["trainer"][side] for side in sides}
    federated = stored.get("federated") or {}
    return {
        "schema_version": SCHEMA_VERSION,
        "run_name": config.run.name,
        "run_dir": str(run.path),
        "status": "done",
        "role": role,
        "mode": config.trainer.mode,
        "seed": config.run.seed,
        "command": manifest["command"],
        "tuned": tuned_models(sides, stored),
        "data": counts,
        "fingerprints": manifest.get("fingerprints") or {},
        "split": split,
        "differences": differences_of(config, before, after),
        "loss": rounds[-1]["loss"] if rounds else None,
        "steps": None,
        "metrics": {},
        "rounds": rounds,
        "evaluations": evaluations,
        "seconds": seconds,
        "settings": settings | {"federated": _public(federated)},
        "truncated": {f"evaluation {name}": count for name, count in (after.truncated if after else {}).items()},
        "versions": manifest["versions"],
    }


def _public(federated: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a federation without where keys and certificates are."""
    private = ("key", "allowed_keys", "certificate", "certificate_key", "ca_certificate")
    return {name: value for name, value in federated.items() if name not in private}
