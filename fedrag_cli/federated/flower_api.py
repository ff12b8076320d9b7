"""The federated task behind Flower's message API and its classic one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import ClientManager, History, Server, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.strategy import Strategy as ClassicStrategy
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedrag_cli.errors import ConfigError, FederationError
from fedrag_cli.federated.aggregation import check_weights, makes_mean, mean_content, require_mean
from fedrag_cli.federated.client import ClientHandler
from fedrag_cli.federated.handshake import Agreement, misfit
from fedrag_cli.federated.messages import (
    AGREEMENT,
    EXAMPLES,
    PROXIMAL_MU,
    SERVER_ROUND,
    config_of,
    round_number,
    with_arrays,
)
from fedrag_cli.federated.privacy import ledger_entry, privacy_record
from fedrag_cli.federated.validate_update import (
    LONGEST_REASON,
    RefusedUpdateError,
    Update,
    bound_updates,
    require_quorum,
    screen_measurements,
    screen_update,
)
from fedrag_cli.federated.weights import (
    NUMPY,
    Manifest,
    Weights,
    from_wire,
    joined,
    save_weights,
    to_ndarrays,
    to_wire,
)
from fedrag_cli.registry import build
from fedrag_cli.runs.files import replace_directory_atomically
from fedrag_cli.text import printable

if TYPE_CHECKING:
    from fedrag_cli.federated.task import FLTask

WEIGHTS_FILE = "weights.safetensors"


class ScreenedStrategy(Strategy):
    """A strategy that sees only updates which passed the screening, from clients that agree with the server."""

    def __init__(self, strategy: Strategy, task: FLTask, config: object = None) -> None:
        """Wrap a strategy, built from a config or the user's; raises FederationError where the settings forbid it."""
        self.strategy = strategy
        self.task = task
        self._described_by = strategy if config is None else config
        self._reference = ArrayRecord()
        self._ledger: list[dict[str, Any] | None] = []
        require_mean(self._described_by, task.settings)

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
        messages, updates, refused = _by_node(replies), dict[str, Update](), dict[str, str]()
        for node, reply in messages.items():
            try:
                if reply.has_error():
                    raise RefusedUpdateError("it failed; its own messages say why")
                updates[node] = screen_update(reply.content, manifest, self._reference, settings)
            except RefusedUpdateError as refusal:
                refused[node] = str(refusal)
                self._note(server_round, f"update of {node} refused: {refusal}")
        require_quorum(server_round, updates, refused, settings, "Look at the refused clients' own messages.")
        updates, outliers = bound_updates(updates, self._reference, settings, self._described_by)
        for node, reason in outliers.items():
            self._note(server_round, f"update of {node} is an outlier: {reason}")
        passed = [messages[node] for node in updates]
        if makes_mean(settings):
            del passed[1:]
            passed[0].content = mean_content(list(updates.values()), manifest, settings)
        else:
            for message, update in zip(passed, updates.values(), strict=True):
                message.content = update.content()
        with np.errstate(all="ignore"):
            arrays, metrics = self.strategy.aggregate_train(server_round, passed)
            if arrays is not None:
                check_weights(server_round, from_wire(arrays), settings.transport_dtype)
        if settings.privacy is not None:
            self._ledger.append(ledger_entry(settings.privacy, len(updates)))
            spent = {name: value for name, value in privacy_record(self._ledger).items() if value is not None}
            metrics = MetricRecord({**(metrics or {}), **spent})
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Hand the call on, with the global weights as the clients get them."""
        return self._sent(self.strategy.configure_evaluate(server_round, arrays, config, grid), arrays)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Hand on what passed, of clients with validation examples; none at all gives no metrics."""
        settings, messages = self.task.settings, _by_node(replies)
        contents = {node: reply.content for node, reply in messages.items() if not reply.has_error()}
        measured = screen_measurements(
            contents,
            settings.metrics,
            settings,
            lambda node, what: self._note(server_round, f"measurement of {node} {what}"),
        )
        # Flower takes means of metrics that all report.
        reports = [metrics for _, metrics in measured.values()]
        usual = {name for name in settings.metrics if 2 * sum(name in report for report in reports) > len(reports)}
        passed = []
        for node, (count, metrics) in measured.items():
            if not usual <= metrics.keys():
                self._note(server_round, f"measurement of {node} refused: it lacks what others report")
                continue
            known: dict[str, int | float] = {name: metrics[name] for name in sorted(usual)}
            messages[node].content = RecordDict({"metrics": MetricRecord({EXAMPLES: count, **known})})
            passed.append(messages[node])
        return self.strategy.aggregate_evaluate(server_round, passed) if passed else None

    def summary(self) -> None:
        """Hand the call on."""
        self.strategy.summary()

    def _sent(self, messages: Iterable[Message], arrays: ArrayRecord) -> list[Message]:
        """Let messages carry the weights in the agreed number format, and what clients must have in common."""
        dtype = self.task.settings.transport_dtype
        sent = with_arrays(messages, arrays if dtype == "float32" else to_wire(from_wire(arrays), dtype))
        agreement = self.task.agreement.to_json()
        for message in sent:
            if not message.content.config_records:
                message.content["config"] = ConfigRecord()
            config_of(message)[AGREEMENT] = agreement
        return sent

    def _note(self, server_round: int, what: str) -> None:
        self.task.trainer.reporter.note(f"Round {server_round}: {what}")


def _by_node(replies: Iterable[Message]) -> dict[str, Message]:
    """Return replies by the node that sent them, in the order of their numbers: sums depend on nothing else."""
    ordered = sorted(replies, key=lambda reply: reply.metadata.src_node_id)
    return {str(reply.metadata.src_node_id): reply for reply in ordered}


def server_app(task: FLTask, strategy: Strategy | None = None, output: Path | None = None) -> ServerApp:
    """Return the server app of a task; see `FLTask.server_app`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        settings = task.settings
        chosen, config = strategy, None
        if chosen is None:
            config, rate = settings.strategy, task.trainer.config.learning_rate
            chosen = build("strategy", config, min_clients=settings.min_clients, learning_rate=rate)
        result = ScreenedStrategy(chosen, task, config).start(
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
    """Return a client app; `task_of` is called for each message with the node's context, so it should remember."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        return ClientHandler(task_of(context))(message)

    app.train()(answer)
    app.evaluate()(answer)
    app.query()(answer)
    return app


# The name that `flwr.server.strategy.FedProx` gives it.
CLASSIC_PROXIMAL_MU = "proximal_mu"
Failures = list[tuple[ClientProxy, Any] | BaseException]


class ClassicClient(NumPyClient):
    """A client of the classic API around a federated task with this client's model and data."""

    def __init__(self, task: FLTask) -> None:
        """Keep the task; raises ConfigError where its settings ask for what this API cannot do."""
        _require_plain_weights(task)
        self.task = task
        self._rounds = 0

    def get_parameters(self, config: dict[str, Scalar]) -> list[NDArray[Any]]:
        """Return the trained tensors in the order of their names."""
        return list(to_ndarrays(self.task.weights()))

    def fit(
        self, parameters: list[NDArray[Any]], config: dict[str, Scalar]
    ) -> tuple[list[NDArray[Any]], int, dict[str, Scalar]]:
        """Train from the given weights on this client's own examples.

        A server that does not say which round it is gets the order of the examples of one round more each time.

        Raises:
            ConnectionFailedError: The server's models or settings are others.
            FederationError: The arrays are not those of the tuned tensors.
        """
        weights = self._named(parameters, config)
        self._rounds = round_number(config, self._rounds + 1)
        proximal_mu = config.get(PROXIMAL_MU, config.get(CLASSIC_PROXIMAL_MU, 0.0))
        result = self.task.fit(weights, {SERVER_ROUND: self._rounds, PROXIMAL_MU: proximal_mu})
        return list(to_ndarrays(result.weights)), result.examples, self._listed(result.metrics)

    def evaluate(
        self, parameters: list[NDArray[Any]], config: dict[str, Scalar]
    ) -> tuple[float, int, dict[str, Scalar]]:
        """Measure the given weights on this client's own validation examples."""
        result = self.task.evaluate(self._named(parameters, config), config)
        return result.metrics.get("validation_loss", 0.0), result.examples, self._listed(result.metrics)

    def _listed(self, metrics: Mapping[str, float]) -> dict[str, Scalar]:
        return {name: metrics[name] for name in self.task.settings.metrics if name in metrics}

    def _named(self, parameters: Sequence[NDArray[Any]], config: Mapping[str, Scalar]) -> Weights:
        theirs = config.get(AGREEMENT)
        if theirs is not None and (error := misfit(Agreement.from_json(str(theirs)), self.task.agreement)):
            raise error
        return named_weights(self.task, parameters)


class ClassicServer(Server):
    """A server of the classic API; its task's model, which it starts from, ends with the global weights."""

    def __init__(self, task: FLTask, strategy: ClassicStrategy | None = None) -> None:
        """Give the strategy the model's weights where it has none; raises ConfigError where settings forbid it."""
        _require_plain_weights(task)
        self.task = task
        initial = ndarrays_to_parameters(list(to_ndarrays(task.weights())))
        chosen: Any = strategy if strategy is not None else _fedavg(task)
        if getattr(chosen, "initial_parameters", None) is None:
            chosen.initial_parameters = initial
        super().__init__(client_manager=SimpleClientManager(), strategy=AgreedStrategy(chosen, task))

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[History, float]:
        """Run the rounds, and put the global weights into the model."""
        history, elapsed = super().fit(num_rounds, timeout)
        self.task.load(named_weights(self.task, parameters_to_ndarrays(self.parameters)))
        return history, elapsed


def named_weights(task: FLTask, parameters: Sequence[NDArray[Any]]) -> Weights:
    """Give a task's tensors, in the order of their names, these back; raises FederationError where a shape differs."""
    manifest = task.agreement.manifest
    shapes = [list(array.shape) for array in parameters]
    if shapes != list(manifest.values()):
        raise FederationError(
            f"{len(shapes)} tensors came over the classic API, whose shapes are not those of the {len(manifest)} "
            "tensors that are tuned here.",
            "Use the same base model and LoRA settings on server and clients.",
        )
    return {name: torch.from_numpy(array.copy()) for name, array in zip(manifest, parameters, strict=True)}


class AgreedStrategy(ClassicStrategy):
    """Any classic strategy, with messages that say which round it is and what clients must have in common.

    It sees only updates and measurements that passed the screening.
    """

    def __init__(self, strategy: ClassicStrategy, task: FLTask) -> None:
        """Wrap a strategy; the task is the server's."""
        self.strategy = strategy
        self._agreement = task.agreement.to_json()
        self._manifest = task.agreement.manifest
        self._settings = task.settings
        self._reporter = task.trainer.reporter
        self._reference = ArrayRecord()

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Hand the call on."""
        return self.strategy.initialize_parameters(client_manager)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Add the round and the agreement to what the strategy says, and note the global weights."""
        self._reference = _own_arrays(self._manifest, parameters)
        asked = self.strategy.configure_fit(server_round, parameters, client_manager)
        return [(client, FitIns(ins.parameters, self._extended(server_round, ins.config))) for client, ins in asked]

    def aggregate_fit(
        self, server_round: int, results: list[tuple[ClientProxy, FitRes]], failures: Failures
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Name the clients that failed and hand on what passed; raises FederationError where nothing did."""
        reasons = [_reason(failure) for failure in failures]
        sent = {client.cid: result for client, result in results}
        updates: dict[str, Update] = {}
        for cid, result in sent.items():
            try:
                content = _content(result.num_examples, result.metrics)
                content["arrays"] = self._named(result.parameters)
                updates[cid] = screen_update(content, self._manifest, self._reference, self._settings)
            except RefusedUpdateError as refusal:
                reasons.append(f"that of {printable(cid)} was refused: {refusal}")
        for reason in reasons:
            self._note(server_round, f"no usable update: {reason}")
        updates, outliers = bound_updates(updates, self._reference, self._settings, self.strategy)
        for cid, reason in outliers.items():
            self._note(server_round, f"update of {printable(cid)} is an outlier: {reason}")
        for cid, update in updates.items():
            arrays = [joined(update.blocks(name), shape) for name, shape in self._manifest.items()]
            sent[cid].parameters = ndarrays_to_parameters(arrays)
            sent[cid].num_examples, sent[cid].metrics = update.examples, dict(update.metrics)
        # Sums depend on nothing but who sent what, and not on who came first.
        ordered = sorted(results, key=lambda item: item[0].cid)
        results = [(client, result) for client, result in ordered if client.cid in updates]
        if not results:
            raise FederationError(
                f"Round {server_round} has no usable update" + "".join(f"; {reason}" for reason in reasons) + ".",
                "Look at the clients' own messages.",
            )
        with np.errstate(all="ignore"):
            parameters, metrics = self.strategy.aggregate_fit(server_round, results, failures)
            if parameters is not None:
                aggregated = from_wire(_own_arrays(self._manifest, parameters))
                check_weights(server_round, aggregated, self._settings.transport_dtype)
        return parameters, metrics

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Add the round and the agreement to what the strategy says."""
        asked = self.strategy.configure_evaluate(server_round, parameters, client_manager)
        return [
            (client, EvaluateIns(ins.parameters, self._extended(server_round, ins.config))) for client, ins in asked
        ]

    def aggregate_evaluate(
        self, server_round: int, results: list[tuple[ClientProxy, EvaluateRes]], failures: Failures
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Hand on what passed, of clients with validation examples; none at all gives no metrics."""
        told = {client.cid: {**result.metrics, "validation_loss": result.loss} for client, result in results}
        contents = {client.cid: _content(result.num_examples, told[client.cid]) for client, result in results}
        measured = screen_measurements(
            contents,
            [*self._settings.metrics, "validation_loss"],
            self._settings,
            lambda cid, what: self._note(server_round, f"measurement of {printable(cid)} {what}"),
        )
        passed = [(client, result) for client, result in results if client.cid in measured]
        for client, result in passed:
            result.num_examples, metrics = measured[client.cid]
            result.metrics = {name: value for name, value in metrics.items() if name in result.metrics}
        return self.strategy.aggregate_evaluate(server_round, passed, failures) if passed else (None, {})

    def evaluate(self, server_round: int, parameters: Parameters) -> tuple[float, dict[str, Scalar]] | None:
        """Hand the call on."""
        return self.strategy.evaluate(server_round, parameters)

    def _named(self, parameters: Parameters) -> ArrayRecord:
        """Return arrays as the message API has them; raises RefusedUpdateError where their number is another."""
        if len(parameters.tensors) != len(self._manifest):
            raise RefusedUpdateError(f"it has {len(parameters.tensors)} tensors, not {len(self._manifest)}")
        return ArrayRecord(
            {
                name: Array("float32", tuple(shape), NUMPY, tensor)
                for (name, shape), tensor in zip(self._manifest.items(), parameters.tensors, strict=True)
            }
        )

    def _note(self, server_round: int, what: str) -> None:
        self._reporter.note(f"Round {server_round}: {what}")

    def _extended(self, server_round: int, config: Mapping[str, Scalar]) -> dict[str, Scalar]:
        return {**config, SERVER_ROUND: server_round, AGREEMENT: self._agreement}


def _own_arrays(manifest: Manifest, parameters: Parameters) -> ArrayRecord:
    """Return the server's own arrays as the message API has them."""
    arrays = parameters_to_ndarrays(parameters)
    return ArrayRecord({name: Array(array.astype(np.float32)) for name, array in zip(manifest, arrays, strict=True)})


def _content(examples: object, told: Mapping[str, object]) -> RecordDict:
    """Return a classic client's numbers as the message API has them; whatever else it tells is left out."""
    numbers = {name: float(value) for name, value in told.items() if isinstance(value, float | int)}
    record = MetricRecord(dict(numbers))
    if isinstance(examples, int | np.integer) and not isinstance(examples, bool):
        record[EXAMPLES] = int(examples)
    return RecordDict({"metrics": record})


def _require_plain_weights(task: FLTask) -> None:
    settings = task.settings
    problem = ""
    if settings.lora_aggregation == "svd":
        problem = "averages adapters by its own strategies, without federated.lora_aggregation: svd"
        change = "Set it to average or freeze_a"
    elif settings.privacy is not None:
        problem, change = "sends weights as they are, without federated.privacy", "Remove federated.privacy"
    elif settings.transport_dtype != "float32":
        problem = f"sends weights as float32, not {settings.transport_dtype}"
        change = "Set federated.transport_dtype to float32"
    if problem:
        raise ConfigError(f"Flower's classic API {problem}.", f"{change}, or use server_app() and client_app().")


def _fedavg(task: FLTask) -> FedAvg:
    def mean(results: list[tuple[int, dict[str, Scalar]]]) -> dict[str, Scalar]:
        names = sorted({name for _, metrics in results for name in metrics})
        return {name: _weighted(results, name) for name in names}

    clients = task.settings.min_clients
    return FedAvg(
        min_fit_clients=clients,
        min_evaluate_clients=clients,
        min_available_clients=clients,
        fit_metrics_aggregation_fn=mean,
        evaluate_metrics_aggregation_fn=mean,
        accept_failures=True,
    )


def _weighted(results: list[tuple[int, dict[str, Scalar]]], name: str) -> float:
    known = [(examples, float(metrics[name])) for examples, metrics in results if name in metrics]
    total = sum(examples for examples, _ in known)
    return sum(examples * value for examples, value in known) / total if total else 0.0


def _reason(failure: tuple[ClientProxy, Any] | BaseException) -> str:
    """Say in words how a client failed, which Flower gives as what was raised or as a reply."""
    if isinstance(failure, BaseException):
        text = getattr(failure, "message", "") or str(failure) or type(failure).__name__
        return f"a client failed: {printable(text, LONGEST_REASON)}"
    client, reply = failure
    return f"{printable(client.cid)} failed: {printable(reply.status.message or reply.status.code.name)}"
