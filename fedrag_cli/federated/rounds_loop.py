"""The rounds of a federation: gather clients, send the global weights, screen what comes back, aggregate, save."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp.strategy import Strategy

from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.errors import FederationError
from fedrag_cli.federated.aggregation import aggregate, lora_gap, require_mean
from fedrag_cli.federated.checkpoint import RoundState, recorded_settings
from fedrag_cli.federated.grid import POLL_SECONDS, ChosenNodes, FederationGrid, quiet_flower
from fedrag_cli.federated.handshake import Agreement
from fedrag_cli.federated.messages import (
    ACTION,
    EVALUATE_FIRST,
    FINAL,
    ROUNDS,
    SERVER_ROUND,
    STOP,
    VALIDATION_EXAMPLES,
    with_arrays,
)
from fedrag_cli.federated.participants import Exchange, Roster
from fedrag_cli.federated.privacy import ledger_entry, ledger_of, privacy_note, privacy_record
from fedrag_cli.federated.strategies import restore_strategy, strategy_state
from fedrag_cli.federated.validate_update import (
    RefusedUpdateError,
    Update,
    bound_updates,
    bound_validation_examples,
    read_metrics,
    require_quorum,
    screen_update,
)
from fedrag_cli.federated.weights import Weights, from_wire, record_bytes, to_wire
from fedrag_cli.runs.reporter import Reporter

SECONDS_BETWEEN_NOTES = 10.0
STOP_SECONDS = 5.0

SaveRound = Callable[[RoundState], None]
EvaluateGlobal = Callable[[int, Weights], Mapping[str, Any] | None]


@dataclass
class _Round:
    """What has come back in a round."""

    updates: dict[str, Update] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    outliers: dict[str, str] = field(default_factory=dict)


class Federation:
    """Runs the rounds over a transport.

    Args:
        grid: The transport.
        agreement: What clients must have in common with the server.
        settings: The federation's settings.
        strategy: What the strategy of the settings builds: it chooses the clients of a round and aggregates.
        seed: Seed of the choice of clients.
        reporter: Told what happens, as events.
        save_round: Called with the state after each round, and before the first.
        save_missing: Called with the state of the last round whenever a client has got the final weights.
        evaluate_global: Measures global weights on the server's own data; None where it has none.
    """

    def __init__(
        self,
        grid: FederationGrid,
        agreement: Agreement,
        settings: FederatedConfig,
        strategy: Strategy,
        *,
        seed: int,
        reporter: Reporter,
        save_round: SaveRound = lambda state: None,
        save_missing: SaveRound = lambda state: None,
        evaluate_global: EvaluateGlobal = lambda number, weights: None,
    ) -> None:
        """Start without clients; raises FederationError where the strategy and the settings do not go together."""
        quiet_flower()
        require_mean(settings.strategy, settings)
        self._grid = grid
        self._agreement = agreement
        self._settings = settings
        self._strategy = strategy
        self._seed = seed
        self._reporter = reporter
        self._save_round = save_round
        self._save_missing = save_missing
        self._evaluate_global = evaluate_global
        self._has_gathered = False
        self._changed: dict[str, Any] = {}
        self.roster = Roster(grid, agreement, reporter, settings.rounds)

    def run(self, state: RoundState) -> RoundState:
        """Run the rounds that are left, give every client the final weights, and return the state after that.

        Args:
            state: Where the federation stands; round 0 with the initial weights for a new one.

        Raises:
            FederationError: Too few clients or too few usable updates; the last saved state stands.
        """
        self._changed = self._note_changes(state)
        restore_strategy(self._strategy, state.strategy)
        if self._settings.privacy is not None:
            left = self._settings.rounds - state.number
            self._reporter.note(privacy_note(self._settings.privacy, left, ledger_of(state.history)))
        if state.number == 0:
            self._measure_globally(state)
            self._save_round(state)
        try:
            while state.number < self._settings.rounds:
                self._run_round(state)
                self._save_round(state)
            self._hand_out(state)
            self._save_round(state)
        except FederationError:
            self._stop_clients()
            raise
        return state

    def _note_changes(self, state: RoundState) -> dict[str, Any]:
        """Return which settings are others than in the rounds before, for the next round's record, and tell them."""
        now = recorded_settings(self._settings, self._seed)
        before, state.settings = state.settings or now, now
        changed = {name: [before.get(name), now[name]] for name in now if before.get(name) != now[name]}
        for name, (old, new) in changed.items():
            self._reporter.note(f"Going on after round {state.number} with another {name}: {new} in place of {old}")
        old, new = (settings["strategy"]["type"] for settings in (before, now))
        if old != new and state.strategy:
            self._reporter.note(f"What {old} kept from round to round is of no use to {new}, which starts anew")
            state.strategy = {}
        return changed

    def _run_round(self, state: RoundState) -> None:
        number, started = state.number + 1, time.monotonic()
        chosen = self._gather()
        # Strategies and sums have the weights as they are; what is rounded for the way is no part of a step.
        dtype = self._settings.transport_dtype
        rounded = to_wire(state.weights, dtype) if dtype != "float32" else None
        weights = to_wire(state.weights, release=True)
        record = weights if rounded is None else rounded
        config = ConfigRecord({ROUNDS: self._settings.rounds, EVALUATE_FIRST: True})
        with _seeded(f"{self._seed}-{number}"):
            grid = ChosenNodes(self._grid, chosen)
            messages = with_arrays(self._strategy.configure_train(number, weights, config, grid), record)
        names = sorted(self.roster.participant_at(message.metadata.dst_node_id).name for message in messages)
        sent = record_bytes(record)
        self._reporter.event("round_started", round=number, rounds=self._settings.rounds, clients=names, bytes=sent)
        came = self._train(number, messages, weights, sent)
        came.updates, came.outliers = bound_updates(came.updates, weights, self._settings, self._settings.strategy)
        for name, reason in came.outliers.items():
            self._reporter.event("client_outlier", round=number, client=name, reason=reason)
        reply = Message(RecordDict(), reply_to=messages[0])
        # What was sent is as large as the next global weights, and nobody needs it any more.
        del messages, record, rounded, weights
        refused = dict(sorted(came.refused.items()))
        require_quorum(number, came.updates, refused, self._settings, _hint(refused))
        state.weights = aggregate(self._strategy, number, came.updates, reply, self._agreement.manifest, self._settings)
        state.number, state.missing, state.final = number, None, {}
        state.strategy = strategy_state(self._strategy)
        self._record_round(state, came, time.monotonic() - started)
        self._measure_globally(state)

    def _train(self, number: int, messages: list[Message], reference: ArrayRecord, sent: int) -> _Round:
        came = _Round()

        def on_reply(name: str, reply: Message, seconds: float) -> None:
            size = sum(record_bytes(record) for record in reply.content.array_records.values())
            try:
                update = screen_update(reply.content, self._agreement.manifest, reference, self._settings)
            except RefusedUpdateError as refusal:
                on_failure(name, str(refusal))
                return
            came.updates[name] = update
            self._reporter.event(
                "client_update",
                round=number,
                client=name,
                accepted=True,
                reason="",
                examples=update.examples,
                metrics=update.metrics,
                norm=update.norm,
                clipped=update.scale < 1,
                seconds=seconds,
                bytes_sent=sent,
                bytes_received=size,
            )

        def on_failure(name: str, reason: str) -> None:
            came.refused[name] = reason
            self._reporter.event("client_update", round=number, client=name, accepted=False, reason=reason)

        self._exchange(messages, self._settings.round_timeout, on_reply, on_failure)
        return came

    def _exchange(self, messages: list[Message], timeout: float, on_reply: Any, on_failure: Any) -> None:
        Exchange(self._grid, self.roster, self._settings.rejoin_timeout).run(messages, timeout, on_reply, on_failure)

    def _gather(self) -> list[int]:
        """Wait for enough clients and return where messages to them go, in the order of their names."""
        quorum = self._settings.min_clients
        # A server that was restarted meets its clients for the first time again.
        wanted = quorum if self._has_gathered else max(quorum, self._settings.wait_for_clients or quorum)
        if self._has_gathered:
            self._await_absent()
        self._has_gathered = True
        self._wait(lambda: len(self.roster.ready()) >= wanted, self._settings.gather_timeout, wanted)
        ready = self.roster.ready()
        if quorum <= len(ready) < wanted:
            self._reporter.note(f"Going on with {len(ready)} of {wanted} clients; the others did not come in time")
        if len(ready) >= quorum:
            return [participant.node_id for participant in ready]
        refused = "".join(f"; {p.name} was refused: {p.reason}" for p in self.roster.with_status("refused"))
        raise FederationError(
            f"{len(ready)} of {quorum} clients were there after {self._settings.gather_timeout:g} s{refused}.",
            "Start the other clients, or lower federated.min_clients in the run directory's config.yaml.",
        )

    def _record_round(self, state: RoundState, came: _Round, seconds: float) -> None:
        examples = sum(update.examples for update in came.updates.values())
        loss = _mean([(update.examples, update.metrics.get("loss")) for update in came.updates.values()])
        summary = {
            "round": state.number,
            "clients": sorted(came.updates),
            "refused": dict(sorted(came.refused.items())),
            "outliers": came.outliers,
            "examples": examples,
            "loss": loss,
            "seconds": seconds,
        }
        if self._settings.lora_aggregation == "average":
            gap = lora_gap(came.updates, self._agreement.manifest)
            summary |= {} if gap is None else {"lora_gap": gap}
        if (entry := ledger_entry(self._settings.privacy, len(came.updates))) is not None:
            summary["privacy"] = entry
        summary |= privacy_record(ledger_of([*state.history, summary]))
        if self._changed:
            summary["changed"], self._changed = self._changed, {}
        state.history.append(summary)
        # Clients measure what they receive, which is the outcome of the round before.
        measured = {name: update.metrics for name, update in came.updates.items()}
        self._note_evaluation(state, state.number - 1, "clients", measured)
        self._reporter.event("round", rounds=self._settings.rounds, **summary)

    def _note_evaluation(
        self, state: RoundState, number: int, who: str, measured: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Average the clients' measurements over their validation examples."""
        reports = [metrics for metrics in measured.values() if VALIDATION_EXAMPLES in metrics]
        rows = [(int(metrics[VALIDATION_EXAMPLES]), metrics) for metrics in reports]
        names = [name for name in self._settings.metrics if name not in ("loss", "steps", "seconds")]
        means = {name: _mean([(examples, metrics.get(name)) for examples, metrics in rows]) for name in names}
        known = {name: value for name, value in means.items() if value is not None}
        if known:
            total = sum(examples for examples, _ in rows)
            state.evaluations.setdefault(str(number), {})[who] = {"examples": total, "metrics": known}
            self._reporter.event("federated_evaluation", round=number, by=who, examples=total, metrics=known)

    def _measure_globally(self, state: RoundState) -> None:
        found = self._evaluate_global(state.number, state.weights)
        if found is not None:
            state.evaluations.setdefault(str(state.number), {})["server"] = dict(found)
            self._reporter.event("federated_evaluation", round=state.number, by="server", **found)

    def _hand_out(self, state: RoundState) -> None:
        """Give every client the final weights, and take its measurement of them.

        Who took part and is not known to have them is waited for, but not longer than `rejoin_timeout`. It is
        remembered as each client confirms, so a server that is resumed waits for the others only, and whoever was away
        gets the weights from it.
        """
        if state.missing is None:
            state.missing = sorted({name for row in state.history for name in row["clients"]})
            self._save_missing(state)
        self._await_clients(state.missing)
        expected = set(state.missing)
        config = ConfigRecord({SERVER_ROUND: state.number, FINAL: True})
        # What travels as float32 is the weights themselves; otherwise they are more than what travels.
        dtype = self._settings.transport_dtype
        is_whole = dtype == "float32"
        arrays = to_wire(state.weights, dtype, release=is_whole)
        content = RecordDict({"arrays": arrays, "config": config})
        messages = [Message(content, p.node_id, MessageType.EVALUATE) for p in self.roster.ready()]
        absent = expected - {p.name for p in self.roster.ready()}

        def on_reply(name: str, reply: Message, seconds: float) -> None:
            try:
                state.final[name] = read_metrics(reply.content, self._settings.metrics)[1]
            except RefusedUpdateError as refusal:
                on_failure(name, str(refusal))
                return
            self.roster.dismiss(name)
            expected.discard(name)
            state.missing = sorted(expected)
            self._save_missing(state)
            self._reporter.event("client_final", client=name, received=True, reason="")

        def on_failure(name: str, reason: str) -> None:
            self._reporter.event("client_final", client=name, received=False, reason=reason)

        self._exchange(messages, self._settings.round_timeout, on_reply, on_failure)
        for name in sorted(absent & expected):
            on_failure(name, "it is away")
        if is_whole:
            state.weights = from_wire(arrays, release=True)
        if messages or "clients" not in state.evaluations.get(str(state.number), {}):
            # Those of clients that confirmed to a server which was killed since then are among them.
            measured = {name: state.final[name] for name in sorted(state.final)}
            for name, (metrics, reason) in bound_validation_examples(measured, self._settings.max_weight_ratio).items():
                measured[name] = metrics
                self._reporter.event("client_outlier", round=state.number, client=name, reason=reason)
            self._note_evaluation(state, state.number, "clients", measured)

    def _await_clients(self, names: Sequence[str]) -> None:
        """Wait until clients are there, but for those given up or refused, or `rejoin_timeout` is over."""

        def are_there() -> bool:
            known = [self.roster.with_status(status) for status in ("ready", "given up", "refused")]
            return set(names) <= {participant.name for participants in known for participant in participants}

        self._wait(are_there, self._settings.rejoin_timeout, len(names))

    def _wait(self, is_over: Callable[[], bool], seconds: float, wanted: int) -> None:
        """Look who is there until that is enough, but no longer than so many seconds."""
        end, noted = time.monotonic() + seconds, 0.0
        while True:
            self.roster.refresh()
            if is_over() or time.monotonic() >= end:
                return
            if time.monotonic() - noted > SECONDS_BETWEEN_NOTES:
                noted = time.monotonic()
                ready = [participant.name for participant in self.roster.ready()]
                self._reporter.event("waiting", ready=ready, wanted=wanted)
            time.sleep(POLL_SECONDS)

    def _await_absent(self) -> None:
        """Wait a while for clients that have taken part and are away just now, but not for those that were given up."""
        started = time.monotonic()
        self.roster.refresh()
        while absent := self.roster.with_status("offline"):
            waited = time.monotonic() - started
            for participant in absent:
                if waited >= self.roster.patience(participant.name, self._settings.rejoin_timeout):
                    self.roster.give_up(participant.name)
            time.sleep(POLL_SECONDS)
            self.roster.refresh()

    def _stop_clients(self) -> None:
        """Tell the clients that there will be no final model, as far as they can be reached."""
        self.roster.refresh()
        content = RecordDict({"config": ConfigRecord({ACTION: STOP})})
        messages = [Message(content, p.node_id, MessageType.QUERY) for p in self.roster.ready()]
        self._exchange(messages, STOP_SECONDS, lambda *_: None, lambda *_: None)


def _mean(values: Sequence[tuple[int, float | None]]) -> float | None:
    """Return the mean weighted by examples of the values that are there."""
    known = [(examples, value) for examples, value in values if value is not None]
    total = sum(examples for examples, _ in known)
    return sum(examples * value for examples, value in known) / total if total else None


def _hint(refused: Mapping[str, str]) -> str:
    """Say what to do about refused updates."""
    if any("above the bound" in reason for reason in refused.values()):
        return "If their norms are right, raise federated.max_update_norm in the run directory's config.yaml."
    return "Look at the refused clients' own messages."


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """Let Flower's strategies, which draw from Python's global generator, draw the same each time."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
