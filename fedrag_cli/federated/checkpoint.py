"""What a federation keeps on disk from round to round.

The server's part is its state after a round: global weights, the strategy's arrays, and the history. A client's part is
how many rounds it has agreed to, and what it has given where it adds noise itself.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_tensors

from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.errors import ModelError, ServerRefusedError
from fedrag_cli.federated.privacy import epsilon_of_ledger
from fedrag_cli.federated.strategies import State
from fedrag_cli.federated.weights import Weights, load_weights, save_weights
from fedrag_cli.runs.files import (
    os_errors,
    replace_directory_atomically,
    replace_file_atomically,
    write_json_atomically,
    write_text_atomically,
)

PREFIX = "round-"
WEIGHTS, STRATEGY, STATE = "weights.safetensors", "strategy.safetensors", "state.json"
CLIENT_STATE, NOISY, ABOUT = "rounds.json", "noisy.safetensors", "about"
KEPT = 2
JSON_FIELDS = ("history", "evaluations", "missing", "final", "settings")


@dataclass
class RoundState:
    """Where a federation stands."""

    number: int
    """The last round that is finished; 0 before the first."""
    weights: Weights
    """The global weights after it; empty while the next round runs."""
    strategy: State = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    """A summary of each round so far."""
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Metrics of the global weights by round, as clients and server measured them."""
    missing: list[str] | None = None
    """Clients that took part and are not known to have the final weights; None before these are handed out."""
    final: dict[str, dict[str, float]] = field(default_factory=dict)
    """What clients have measured of the final weights, by name."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Those that these rounds had last; see `recorded_settings`."""


def recorded_settings(settings: FederatedConfig, seed: int) -> dict[str, Any]:
    """Return what a federation that is resumed compares with the rounds before, as JSON gives it back."""
    privacy = dataclasses.asdict(settings.privacy) if settings.privacy is not None else None
    recorded = {"strategy": dataclasses.asdict(settings.strategy), "privacy": privacy, "seed": seed}
    known: dict[str, Any] = json.loads(json.dumps(recorded))
    return known


def save_round(directory: Path, state: RoundState) -> None:
    """Write a round's state, and remove all but the newest ones."""
    with replace_directory_atomically(directory / f"{PREFIX}{state.number:04d}") as target, os_errors(target):
        save_weights(state.weights, target / WEIGHTS)
        save_file({name: array.copy() for name, array in state.strategy.items()}, target / STRATEGY)
        (target / STATE).write_text(_known(state), encoding="utf-8")
    for old in _rounds(directory)[:-KEPT]:
        shutil.rmtree(old)


def save_missing(directory: Path, state: RoundState) -> None:
    """Write who has not got the final weights, and what the others measured, into the state of the last round."""
    write_text_atomically(directory / f"{PREFIX}{state.number:04d}" / STATE, _known(state))


def load_newest_round(directory: Path) -> RoundState | None:
    """Read the newest round's state; None where none is finished yet. Raises ModelError where it is damaged."""
    found = _rounds(directory)
    if not found:
        return None
    newest = found[-1]
    try:
        known = json.loads((newest / STATE).read_text(encoding="utf-8"))
        own = {name: known[name] for name in JSON_FIELDS if known.get(name) is not None}
        return RoundState(known["round"], load_weights(newest / WEIGHTS), load_file(newest / STRATEGY), **own)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"The round in '{newest}' is damaged: {error}",
            f"Remove the folder '{newest}' to go on from the one before.",
        ) from error


def _known(state: RoundState) -> str:
    return json.dumps({"round": state.number} | {name: getattr(state, name) for name in JSON_FIELDS})


def _rounds(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit())


@dataclass(frozen=True)
class FitResult:
    """What a client trained."""

    weights: Weights
    """The trained tensors, by name; clipped and with noise where the settings leave that to clients."""
    examples: int
    metrics: dict[str, float]
    """Mean training loss, steps and seconds."""


class ClientRounds:
    """What a client has agreed to and given, by its own records, so that a restart of either side changes nothing."""

    def __init__(self, directory: Path | None, settings: FederatedConfig) -> None:
        """Read the records in a folder, or keep them in memory alone; raises ModelError where they are damaged."""
        self._directory = directory
        self._settings = settings
        self._has_met = False
        self._known: dict[str, Any] = {"agreed": None, "newest": 0, "asked": "", "noises": []}
        if directory is not None and (directory / CLIENT_STATE).exists():
            try:
                self._known |= json.loads((directory / CLIENT_STATE).read_text(encoding="utf-8"))
            except (OSError, ValueError, TypeError) as error:
                raise ModelError(
                    f"The record of this client's rounds in '{directory / CLIENT_STATE}' is damaged: {error}",
                    "Restore it from a copy, or join anew with 'fedrag join-fl'.",
                ) from error

    @property
    def noises(self) -> list[dict[str, Any]]:
        """Each noisy update that was made: its round, and its noise in clipping norms."""
        return list(self._known["noises"])

    def agree(self, rounds: object) -> None:
        """Agree to the number of rounds that a server names when it is met, and later on to no more than that.

        Where it names none, this client's own setting counts.

        Raises:
            ServerRefusedError: They are more than those of the first time, and than this client's own setting.
        """
        own, agreed = self._settings.rounds, self._known["agreed"]
        wanted = rounds if isinstance(rounds, int) and not isinstance(rounds, bool) and rounds > 0 else own
        if agreed is not None and wanted > max(agreed, own):
            raise ServerRefusedError(
                f"The server wants {wanted} rounds now, but {agreed} were agreed when this client joined.",
                "If they are right, set federated.rounds to them in this run's config.yaml.",
            )
        self._has_met = True
        self._write(agreed=max(agreed or 0, wanted))

    def begin(self, number: int, asked: str) -> None:
        """Note that a round is asked for; one that was asked for before only by a server that was met anew.

        A server that is resumed goes on at one of the rounds that it has kept. Servers that were never met, because
        Flower's own protocol meets nobody, may ask for any round.

        Raises:
            ServerRefusedError: It is beyond what was agreed, or goes back further than a resume does.
        """
        agreed, newest = self._known["agreed"], self._known["newest"]
        if agreed is None:
            return
        if not 1 <= number <= agreed:
            raise ServerRefusedError(f"The server asks for round {number}, but {agreed} rounds were agreed.")
        if number > newest:
            self._write(newest=number, asked=asked)
        elif asked != self._known["asked"]:
            if not self._has_met or number < newest - KEPT + 1:
                raise ServerRefusedError(
                    f"The server asks for round {number} again, but this client has trained round {newest} already.",
                    "For another federation, join it with 'fedrag join-fl'.",
                )
            self._write(newest=number, asked=asked)
        self._has_met = False

    def given(self, asked: str) -> FitResult | None:
        """Return the noisy update that was made for a request already; None where it is to be made.

        Noise is drawn once for a request, because the mean of several noises on the same update would give it away.

        Raises:
            ServerRefusedError: As many noisy updates were made as rounds were agreed.
            ModelError: The kept update is damaged.
        """
        if (result := self._read_given(asked)) is not None:
            return result
        made, rounds = len(self.noises), self._settings.rounds
        if made >= rounds:
            raise ServerRefusedError(
                f"This client has given {made} noisy updates, as many as federated.rounds; one more would spend more "
                "of its privacy than was agreed.",
                "Raise federated.rounds on all sides only where that is wanted.",
            )
        return None

    def give(self, asked: str, number: int, result: FitResult, noise: float) -> None:
        """Keep a noisy update before it is sent, and count it; its noise is told in clipping norms."""
        noises = [*self.noises, {"round": number, "noise_multiplier": noise}]
        if self._directory is not None:
            about = {"asked": asked, "examples": result.examples, "metrics": result.metrics, "noises": noises}
            _write_privately(self._directory / NOISY, result.weights, about)
        self._write(noises=noises)

    def spent(self) -> dict[str, float]:
        """Return the epsilon that this client's own noise has spent so far; empty where it adds none.

        It is that of its own updates, which the server sees one by one; other clients' noise is not counted. As in the
        records of the server's rounds, it is told against zeroing these updates, and against replacing them.
        """
        privacy = self._settings.privacy
        if privacy is None or privacy.at != "client":
            return {}
        epsilons = (epsilon_of_ledger(self.noises, privacy.delta, replaced) for replaced in (False, True))
        return dict(zip(("own_epsilon", "own_epsilon_replaced"), epsilons, strict=True)) | {"delta": privacy.delta}

    def _read_given(self, asked: str) -> FitResult | None:
        if self._directory is None or not (path := self._directory / NOISY).exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()[ABOUT])
            if len(about["noises"]) > len(self.noises):
                # It was killed between the update and its record.
                self._write(noises=about["noises"])
            if about["asked"] != asked:
                return None
            return FitResult(load_weights(path), about["examples"], about["metrics"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(
                f"The update in '{path}' is damaged: {error}", "Remove the file; the round then counts as another one."
            ) from error

    def _write(self, **fields: Any) -> None:
        self._known |= fields
        if self._directory is not None:
            write_json_atomically(self._directory / CLIENT_STATE, self._known)


def _write_privately(path: Path, weights: Weights, about: dict[str, Any]) -> None:
    """Write tensors and what belongs to them into a file for its owner's eyes, all of it or nothing."""
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    with replace_file_atomically(path) as temporary:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        save_tensors(tensors, temporary, {ABOUT: json.dumps(about)})
        temporary.chmod(0o600)
