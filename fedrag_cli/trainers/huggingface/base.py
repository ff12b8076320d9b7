"""What both trainers share: data, arguments, checkpoints and the checks before and after."""

from __future__ import annotations

import tempfile
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from fedrag_cli.config.fields import LOWER_IS_BETTER
from fedrag_cli.data.examples import Example, examples_from_dataset, load_examples
from fedrag_cli.data.relevance import judged_examples
from fedrag_cli.errors import ConfigError, DataError, ModelError, RunInterruptedError, TrainingError
from fedrag_cli.losses import proximal_penalty
from fedrag_cli.rag.models import has_fast_bfloat16, require_bfloat16, tensors_fingerprint
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.runs.files import latest_checkpoint, os_errors
from fedrag_cli.runs.interrupt import deferred_interrupts
from fedrag_cli.runs.processes import join_processes, process_count
from fedrag_cli.runs.reporter import Reporter, SilentReporter
from fedrag_cli.trainers.base import BaseTrainer, TrainResult
from fedrag_cli.trainers.config import TrainingConfig
from fedrag_cli.trainers.huggingface.checks import (
    PhaseStart,
    StepDiagnostics,
    copy_weights,
    require_finite,
    require_moved,
    require_trainable,
    trainable,
)
from fedrag_cli.trainers.huggingface.training_loop import (
    IGNORED,
    Batches,
    Instances,
    LossFunction,
    ScheduleCallback,
    TrainingLoop,
)


def training_arguments(
    config: TrainingConfig,
    *,
    directory: Path,
    seed: int,
    device: torch.device,
    report_to: tuple[str, ...] = (),
    unused_parameters: bool = False,
) -> TrainingArguments:
    """Return the arguments of transformers.Trainer for a trainer's settings.

    Validation and checkpoints are scheduled by `ScheduleCallback`; the arguments only allow them.

    Args:
        config: The trainer's settings.
        directory: Where checkpoints go.
        seed: Seed of data order and dropout.
        device: Where the model is.
        report_to: Experiment trackers.
        unused_parameters: Whether the loss may leave trained parameters out, which several processes must know.

    Raises:
        TrainingError: The learning rate is not above 0.
        ModelError: The device cannot compute in the wanted precision.
    """
    if config.learning_rate <= 0:
        raise TrainingError(
            f"The learning rate is {config.learning_rate}, so training could not move a weight.",
            "Set learning_rate above 0, for instance 2e-5 for a retriever or 2e-4 for LoRA.",
        )
    precision = mixed_precision(config.precision, device)
    arguments = TrainingArguments(
        output_dir=str(directory),
        seed=seed,
        learning_rate=config.learning_rate,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        optim=config.optimizer,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        activation_checkpointing=config.gradient_checkpointing,
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if device.type == "cpu" and process_count() > 1 else None,
        ddp_find_unused_parameters=unused_parameters,
        ddp_broadcast_buffers=False,
        dataloader_pin_memory=device.type == "cuda",
        # The mean loss, the check for NaN and an exact resume need every step; `log_every` thins the records only.
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=10**9,
        metric_for_best_model=config.validation.metric or "loss",
        greater_is_better=(config.validation.metric or "loss") not in LOWER_IS_BETTER,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(report_to) or "none",
        log_level="error",
    )
    # Several devices are for a launcher, with a process each; without it the model stays on the one it is on.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if device.type == "cuda" and device.index is not None and process_count() == 1:
        _place(arguments, device)
    return arguments


def _place(arguments: TrainingArguments, device: torch.device) -> None:
    """Let transformers.Trainer and accelerate train on a device; by themselves they take the first one they see.

    Both keep their choice once it is made: transformers in a cached property, accelerate in its shared state. What asks
    for `cuda` without a number gets the current device.
    """
    torch.cuda.set_device(device)
    vars(arguments)["_setup_devices"] = device
    arguments.distributed_state.device = device


def mixed_precision(precision: str, device: torch.device) -> str:
    """Return the number format that a trainer's `precision` means on a device; raises ModelError where it has none."""
    if precision == "auto":
        return "bfloat16" if device.type == "cuda" and has_fast_bfloat16(device) else "float32"
    if precision == "fast":
        return "bfloat16" if has_fast_bfloat16(device) else "float32"
    if precision == "float16" and device.type != "cuda":
        raise ModelError(
            f"precision: float16 needs a cuda device, but the model is on {device.type}.", "Set precision: auto."
        )
    if precision == "bfloat16":
        require_bfloat16(device, "The precision of training")
    return precision


class ExtraMetrics(Protocol):
    """What a trainer measures beside its loss when it validates."""

    def __call__(self) -> Mapping[str, float]:
        """Return the metrics by name."""

    def around(self, trainer: HuggingFaceTrainer) -> ExtraMetrics:
        """Return the same for another trainer's RAG system and validation examples."""


class HuggingFaceTrainer(BaseTrainer):
    """A trainer that runs on transformers.Trainer.

    Args:
        rag_system: The RAG system to tune.
        train_dataset: A `datasets.Dataset` with `query` and `response`, or a list of examples; by default the
            config's `dataset.train`.
        validation_dataset: The same for validation; by default the config's `dataset.validation`, if any.
        config: The trainer's settings; by default those of the RAG system's config, or the class's defaults.
        seed: Seed of data order, dropout and adapter initialisation; by default the config's `run.seed`.
        reporter: Takes events and progress; silent by default.
    """

    config: TrainingConfig
    what: str
    """What is trained, for messages."""
    has_unused_parameters = False
    """Whether the loss may leave trained parameters out."""

    def __init__(
        self,
        rag_system: RAGSystem,
        train_dataset: Any = None,
        validation_dataset: Any = None,
        config: TrainingConfig | None = None,
        *,
        seed: int | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        """Read the data and check that the model can be trained."""
        self.rag_system = rag_system
        self.config = config or self._config_of(rag_system)
        self.seed = seed if seed is not None else rag_system.config.run.seed if rag_system.config else 42
        self.processes = join_processes(lambda: rag_system.retriever.device)
        self.reporter: Reporter = reporter if reporter and self.processes.is_rank_0 else SilentReporter()
        self.train_examples = self._examples(train_dataset, "train")
        self.validation_examples = self._examples(validation_dataset, "validation")
        self.extra_validation: ExtraMetrics | None = None
        self.reference_weights: Mapping[str, Tensor] | None = None
        self.proximal_mu = 0.0
        self.cache_directory: Path | None = None
        """Folder for what stays valid from one call of `train` to the next; that of the checkpoints by default."""
        self.diagnostics = StepDiagnostics(self.processes)
        if self.config.needs_responses:
            self._require_responses()

    @classmethod
    def from_config(cls, config: TrainingConfig, rag_system: RAGSystem, **options: Any) -> HuggingFaceTrainer:
        """Build the trainer the way the registry does: config first; options as for the class."""
        return cls(rag_system, config=config, **options)

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The model that transformers.Trainer sees; its parameters with gradient are what is trained."""

    @abstractmethod
    def _default_config(self) -> TrainingConfig: ...

    @abstractmethod
    def _prepare(self, cache_directory: Path | None, resuming: Path | None) -> Sequence[Any]:
        """Do what comes before the first step and return the training instances."""

    def _prepared(self) -> Any:
        """Return what `_prepare` has left in the trainer of the main process and the others need."""
        return None

    def _take_over(self, prepared: Any, resuming: Path | None) -> None:
        """Put what `_prepared` gave into the trainer of another process."""

    @abstractmethod
    def _collate(self, instances: list[Any]) -> dict[str, Any]: ...

    def _loss_function(self) -> LossFunction | None:
        """Return the loss of outputs and labels, where the model does not compute its loss itself."""
        return None

    def _lengths(self, instances: Sequence[Any]) -> list[int] | None:
        """Return the tokens of each instance, where instances of similar length go into the same step."""
        return None

    def _finish(self) -> None:
        """Do what comes after the last step, with the final weights."""

    def _on_batches(self, batches: Batches) -> None:
        """Look at, or add to, the batches of one optimizer step before they are computed."""

    def _on_validation(self) -> None:
        """Do what `validate` does to the RAG system, in a process that does not validate itself."""

    def _on_checkpoint(self, directory: Path) -> None:
        """Add what is ours to a checkpoint."""

    def _on_step(self, step: int, last: bool) -> None:
        """Do what is due after an optimizer step; `last` says that none follows."""

    def _counts(self) -> dict[str, Any]:
        """Return counts for the result, such as truncated prompts."""
        return {}

    def add_proximal_term(self, mu: float, reference: Mapping[str, Tensor] | None = None) -> None:
        """Pull the weights towards a reference while training (FedProx, arXiv 1812.06127).

        Args:
            mu: Strength; 0 takes the term away.
            reference: Weights by name as `trained_weights` gives them; those of now by default.
        """
        self.proximal_mu = mu
        self.reference_weights = dict(reference) if reference is not None else self.trained_weights()

    def trained_weights(self) -> dict[str, Tensor]:
        """Return copies of the tensors that training changes, by name, on the CPU."""
        return {name: parameter.detach().cpu().clone() for name, parameter in trainable(self.model).items()}

    def load_trained_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put tensors back that `trained_weights` gave; raises ModelError where names or shapes differ."""
        copy_weights(trainable(self.model), weights)
        self._finish()

    def require_ready(self) -> None:
        """Check what can be checked of a training before anything is computed.

        Raises:
            DataError: There are no training examples, or none that anything can be learnt from.
            ModelError: The device cannot compute in the wanted precision.
            TrainingError: The model has nothing to train.
        """
        if not self.train_examples:
            raise DataError(
                f"There are no examples to train the {self.side} on.", "Set dataset.train, or pass train_dataset."
            )
        require_trainable(self.model, self.what)
        mixed_precision(self.config.precision, self._device())

    def train(
        self,
        *,
        phase: str | None = None,
        checkpoints: Path | None = None,
        finish: bool = True,
        may_keep_untuned: bool = True,
    ) -> TrainResult:
        """Tune on the training examples; see `BaseTrainer.train`.

        Args:
            phase: As there.
            checkpoints: As there.
            finish: Whether the RAG system follows the trained weights; without it, what was encoded before stays, for
                a federation's client that gets other weights before anything is searched.
            may_keep_untuned: Whether the weights from before training count among those that `validation.keep_best`
                chooses from; not within a federation's round, whose server has to learn from every client.

        Raises:
            TrainingError: Training cannot work or did not work; the message names the cause.
            RunInterruptedError: A signal came; a checkpoint is saved where there is a folder for checkpoints.
        """
        self.require_ready()
        started = time.monotonic()
        name = phase or self.side
        if checkpoints is not None:
            return self._train_in(checkpoints, name, started, True, finish, may_keep_untuned)
        with tempfile.TemporaryDirectory(prefix="fedrag-") as directory:
            shared = self.processes.run_on_rank_0(lambda: Path(directory))
            return self._train_in(shared, name, started, False, finish, may_keep_untuned)

    def _train_in(
        self, directory: Path, phase: str, started: float, lasting: bool, finish: bool, may_keep_untuned: bool
    ) -> TrainResult:
        resuming = self.processes.run_on_rank_0(lambda: _newest_in(directory))
        start = PhaseStart(self.model, directory, writes=self.processes.is_rank_0)
        instances = self._prepare_once(self.cache_directory or (directory if lasting else None), resuming)
        if resuming is not None:
            self.reporter.note(f"{phase}: going on from {resuming.name}")
        with deferred_interrupts() as interrupt, self.reporter.task(phase, 1, "step") as advance:
            callback = ScheduleCallback(
                self.config,
                has_validation=bool(self.validation_examples),
                reporter=self.reporter,
                phase=phase,
                interrupt=interrupt,
                advance=advance,
                on_checkpoint=self._on_checkpoint,
                on_step=self._on_step,
                diagnostics=self.diagnostics.take,
                validate=self._validate_once if may_keep_untuned else None,
                processes=self.processes,
            )
            interrupt.ignores_repeats = self.processes.count > 1
            loop = self._loop(directory, instances, callback)
            try:
                with os_errors(directory):
                    loop.train(resume_from_checkpoint=str(resuming) if resuming else None)
            finally:
                # Mixed precision wraps the model's forward; what comes after training computes as before it.
                loop.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            if self.processes.any(interrupt.requested):
                start.keep()
                saved = "a checkpoint is saved" if lasting else "no folder for checkpoints was given"
                raise RunInterruptedError(f"Interrupted in {phase} after step {loop.state.global_step}; {saved}.")
        require_moved(start.fingerprint, tensors_fingerprint(trainable(self.model)), self.what, loop.state.log_history)
        if self.config.validation.keep_best and callback.validates:
            if not loop.load_best():
                start.restore(self.model)
            self._tell_kept(phase, loop)
        # A folder that does not last may go when all have read the best weights.
        self.processes.barrier()
        self.model.eval()
        require_finite(self.model, self.what)
        if modules := start.movement(self.model):
            self.reporter.event("moved", phase=phase, modules=modules)
        if finish:
            self._finish()
        return self._result(loop, time.monotonic() - started)

    def _loop(self, directory: Path, instances: Sequence[Any], callback: ScheduleCallback) -> TrainingLoop:
        report_to = tuple(self.rag_system.config.run.report_to) if self.rag_system.config else ()
        return TrainingLoop(
            model=self.model,
            args=training_arguments(
                self.config,
                directory=directory,
                seed=self.seed,
                device=self._device(),
                report_to=report_to,
                unused_parameters=self.has_unused_parameters,
            ),
            train_dataset=Instances(instances),
            data_collator=self._collate_share,
            validate=self._validate_once,
            on_batches=self._on_batches,
            loss_function=self._loss_function(),
            penalty=self._penalty if self.proximal_mu else None,
            lengths=self._lengths(instances),
            callbacks=[callback],
        )

    def _tell_kept(self, phase: str, loop: TrainingLoop) -> None:
        """Say which step's weights are kept, and why where they are those from before training."""
        metric, step, value = loop.args.metric_for_best_model, loop.state.best_global_step, loop.state.best_metric
        self.reporter.event("kept", phase=phase, step=step, metric=metric, value=value)
        if step == 0:
            tuned = [entry[f"eval_{metric}"] for entry in loop.state.log_history[1:] if f"eval_{metric}" in entry]
            best = max(tuned) if loop.args.greater_is_better else min(tuned)
            self.reporter.note(
                f"{phase}: kept the untuned {self.what}: on the validation data its {metric} is {value:.4f}, and at "
                f"best {best:.4f} after training"
            )

    def _prepare_once(self, cache_directory: Path | None, resuming: Path | None) -> Sequence[Any]:
        instances, prepared = self.processes.run_on_rank_0(
            lambda: (self._prepare(cache_directory, resuming), self._prepared())
        )
        if not self.processes.is_rank_0:
            self._take_over(prepared, resuming)
        return instances

    def _validate_once(self) -> dict[str, float]:
        if not self.processes.is_rank_0:
            self._on_validation()
        return self.processes.run_on_rank_0(self.validate)

    def _collate_share(self, instances: list[Any]) -> dict[str, Any]:
        own = self.processes.shard(instances)
        if own:
            return self._collate(list(own))
        # Gradients are averaged over all processes, so one without an instance takes part with one that has no loss.
        batch = self._collate(instances[:1])
        return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}

    def _result(self, loop: TrainingLoop, seconds: float) -> TrainResult:
        log = loop.state.log_history
        losses = [entry["loss"] for entry in log if "loss" in entry]
        validations = [entry for entry in log if any(name.startswith("eval_") for name in entry)]
        metrics: dict[str, Any] = self._counts()
        if validations:
            best = [entry for entry in validations if entry["step"] == loop.state.best_global_step]
            chosen = (best or validations)[-1] if self.config.validation.keep_best else validations[-1]
            metrics["validation"] = {k.removeprefix("eval_"): v for k, v in chosen.items() if k.startswith("eval_")}
            metrics["validation_step"] = chosen["step"]
            if chosen["step"] == 0:
                metrics["kept_untuned"] = True
        return TrainResult(sum(losses) / max(len(losses), 1), loop.state.global_step, metrics, seconds)

    def _penalty(self, model: nn.Module) -> Tensor:
        reference = {name: tensor.to(self._device()) for name, tensor in (self.reference_weights or {}).items()}
        return proximal_penalty(trainable(model).items(), reference, self.proximal_mu)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _config_of(self, rag_system: RAGSystem) -> TrainingConfig:
        default = self._default_config()
        if rag_system.config is None:
            return default
        found: TrainingConfig = getattr(rag_system.config.trainer, self.side)
        if not isinstance(found, type(default)):
            raise ConfigError(
                f"trainer.{self.side} has the type '{getattr(found, 'type', None)}', "
                f"which {type(self).__name__} does not run.",
                "Pass config=, or change trainer." + self.side + ".type.",
            )
        return found

    def _examples(self, dataset: Any, split: str) -> list[Example]:
        needs_responses = self.config.needs_responses
        if dataset is not None:
            return examples_from_dataset(dataset, needs_responses=needs_responses) if len(dataset) else []
        source = getattr(self.rag_system.config.dataset, split) if self.rag_system.config else None
        return load_examples(source, needs_responses=needs_responses) if source is not None else []

    def _keep_judged(self) -> int:
        """Keep the examples whose relevant passages are known, and return how many training examples were left out."""
        nodes, given = self.rag_system.knowledge_store.nodes, len(self.train_examples)
        self.train_examples = judged_examples(self.train_examples, nodes, "the training data")
        self.validation_examples = judged_examples(self.validation_examples, nodes, "the validation data")
        return given - len(self.train_examples)

    def _require_responses(self) -> None:
        for example in (*self.train_examples, *self.validation_examples):
            if not example.responses:
                raise DataError(
                    f"{example.name} has no response, which training needs.",
                    "Train on a source with answers, or by an objective without (contrastive).",
                )


def _newest_in(directory: Path) -> Path | None:
    """Make the folder of the checkpoints where it is missing, and return its newest one."""
    with os_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return latest_checkpoint(directory)
