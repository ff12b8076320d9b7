"""The federated task: one side of a RAG system, trained and evaluated from weights that come from outside."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.errors import DataError, ModelError, ServerRefusedError
from fedrag_cli.federated.checkpoint import ClientRounds, FitResult
from fedrag_cli.federated.handshake import Agreement, agreement_of
from fedrag_cli.federated.lora import freeze_a
from fedrag_cli.federated.messages import NO_SERVER, PROXIMAL_MU, round_number
from fedrag_cli.federated.privacy import noise_of_client, protected
from fedrag_cli.federated.weights import Weights, weights_digest
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore
from fedrag_cli.rag.system import RAGSystem, refresh_store
from fedrag_cli.text import printable
from fedrag_cli.trainers.huggingface.base import HuggingFaceTrainer
from fedrag_cli.trainers.huggingface.checks import trainable

if TYPE_CHECKING:
    from flwr.client import Client
    from flwr.clientapp import ClientApp
    from flwr.server import Server
    from flwr.server.strategy import Strategy as ClassicStrategy
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import Strategy


def _with_model(trainer: HuggingFaceTrainer, model: nn.Module) -> RAGSystem:
    rag_system = trainer.rag_system
    if trainer.side == "generator":
        generator = rag_system.require_trainable_generator()
        if model is generator.model:
            return rag_system
        return dataclasses.replace(rag_system, generator=generator.with_model(model))
    retriever = rag_system.require_trainable_retriever()
    if model is retriever.query_encoder:
        return rag_system
    if not isinstance(model, type(retriever.query_encoder)):
        raise ModelError(
            f"A retriever's model is a {type(retriever.query_encoder).__name__}, not a {type(model).__name__}.",
            f"Pass rag_system.retriever.query_encoder, or another {type(retriever.query_encoder).__name__}.",
        )
    both = getattr(trainer.config, "train", "query") == "both"
    shared = model is retriever.passage_encoder or (both and retriever.is_shared)
    own = dataclasses.replace(rag_system, retriever=retriever.with_query_encoder(model, shared=shared))
    if both:
        # The passages' embeddings follow this model's weights, so they cannot be those of the other store.
        own.knowledge_store = _copy_of(rag_system.knowledge_store, retriever.device)
        if len(own.knowledge_store):
            refresh_store(own)
        own.knowledge_store.encoder_fingerprint = own.retriever.fingerprint()
    return own


def _copy_of(store: KnowledgeStore, device: torch.device) -> InMemoryKnowledgeStore:
    copy = InMemoryKnowledgeStore(device=device)
    copy.add(store.nodes, store.embeddings)
    copy.corpus_fingerprint = store.corpus_fingerprint
    return copy


@dataclass(frozen=True)
class EvaluateResult:
    """How good weights are on a client's own validation examples."""

    examples: int
    """Number of validation examples; 0 where the client has none."""
    metrics: dict[str, float]
    """The loss as `validation_loss`, and what else its trainer measures."""


class FLTask:
    """Trains and evaluates one side of a RAG system for a federation.

    The same object serves every role: `fit` and `evaluate` are the client's work, `weights` and `agreement` what a
    server starts from; `server_app`, `client_app`, `server` and `client` wrap them for Flower.

    Args:
        trainer: The trainer of the side that is tuned, with this site's data.
        settings: The federation's settings; the defaults where none are given.
        work_directory: Where checkpoints within a round, likelihoods and the record of this client's rounds are kept;
            nowhere by default.
    """

    def __init__(
        self,
        trainer: HuggingFaceTrainer,
        settings: FederatedConfig | None = None,
        work_directory: Path | None = None,
    ) -> None:
        """Note what must agree, before any weight moves."""
        self.trainer = trainer
        self.settings = settings or FederatedConfig()
        self.work_directory = work_directory
        if self.settings.lora_aggregation == "freeze_a":
            freeze_a(trainer.model)
        self.agreement: Agreement = agreement_of(trainer, self.settings)
        self._seed = trainer.seed
        self._is_whole = True
        self._newest: tuple[str, FitResult] | None = None
        self.rounds = ClientRounds(work_directory, self.settings)
        if work_directory is not None:
            trainer.cache_directory = work_directory / "cache"

    @property
    def side(self) -> str:
        """What is tuned: retriever or generator."""
        return self.trainer.side

    def weights(self) -> Weights:
        """Return copies of the trained tensors as they are now, by name."""
        return self.trainer.trained_weights()

    def lend(self) -> Weights:
        """Return the trained tensors themselves, and leave the model without them until `load`.

        For a server, whose model does nothing while a round runs: the weights are in memory once.
        """
        weights = {name: parameter.detach().cpu() for name, parameter in trainable(self.trainer.model).items()}
        self.release()
        return weights

    def release(self) -> None:
        """Leave the model without the trained tensors until `load`, because somebody else has them."""
        for parameter in trainable(self.trainer.model).values():
            parameter.data = parameter.new_empty(0)
        self._is_whole = False

    def fit(self, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> FitResult:
        """Train on this site's examples, starting from the given weights.

        A round that was computed already is not computed again: the newest result is kept, for a server that was
        restarted and asks once more. Where this client adds noise, that holds over its own restarts too.

        Args:
            weights: The global weights, by name.
            config: `server-round` (from 1) and, under FedProx, `proximal-mu`.

        Raises:
            ModelError: Names or shapes differ from the trained tensors.
            DataError: This site has no training examples.
            ServerRefusedError: The weights are not finite, the round was not agreed, or the config holds no numbers.
            TrainingError: Training did not work; see the trainer.
        """
        _require_finite(weights)
        number = round_number(config, 1)
        proximal_mu = config.get(PROXIMAL_MU, 0.0)
        if isinstance(proximal_mu, bool) or not isinstance(proximal_mu, int | float) or not 0 <= proximal_mu < math.inf:
            raise ServerRefusedError(f"The server asks for a {PROXIMAL_MU} of {printable(proximal_mu, 40)}.", NO_SERVER)
        proximal_mu = float(proximal_mu)
        digest = weights_digest(weights)
        asked = f"{number} {proximal_mu} {digest}"
        if self._newest is not None and self._newest[0] == asked:
            return self._newest[1]
        # The weights of another round need not be in memory while this one is trained.
        self._newest = None
        self.rounds.begin(number, asked)
        privacy = self.settings.privacy
        adds_noise = privacy is not None and privacy.at == "client"
        result = self.rounds.given(asked) if adds_noise else None
        if result is None:
            result = self._train(weights, number, proximal_mu, digest)
            if privacy is not None and adds_noise:
                deviation = noise_of_client(privacy, self.settings.min_clients)
                sent = protected(result.weights, weights, privacy.clipping_norm, deviation)
                result = dataclasses.replace(result, weights=sent)
                self.rounds.give(asked, number, result, deviation / privacy.clipping_norm)
        self._newest = (asked, result)
        return result

    def evaluate(self, weights: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> EvaluateResult:
        """Measure the given weights on this site's validation examples; nothing in the config changes the measurement.

        Raises:
            ModelError: Names or shapes differ from the trained tensors.
            ServerRefusedError: The weights are not finite.
        """
        _require_finite(weights)
        self.trainer.load_trained_weights(weights)
        if not self.trainer.validation_examples:
            return EvaluateResult(0, {})
        measured = self.trainer.validate()
        metrics = {"validation_loss" if name == "loss" else name: value for name, value in measured.items()}
        return EvaluateResult(len(self.trainer.validation_examples), metrics)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights into the model; one that was left without tensors takes the given ones themselves.

        Raises:
            ModelError: Names or shapes differ from the trained tensors.
            ServerRefusedError: The weights are not finite; the model is as it was.
        """
        _require_finite(weights)
        if not self._is_whole:
            for name, parameter in trainable(self.trainer.model).items():
                if name in weights:
                    parameter.data = weights[name].to(parameter.device, parameter.dtype)
            self._is_whole = True
        self.trainer.load_trained_weights(weights)

    def around(self, model: nn.Module | None, train_dataset: Any = None, val_dataset: Any = None) -> FLTask:
        """Return the same task around another model and other data.

        Args:
            model: The model that is tuned: a `SentenceTransformer` (the query encoder), or a language model; the
                task's own where it is None.
            train_dataset: A `datasets.Dataset` with `query` and `response`, or a list of examples.
            val_dataset: The same for validation.

        Raises:
            ModelError: The model is of another kind than the trainer's.
            DataError: The trainer measures what needs relevant ids, and no validation example has any.
        """
        trainer = self.trainer
        own = type(trainer)(
            trainer.rag_system if model is None else _with_model(trainer, model),
            train_dataset=[] if train_dataset is None else train_dataset,
            validation_dataset=[] if val_dataset is None else val_dataset,
            config=trainer.config,
            seed=trainer.seed,
            reporter=trainer.reporter,
        )
        if trainer.extra_validation is not None and own.validation_examples:
            own.extra_validation = trainer.extra_validation.around(own)
        return FLTask(own, self.settings)

    def server(self, model: nn.Module, strategy: ClassicStrategy | None = None) -> Server:
        """Return a server of Flower's classic API, for `flwr.server.start_server`.

        Args:
            model: The model that the federation starts from; at the end it holds the global weights.
            strategy: A strategy of `flwr.server.strategy`; FedAvg by default. Where it has no initial parameters, the
                model's are set.
        """
        from fedrag_cli.federated.flower_api import ClassicServer

        return ClassicServer(self.around(model), strategy)

    def client(self, model: nn.Module, train_dataset: Any, val_dataset: Any = None) -> Client:
        """Return a client of Flower's classic API, for `flwr.client.start_client`.

        Make it once for all rounds: what is compared with the server's base model is the model as it is now.

        Args:
            model: The model that this client trains.
            train_dataset: This client's examples.
            val_dataset: This client's validation examples.
        """
        from fedrag_cli.federated.flower_api import ClassicClient

        return ClassicClient(self.around(model, train_dataset, val_dataset)).to_client()

    def server_app(self, strategy: Strategy | None = None, output: Path | None = None) -> ServerApp:
        """Return a server app of Flower's message API, for any deployment or simulation.

        Args:
            strategy: A strategy of `flwr.serverapp.strategy`; the one of the settings by default.
            output: Folder for the global weights; without it they are in this task's model only.
        """
        from fedrag_cli.federated.flower_api import server_app

        return server_app(self, strategy, output)

    def client_app(self) -> ClientApp:
        """Return a client app of Flower's message API, with this task's model and data."""
        from fedrag_cli.federated.flower_api import client_app

        return client_app(lambda _: self)

    def _train(self, weights: Mapping[str, Tensor], number: int, proximal_mu: float, digest: str) -> FitResult:
        trainer = self.trainer
        if not trainer.train_examples:
            raise DataError("This client has no training examples.", "Set dataset.train, or pass train_dataset.")
        trainer.load_trained_weights(weights)
        trainer.add_proximal_term(proximal_mu, weights)
        # Every round draws its own order of the examples; the first one is that of training without a federation.
        trainer.seed = self._seed + number - 1
        checkpoints = self._round_directory(number, digest)
        result = trainer.train(phase=f"round-{number}", checkpoints=checkpoints, finish=False, may_keep_untuned=False)
        trained = trainer.trained_weights()
        if checkpoints is not None:
            shutil.rmtree(checkpoints)
        metrics = {"loss": result.loss, "steps": float(result.steps), "seconds": result.seconds}
        return FitResult(trained, len(trainer.train_examples), metrics)

    def _round_directory(self, number: int, digest: str) -> Path | None:
        """Return the folder of a round's checkpoints; those of other rounds and other global weights are removed."""
        if self.work_directory is None:
            return None
        directory = self.work_directory / f"round-{number:04d}-{digest}"
        for other in self.work_directory.glob("round-*"):
            if other != directory:
                shutil.rmtree(other)
        return directory


def _require_finite(weights: Mapping[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ServerRefusedError(
                f"The global model holds values that are not finite, in {name}; the model here stays as it was.",
                "The server's owner finds in its messages what went wrong.",
            )
