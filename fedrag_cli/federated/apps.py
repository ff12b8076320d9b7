"""The federated task as Flower apps of the message API, for any Flower deployment or simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from fedrag_cli.errors import FederationError
from fedrag_cli.federated.aggregation import check_weights, makes_mean, mean_content, require_mean
from fedrag_cli.federated.client import AGREEMENT, ClientHandler
from fedrag_cli.federated.privacy import ledger_entry, privacy_record
from fedrag_cli.federated.screening import (
    EXAMPLES,
    VALIDATION_EXAMPLES,
    RefusedUpdateError,
    Update,
    bound_counts,
    bound_updates,
    read_metrics,
    screen_update,
)
from fedrag_cli.federated.task import FLTask
from fedrag_cli.federated.weights import from_wire, in_dtype, save_weights, send_instead, to_wire
from fedrag_cli.registry import build
from fedrag_cli.runs.atomic import replace_directory_atomically
from fedrag_cli.runs.reporting import Reporter, SilentReporter

WEIGHTS_FILE = "weights.safetensors"


class ScreenedStrategy(Strategy):
    """A strategy that sees only updates which passed the screening, from clients that agree with the server.

    Args:
        strategy: The strategy that aggregates.
        task: Says which tensors and metrics were agreed on.
        reporter: Told which updates were refused, and why.
    """

    def __init__(self, strategy: Strategy, task: FLTask, reporter: Reporter | None = None) -> None:
        """Keep both; raises FederationError where the strategy and the task's settings do not go together."""
        require_mean(strategy, task.settings)
        self.strategy = strategy
        self.task = task
        self.reporter: Reporter = reporter or SilentReporter()
        self._reference = ArrayRecord()
        self._ledger: list[dict[str, Any] | None] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Note the global weights of this round, and send them in the agreed number format."""
        self._reference = arrays
        return self._sent(self.strategy.configure_train(server_round, arrays, config, grid), arrays)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Hand on what passed; raises FederationError where that is less than the quorum."""
        settings, manifest = self.task.settings, self.task.agreement.manifest
        refused: dict[int, str] = {}
        passed = list(self._screened(server_round, replies, refused))
        if len(passed) < settings.min_clients:
            raise FederationError(
                f"Round {server_round} has {len(passed)} usable updates, but needs {settings.min_clients}"
                + "".join(f"; {number}: {reason}" for number, reason in refused.items())
                + ".",
                "Look at the refused clients' own messages.",
            )
        messages = [reply for reply, _ in passed]
        numbered = {str(place): update for place, (_, update) in enumerate(passed)}
        updates, outliers = bound_updates(numbered, self._reference, settings, self.strategy)
        for place, reason in outliers.items():
            number = messages[int(place)].metadata.src_node_id
            self.reporter.note(f"Round {server_round}: update of {number} is an outlier: {reason}")
        if makes_mean(settings):
            messages[0].content = mean_content(list(updates.values()), manifest, settings)
            messages = messages[:1]
        else:
            for message, update in zip(messages, updates.values(), strict=True):
                message.content = update.content()
        with np.errstate(all="ignore"):
            arrays, metrics = self.strategy.aggregate_train(server_round, messages)
            if arrays is not None:
                check_weights(server_round, from_wire(arrays), settings.transport_dtype)
        if settings.privacy is not None:
            self._ledger.append(ledger_entry(settings.privacy, len(updates)))
            spent = {name: value for name, value in privacy_record(self._ledger).items() if value is not None}
            metrics = MetricRecord({**(metrics or {}), **spent})
        return arrays, metrics

    def _sent(self, messages: Iterable[Message], arrays: ArrayRecord) -> list[Message]:
        """Let messages carry the weights in the agreed number format, and what clients must have in common."""
        sent = send_instead(messages, in_dtype(arrays, self.task.settings.transport_dtype))
        agreement = self.task.agreement.to_json()
        for message in sent:
            if not message.content.config_records:
                message.content["config"] = ConfigRecord()
            next(iter(message.content.config_records.values()))[AGREEMENT] = agreement
        return sent

    def _screened(
        self, server_round: int, replies: Iterable[Message], refused: dict[int, str]
    ) -> Iterator[tuple[Message, Update]]:
        manifest, settings = self.task.agreement.manifest, self.task.settings
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            try:
                if reply.has_error():
                    raise RefusedUpdateError("it failed; its own messages say why")
                yield reply, screen_update(reply.content, manifest, self._reference, settings)
            except RefusedUpdateError as refusal:
                refused[reply.metadata.src_node_id] = str(refusal)
                self.reporter.note(f"Round {server_round}: update of {reply.metadata.src_node_id} refused: {refusal}")

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Hand the call on, with the global weights as the clients get them."""
        return self._sent(self.strategy.configure_evaluate(server_round, arrays, config, grid), arrays)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Hand on what passed, of clients with validation examples; none at all gives no metrics."""
        settings = self.task.settings
        reports: list[tuple[Message, int, dict[str, float]]] = []
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            try:
                examples, metrics = (0, {}) if reply.has_error() else read_metrics(reply.content, settings.metrics)
            except RefusedUpdateError as refusal:
                self._note_measurement(server_round, reply, f"refused: {refusal}")
                continue
            metrics.pop(VALIDATION_EXAMPLES, None)
            if examples and metrics:
                reports.append((reply, examples, metrics))
        counts = {str(place): examples for place, (_, examples, _) in enumerate(reports)}
        bounded = bound_counts(counts, settings.max_weight_ratio)
        # Flower takes means of metrics that all report.
        usual = {
            name for name in settings.metrics if 2 * sum(name in metrics for *_, metrics in reports) > len(reports)
        }
        measured = []
        for place, (reply, examples, metrics) in enumerate(reports):
            if not usual <= metrics.keys():
                self._note_measurement(server_round, reply, "refused: it lacks what others report")
                continue
            count = bounded.get(str(place), examples)
            if count < examples:
                words = f"an outlier: its {examples} validation examples count as {count}"
                self._note_measurement(server_round, reply, f"is {words}")
            known: dict[str, int | float] = {name: metrics[name] for name in sorted(usual)}
            reply.content = RecordDict({"metrics": MetricRecord({EXAMPLES: count, **known})})
            measured.append(reply)
        return self.strategy.aggregate_evaluate(server_round, measured) if measured else None

    def _note_measurement(self, server_round: int, reply: Message, what: str) -> None:
        self.reporter.note(f"Round {server_round}: measurement of {reply.metadata.src_node_id} {what}")

    def summary(self) -> None:
        """Hand the call on."""
        self.strategy.summary()


def server_app(task: FLTask, strategy: Strategy | None = None, output: Path | None = None) -> ServerApp:
    """Return the server app of a task; see `FLTask.server_app`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        settings = task.settings
        chosen = strategy or build(
            "strategy",
            settings.strategy,
            min_clients=settings.min_clients,
            learning_rate=task.trainer.config.learning_rate,
        )
        result = ScreenedStrategy(chosen, task, task.trainer.reporter).start(
            grid=grid,
            initial_arrays=to_wire(task.weights()),
            num_rounds=settings.rounds,
            timeout=settings.round_timeout,
        )
        task.load(from_wire(result.arrays))
        if output is not None:
            with replace_directory_atomically(output) as target:
                save_weights(task.weights(), target / WEIGHTS_FILE)

    return app


def client_app(task_of: Callable[[Context], FLTask]) -> ClientApp:
    """Return a client app.

    Args:
        task_of: Gives the task for a node's context; called once for each message, so it should remember.
    """
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        return ClientHandler(task_of(context))(message)

    app.train()(answer)
    app.evaluate()(answer)
    app.query()(answer)
    return app
