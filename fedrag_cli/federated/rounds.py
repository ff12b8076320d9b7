"""The state of a federation after a round, on disk: global weights, the strategy's arrays, and the history."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.errors import ModelError
from fedrag_cli.federated.strategies import State
from fedrag_cli.federated.weights import Weights, load_weights, save_weights
from fedrag_cli.runs.atomic import os_errors, replace_directory_atomically, write_text_atomically

PREFIX = "round-"
WEIGHTS, STRATEGY, STATE = "weights.safetensors", "strategy.safetensors", "state.json"
KEPT = 2


@dataclass
class RoundState:
    """Where a federation stands.

    Args:
        number: The last round that is finished; 0 before the first.
        weights: The global weights after it; empty while the next round runs.
        strategy: What the strategy keeps from round to round.
        history: A summary of each round so far.
        evaluations: Metrics of the global weights by round, as clients and server measured them.
        missing: Clients that took part and are not known to have the final weights; None before these are handed out.
        settings: The strategy, privacy and seed that these rounds had last; see `recorded_settings`.
    """

    number: int
    weights: Weights
    strategy: State = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def recorded_settings(settings: FederatedConfig, seed: int) -> dict[str, Any]:
    """Return what a federation that is resumed compares with the rounds before, as JSON gives it back."""
    privacy = settings.privacy
    recorded = {
        "strategy": dataclasses.asdict(settings.strategy),
        "privacy": None if privacy is None else dataclasses.asdict(privacy),
        "seed": seed,
    }
    known: dict[str, Any] = json.loads(json.dumps(recorded))
    return known


def save_round(directory: Path, state: RoundState) -> None:
    """Write a round's state, and remove all but the newest ones.

    Args:
        directory: Folder of all rounds.
        state: What to write.
    """
    with replace_directory_atomically(directory / f"{PREFIX}{state.number:04d}") as target, os_errors(target):
        save_weights(state.weights, target / WEIGHTS)
        save_file({name: array.copy() for name, array in state.strategy.items()}, target / STRATEGY)
        (target / STATE).write_text(_known(state), encoding="utf-8")
    for old in _rounds(directory)[:-KEPT]:
        shutil.rmtree(old)


def save_missing(directory: Path, state: RoundState) -> None:
    """Write who has not got the final weights into the state of the last round, whose weights are saved already.

    Args:
        directory: Folder of all rounds.
        state: What to write; its weights may be on their way.
    """
    write_text_atomically(directory / f"{PREFIX}{state.number:04d}" / STATE, _known(state))


def load_newest_round(directory: Path) -> RoundState | None:
    """Read the newest round's state; None where no round is finished yet.

    Raises:
        ModelError: It is damaged.
    """
    found = _rounds(directory)
    if not found:
        return None
    newest = found[-1]
    try:
        known = json.loads((newest / STATE).read_text(encoding="utf-8"))
        strategy = load_file(newest / STRATEGY)
        return RoundState(
            known["round"],
            load_weights(newest / WEIGHTS),
            strategy,
            known["history"],
            known["evaluations"],
            known.get("missing"),
            known.get("settings") or {},
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"The round in '{newest}' is damaged: {error}",
            f"Remove the folder '{newest}' to go on from the one before.",
        ) from error


def _known(state: RoundState) -> str:
    known = {
        "round": state.number,
        "history": state.history,
        "evaluations": state.evaluations,
        "missing": state.missing,
        "settings": state.settings,
    }
    return json.dumps(known)


def _rounds(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit())
