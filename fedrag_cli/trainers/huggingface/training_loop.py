"""The training loop: transformers.Trainer with our validation, weights of instances, and an optional proximal term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerControl
from transformers.trainer_callback import PrinterCallback

from fedrag_cli.errors import ModelError
from fedrag_cli.runs.checkpoints import MARKER, PREFIX
from fedrag_cli.trainers.huggingface.sampling import LengthGroupedOrder

Validate = Callable[[], dict[str, float]]
Penalty = Callable[[nn.Module], Tensor]
Batches = list[dict[str, Any]]
LossFunction = Callable[[Any, Tensor, Tensor | int | None, Tensor | None], Tensor]
"""Outputs, labels, items of the optimizer step and weights of the instances (or None) to the loss."""
IGNORED = -100
"""The label of what has no loss, in torch and transformers."""


class Instances(Dataset[Any]):
    """A sequence of training instances as torch wants it.

    Args:
        instances: The instances.
    """

    def __init__(self, instances: Sequence[Any]) -> None:
        """Keep them."""
        self._instances = instances

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._instances)

    def __getitem__(self, position: int) -> Any:
        """Return one of them."""
        return self._instances[position]


class TrainingLoop(Trainer):
    """`transformers.Trainer` whose validation is ours and whose loss may get a penalty.

    Args:
        validate: Computes the validation metrics of the model as it is.
        loss_function: Computes the loss, where the model does not; it gets what a batch has as `weights`.
        on_batches: Called with all batches of an optimizer step before the first of them is computed.
        penalty: Added to what is minimised in each optimizer step, such as FedProx's proximal term; the loss that is
            logged and recorded is without it.
        lengths: Tokens of each training instance, where instances of similar length go into the same step.
        options: Arguments of `transformers.Trainer`.
    """

    def __init__(
        self,
        *,
        validate: Validate,
        on_batches: Callable[[Batches], None],
        loss_function: LossFunction | None = None,
        penalty: Penalty | None = None,
        lengths: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        """Set the loop up."""
        super().__init__(compute_loss_func=self._weighted_loss if loss_function is not None else None, **options)
        self.remove_callback(PrinterCallback)
        self.control: TrainerControl
        self._validate = validate
        self._on_batches = on_batches
        self._loss_function = loss_function
        self._weights: Tensor | None = None
        self._own_loss: Tensor | None = None
        self._penalty = penalty
        self._lengths = lengths

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Group by length where lengths are given; otherwise let transformers draw a random order."""
        if self._lengths is None:
            return super()._get_train_sampler(train_dataset)
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedOrder(self._lengths, per_step, self.args.seed)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[Batches, Any]:
        """Let our code see all batches of one optimizer step together."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._on_batches(batches)
        return batches, items

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Let every process see all batches, as one process would: the collator takes the process's share of each."""
        loader = super()._get_dataloader(*args, **kwargs)
        shard = loader.batch_sampler
        if isinstance(shard, BatchSamplerShard):
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Run our validation, and log it the way transformers does."""
        with torch.random.fork_rng():
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in self._validate().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Keep the weights from the model, and add the penalty, spread over the batches of one optimizer step."""
        self._weights = inputs.pop("weights", None)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._penalty is None:
            return result
        self._own_loss = (result[0] if return_outputs else result).detach()
        penalty = self._penalty(self.accelerator.unwrap_model(model)) / self.current_gradient_accumulation_steps
        return (result[0] + penalty, result[1]) if return_outputs else result + penalty

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Minimise the sum of loss and penalty, and return the loss, which is what transformers logs."""
        minimised: Tensor = super().training_step(*args, **kwargs)
        return minimised if self._own_loss is None else self._own_loss

    def _weighted_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Call our loss function; transformers has no place for the weights in its own call."""
        assert self._loss_function is not None
        return self._loss_function(outputs, labels, num_items_in_batch, self._weights)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch, unless the run was resumed from its last checkpoint: transformers would do a step more."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Take the mark of completeness away before a checkpoint is written over."""
        directory = Path(self.args.output_dir) / f"{PREFIX}{self.state.global_step}"
        (directory / MARKER).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def load_best(self) -> bool:
        """Bring the best checkpoint's weights back, where another step than the last was the best."""
        best = self.state.best_global_step
        if not best or best == self.state.global_step:
            return False
        # The path in the trainer's state is that of the day it was saved; the run directory may have moved since.
        directory = Path(self.args.output_dir) / f"{PREFIX}{best}"
        if not directory.is_dir():
            raise ModelError(
                f"The best checkpoint '{directory}' is missing, so its weights cannot be brought back.",
                "Put the folder back, or set validation.keep_best: false in the run's config.yaml.",
            )
        self.state.best_model_checkpoint = str(directory)
        self._load_best_model()
        return True
