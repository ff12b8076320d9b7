"""The manager of the trainers that run on transformers.Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedrag_cli.config.fields import CLIENT_REPORTS, GENERATOR_METRICS
from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.data.relevance import resolve_relevant_ids
from fedrag_cli.errors import ConfigError, DataError, ModelError
from fedrag_cli.evaluation.evaluator import evaluate
from fedrag_cli.federated.task import FLTask
from fedrag_cli.runs.files import os_errors, replace_directory_atomically
from fedrag_cli.trainer_managers.base import BaseRAGTrainerManager, Mode
from fedrag_cli.trainers.base import TrainResult
from fedrag_cli.trainers.huggingface.base import HuggingFaceTrainer

FINISHED = "finished"


class HuggingFaceRAGTrainerManager(BaseRAGTrainerManager):
    """Runs the retriever's trainer, the generator's, or both in turn.

    Args:
        mode: What to tune; it can be changed between two calls of `train`.
        retriever_trainer: Needed by the modes retriever and alternating.
        generator_trainer: Needed by the modes generator and alternating.
        cycles: How often the alternating mode tunes both sides.

    Raises:
        ConfigError: The mode is unknown or its trainer is missing.
    """

    def __init__(
        self,
        mode: Mode = "retriever",
        retriever_trainer: HuggingFaceTrainer | None = None,
        generator_trainer: HuggingFaceTrainer | None = None,
        cycles: int = 1,
    ) -> None:
        """Check that mode and trainers fit."""
        self.trainers = {"retriever": retriever_trainer, "generator": generator_trainer}
        self.cycles = cycles
        self.mode = mode
        for trainer in self.trainers.values():
            if trainer is not None:
                _add_validation_metric(trainer)

    @property
    def mode(self) -> Mode:
        """What is tuned: retriever, generator, or both in turn."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in get_args(Mode):
            raise ConfigError(f"There is no mode '{mode}'.", f"Modes: {', '.join(get_args(Mode))}.")
        self._mode: Mode = mode
        for side in self._sides():
            self._trainer(side)

    def train(self, checkpoints: Path | None = None) -> TrainResult:
        """Tune what the mode says; in alternating mode each phase uses the other side's newest weights.

        Args:
            checkpoints: Folder for checkpoints and finished phases; where it holds some, training goes on from there.

        Returns:
            The result; with several phases the mean loss over the steps of all of them, the sum of the steps, and each
            phase's own loss, steps and metrics by its name.
        """
        results: dict[str, TrainResult] = {}
        for number, side in enumerate(self._sides() * self._cycles(), start=1):
            phase = f"{number}-{side}"
            results[phase] = self._train_phase(phase, side, checkpoints / phase if checkpoints is not None else None)
        if len(results) == 1:
            return next(iter(results.values()))
        steps = sum(result.steps for result in results.values())
        return TrainResult(
            loss=sum(result.loss * result.steps for result in results.values()) / steps,
            steps=steps,
            metrics={
                phase: {"loss": result.loss, "steps": result.steps, **result.metrics}
                for phase, result in results.items()
            },
            seconds=sum(result.seconds for result in results.values()),
        )

    def get_federated_task(self, settings: FederatedConfig | None = None, work_directory: Path | None = None) -> FLTask:
        """Return the federated task of the side that the mode tunes.

        Args:
            settings: The federation's settings; by default those of the RAG system's config, or the defaults.
            work_directory: Where checkpoints within a round and likelihoods are kept; nowhere by default.

        Raises:
            ConfigError: The mode is alternating; a federation tunes one side.
            DataError: A metric that clients report cannot be measured on the validation examples.
        """
        if self.mode == "alternating":
            raise ConfigError(
                "A federation tunes one side, but the mode is alternating.",
                "Set trainer.mode to retriever or generator, and run a federation for each, one after the other.",
            )
        trainer = self._trainer(self.mode)
        config = trainer.rag_system.config
        settings = settings or (config.federated if config is not None else None) or FederatedConfig()
        if trainer.validation_examples:
            _add_metrics(trainer, [name for name in settings.metrics if name not in CLIENT_REPORTS])
        return FLTask(trainer, settings, work_directory)

    def _sides(self) -> list[str]:
        return ["retriever", "generator"] if self.mode == "alternating" else [self.mode]

    def _cycles(self) -> int:
        return self.cycles if self.mode == "alternating" else 1

    def _trainer(self, side: str) -> HuggingFaceTrainer:
        trainer = self.trainers[side]
        if trainer is None:
            raise ConfigError(f"The mode '{self.mode}' needs a {side}_trainer.", f"Pass {side}_trainer=.")
        return trainer

    def _train_phase(self, phase: str, side: str, directory: Path | None) -> TrainResult:
        trainer = self._trainer(side)
        if directory is None:
            return trainer.train(phase=phase)
        finished = directory / FINISHED
        if finished.is_dir():
            return _restore_phase(trainer, finished)
        result = trainer.train(phase=phase, checkpoints=directory)
        trainer.processes.run_on_rank_0(lambda: _keep_phase(trainer, result, finished))
        return result


def _keep_phase(trainer: HuggingFaceTrainer, result: TrainResult, finished: Path) -> None:
    with replace_directory_atomically(finished) as target, os_errors(target):
        save_file(trainer.trained_weights(), target / "weights.safetensors")
        (target / "result.json").write_text(json.dumps(result.to_dict()), encoding="utf-8")


def _restore_phase(trainer: HuggingFaceTrainer, finished: Path) -> TrainResult:
    try:
        trainer.load_trained_weights(load_file(finished / "weights.safetensors"))
        return TrainResult(**json.loads((finished / "result.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"The finished phase in '{finished}' is damaged: {error}", "Remove the folder to run the phase again."
        ) from error


def _add_validation_metric(trainer: HuggingFaceTrainer) -> None:
    """Let a trainer validate by a metric of the whole RAG system, where its config chooses one."""
    metric = trainer.config.validation.metric
    if metric not in (None, "loss"):
        _add_metrics(trainer, [str(metric)])


def _add_metrics(trainer: HuggingFaceTrainer, names: list[str]) -> None:
    """Let a trainer measure metrics of the whole RAG system when it validates, beside that of its config."""
    chosen = trainer.config.validation.metric
    metrics = list(dict.fromkeys([*([chosen] if chosen not in (None, "loss") else []), *names]))
    if metrics:
        trainer.extra_validation = SystemMetrics(trainer, metrics)


class SystemMetrics:
    """Measures a trainer's whole RAG system on its validation examples.

    Args:
        trainer: The trainer.
        metrics: Names of the metrics, at least one.

    Raises:
        DataError: There are no validation examples, or none of them has the relevant ids that a metric needs.
    """

    def __init__(self, trainer: HuggingFaceTrainer, metrics: list[str]) -> None:
        """Find the relevant passages once."""
        self._rag_system, self._metrics = trainer.rag_system, metrics
        self._examples = resolve_relevant_ids(trainer.validation_examples, trainer.rag_system.knowledge_store.nodes)
        if not self._examples:
            raise DataError(
                f"The validation metric '{metrics[0]}' needs validation examples.", "Pass validation_dataset."
            )
        for metric in metrics:
            if metric not in GENERATOR_METRICS and not any(example.relevant_ids for example in self._examples):
                raise DataError(
                    f"The validation metric '{metric}' needs relevant ids, but no validation example has any.",
                    "Add a relevant_ids column, or choose the metric loss.",
                )

    def __call__(self) -> dict[str, Any]:
        """Return the metrics' means by name."""
        return evaluate(self._rag_system, self._examples, self._metrics).means()

    def around(self, trainer: HuggingFaceTrainer) -> SystemMetrics:
        """Return the same for another trainer."""
        return SystemMetrics(trainer, self._metrics)
