"""The federated task as Flower apps of the message API, for any Flower deployment or simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from fedrag_cli.errors import FederationError
from fedrag_cli.federated.aggregation import makes_mean, mean_content, require_mean
from fedrag_cli.federated.client import AGREEMENT, ClientHandler
from fedrag_cli.federated.privacy import privacy_record
from fedrag_cli.federated.screening import RefusedUpdateError, Update, screen_update
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
        settings = self.task.settings
        refused: dict[int, str] = {}
        passed = list(self._screened(server_round, replies, refused))
        if len(passed) < settings.min_clients:
            raise FederationError(
                f"Round {server_round} has {len(passed)} usable updates, but needs {settings.min_clients}"
                + "".join(f"; {number}: {reason}" for number, reason in refused.items())
                + ".",
                "Look at the refused clients' own messages.",
            )
        if makes_mean(settings):
            return self._of_mean(server_round, passed[0][0], [update for _, update in passed])
        for reply, update in passed:
            reply.content = update.content()
        return self.strategy.aggregate_train(server_round, [reply for reply, _ in passed])

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
        settings = self.task.settings
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            try:
                if reply.has_error():
                    raise RefusedUpdateError("it failed; its own messages say why")
                yield (
                    reply,
                    screen_update(
                        reply.content,
                        self.task.agreement.manifest,
                        self._reference,
                        metrics=settings.metrics,
                        max_norm=settings.max_update_norm,
                        dtype=settings.transport_dtype,
                        privacy=settings.privacy,
                    ),
                )
            except RefusedUpdateError as refusal:
                refused[reply.metadata.src_node_id] = str(refusal)
                self.reporter.note(f"Round {server_round}: update of {reply.metadata.src_node_id} refused: {refusal}")

    def _of_mean(
        self, server_round: int, reply: Message, updates: list[Update]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Give the strategy the mean, with noise where that is wanted, before its step, and report what was spent."""
        settings = self.task.settings
        reply.content = mean_content(updates, self.task.agreement.manifest, settings)
        arrays, metrics = self.strategy.aggregate_train(server_round, [reply])
        return arrays, MetricRecord({**(metrics or {}), **privacy_record(settings.privacy, server_round)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Hand the call on, with the global weights as the clients get them."""
        return self._sent(self.strategy.configure_evaluate(server_round, arrays, config, grid), arrays)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Leave out clients without validation examples; none at all gives no metrics."""
        measured = [reply for reply in replies if not reply.has_error() and _examples(reply)]
        return self.strategy.aggregate_evaluate(server_round, measured) if measured else None

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


def _examples(reply: Message) -> int:
    records = list(reply.content.metric_records.values())
    value = records[0].get("num-examples", 0) if records else 0
    return value if isinstance(value, int) else 0
