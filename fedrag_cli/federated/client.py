"""What a client does with a message of the server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict

from fedrag_cli.errors import FederationError, FedRAGError, ServerRefusedError
from fedrag_cli.federated.handshake import Agreement, misfit
from fedrag_cli.federated.messages import (
    ACTION,
    AGREEMENT,
    EVALUATE_FIRST,
    EXAMPLES,
    FINAL,
    NAME,
    ROUNDS,
    STOP,
    VALIDATION_EXAMPLES,
    arrays_of,
    config_of,
    round_number,
)
from fedrag_cli.federated.weights import Weights, from_wire, record_bytes, update_to_wire
from fedrag_cli.runs.reporter import Reporter, SilentReporter, epsilon_text
from fedrag_cli.text import printable

if TYPE_CHECKING:
    from fedrag_cli.federated.task import EvaluateResult, FLTask


class ClientHandler:
    """Answers the server's messages with a federated task."""

    def __init__(
        self,
        task: FLTask,
        name: str = "",
        reporter: Reporter | None = None,
        on_final: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        """Start without having met a server.

        Args:
            task: The task with this client's model and data.
            name: The client's name, sent in the handshake.
            reporter: Told what happens.
            on_final: Called when the model holds the final global weights.
        """
        self.task = task
        self.name = name
        self.reporter: Reporter = reporter or SilentReporter()
        self.on_final = on_final
        self.finished = False
        self.failure: FedRAGError | None = None

    @property
    def ended(self) -> bool:
        """Whether the federation is over for this client, well or not."""
        return self.finished or self.failure is not None

    def __call__(self, message: Message) -> Message:
        """Return the reply to a message.

        Raises:
            ConnectionFailedError: The message comes with the server's agreement, and this client's is another.
            ServerRefusedError: The server asks for a round that was not agreed, or sends a model that cannot be right.
        """
        try:
            return self._answer(message)
        except ServerRefusedError as error:
            self.failure = error
            raise

    def _answer(self, message: Message) -> Message:
        kind = message.metadata.message_type
        if kind == MessageType.QUERY:
            return self._query(message)
        # Stock servers of Flower shake no hands; theirs comes with the work.
        if (text := config_of(message).get(AGREEMENT)) and (
            error := misfit(Agreement.from_json(str(text)), self.task.agreement)
        ):
            raise error
        return self._train(message) if kind == MessageType.TRAIN else self._evaluate(message)

    def _query(self, message: Message) -> Message:
        config = config_of(message)
        if config.get(ACTION) == STOP:
            self.failure = FederationError(
                "The server ended the federation without a final model.",
                "Its messages say why. Wait until it is resumed.",
            )
            return _reply(message, {ACTION: STOP})
        server = Agreement.from_json(str(config.get(AGREEMENT, "")))
        if error := misfit(server, self.task.agreement):
            self.failure = error
        else:
            self.task.rounds.agree(config.get(ROUNDS))
            self.reporter.note(f"Agreed with the server: {self.task.side}, {len(server.manifest)} tensors")
        return _reply(message, {AGREEMENT: self.task.agreement.to_json(), NAME: self.name})

    def _train(self, message: Message) -> Message:
        config = config_of(message)
        number, rounds = round_number(config, 1), config.get(ROUNDS)
        of = f" of {printable(rounds, 20)}" if rounds else ""
        self.reporter.note(f"Round {number}{of}: received the global model, {_megabytes(arrays_of(message))}")
        weights, before = self._received(message), None
        if config.get(EVALUATE_FIRST):
            before = self._measure(weights, number - 1, f"round {number}, before training")
        result = self.task.fit(weights, config)
        arrays = update_to_wire(result.weights, weights, self.task.settings.transport_dtype)
        reported = result.metrics | (before.metrics if before else {})
        spent = self.task.rounds.spent()
        self.reporter.event(
            "client_round",
            round=number,
            examples=result.examples,
            metrics=reported,
            bytes_received=record_bytes(arrays_of(message)),
            bytes_sent=record_bytes(arrays),
            **spent,
        )
        metrics = self._metrics(result.examples, reported, before)
        beside = f"{EXAMPLES} {result.examples}" + "".join(f", {name}" for name in metrics if name != EXAMPLES)
        self.reporter.note(
            f"Round {number}{of}: sending {len(arrays)} tensors, {_megabytes(arrays)}, with {beside}; then waiting"
            + (f". This client's own noise has spent {epsilon_text(spent, prefix='own_', long=True)}" if spent else "")
        )
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    def _evaluate(self, message: Message) -> Message:
        config = config_of(message)
        final = bool(config.get(FINAL))
        weights = self._received(message)
        number = round_number(config, 0)
        result = self._measure(weights, number, "the final model" if final else f"round {number}")
        if final:
            self.task.load(weights)
            if self.on_final is not None:
                self.on_final(result.metrics)
            self.finished = True
        metrics = self._metrics(result.examples, result.metrics, result)
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    def _received(self, message: Message) -> Weights:
        """Return the weights of a message, whose description is looked at before any memory is taken for them."""
        arrays, manifest = arrays_of(message), self.task.agreement.manifest
        dtype = self.task.settings.transport_dtype
        found = {name: (list(array.shape), array.dtype) for name, array in arrays.items()}
        if found != {name: (shape, dtype) for name, shape in manifest.items()}:
            raise ServerRefusedError("The server's model has other tensors than were agreed on; it is not taken.")
        try:
            return from_wire(arrays)
        except ValueError as error:
            raise ServerRefusedError("The server's model cannot be read; it is not taken.") from error

    def _measure(self, weights: Weights, number: int, what: str) -> EvaluateResult:
        """Measure the global model as it is after a round."""
        result = self.task.evaluate(weights)
        if result.examples:
            values = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
            self.reporter.note(f"The global model on {result.examples} validation questions ({what}): {values}")
            self.reporter.event("client_evaluation", round=number, examples=result.examples, metrics=result.metrics)
        return result

    def _metrics(self, examples: int, measured: Mapping[str, float], before: EvaluateResult | None) -> MetricRecord:
        """Return what is sent: numbers of examples, and those of the measured metrics that the config lists."""
        metrics: dict[str, int | float] = {EXAMPLES: examples}
        if before is not None and before.examples:
            metrics[VALIDATION_EXAMPLES] = before.examples
        metrics |= {name: float(measured[name]) for name in self.task.settings.metrics if name in measured}
        return MetricRecord(dict(metrics))


def _reply(message: Message, values: dict[str, str]) -> Message:
    return Message(RecordDict({"config": ConfigRecord(dict(values))}), reply_to=message)


def _megabytes(record: ArrayRecord) -> str:
    return f"{record_bytes(record) / 1e6:.1f} MB"
