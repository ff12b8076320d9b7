"""The training loop: transformers.Trainer with our order of instances, validation, schedule, and proximal term."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from fedrag_cli.errors import ModelError, TrainingError
from fedrag_cli.runs.files import CHECKPOINT_MARKER, CHECKPOINT_PREFIX, mark_complete
from fedrag_cli.runs.interrupt import InterruptFlag
from fedrag_cli.runs.processes import Processes
from fedrag_cli.runs.reporter import Advance, Reporter
from fedrag_cli.trainers.config import Every, TrainingConfig

FEWEST_STEPS, MOST_STEPS = 4, 50
"""Optimizer steps whose instances are sorted together; transformers' `group_by_length` has the same upper bound."""


class LengthGroupedOrder(Sampler[int]):
    """Positions of instances, grouped by length, in an order that follows from the seed and the epoch alone.

    Instances are shuffled, those of several steps are sorted by length together and cut into steps, and the steps are
    shuffled. `transformers.trainer_pt_utils.LengthGroupedSampler` draws from torch's global state instead and leaves
    the steps sorted, so that an epoch goes from long to short.

    Args:
        lengths: Tokens of each instance.
        group_size: Instances of an optimizer step.
        seed: Seed of the order.
    """

    def __init__(self, lengths: Sequence[int], group_size: int, seed: int) -> None:
        """Start at the first epoch."""
        self._lengths = lengths
        self._group_size = group_size
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; accelerate calls this by its name."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield every position once, those of a step behind each other."""
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        shuffled = torch.randperm(len(self._lengths), generator=generator).tolist()
        # Four portions where there is enough, so that lengths alone do not settle which instances meet in a step.
        steps = max(FEWEST_STEPS, min(MOST_STEPS, len(shuffled) // (4 * self._group_size)))
        portion = steps * self._group_size
        groups = [
            group
            for start in range(0, len(shuffled), portion)
            for group in self._cut(sorted(shuffled[start : start + portion], key=self._lengths.__getitem__))
        ]
        # A smaller group among the others would shift the borders of the steps.
        whole = [group for group in groups if len(group) == self._group_size]
        rest = [group for group in groups if len(group) < self._group_size]
        for number in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[number]
        for group in rest:
            yield from group

    def _cut(self, portion: list[int]) -> list[list[int]]:
        return [portion[start : start + self._group_size] for start in range(0, len(portion), self._group_size)]


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
        directory = Path(self.args.output_dir) / f"{CHECKPOINT_PREFIX}{self.state.global_step}"
        (directory / CHECKPOINT_MARKER).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def load_best(self) -> bool:
        """Bring the best checkpoint's weights back, where another step than the last was the best.

        Returns:
            Whether they are in the model now; of step 0, the weights from before training, there is no checkpoint.
        """
        best = self.state.best_global_step
        if best is None or best == self.state.global_step:
            return True
        if best == 0:
            return False
        # The path in the trainer's state is that of the day it was saved; the run directory may have moved since.
        directory = Path(self.args.output_dir) / f"{CHECKPOINT_PREFIX}{best}"
        if not directory.is_dir():
            raise ModelError(
                f"The best checkpoint '{directory}' is missing, so its weights cannot be brought back.",
                "Put the folder back, or set validation.keep_best: false in the run's config.yaml.",
            )
        self.state.best_model_checkpoint = str(directory)
        self._load_best_model()
        return True


class ScheduleCallback(TrainerCallback):
    """Schedules validation, checkpoints, early stopping and interruption, and records what happens.

    Args:
        config: The trainer's settings.
        has_validation: Whether there is something to validate on.
        reporter: Takes the events.
        phase: Name of the phase in the events.
        interrupt: Tells whether the user wants to stop.
        advance: Takes the steps done.
        on_checkpoint: Called with each checkpoint's folder before it is marked complete.
        on_step: Called with the number of each step that was done, and whether it was the last one.
        diagnostics: Returns further values of the step that was done.
        validate: Returns the validation metrics of the weights as they are before the first step; None where these
            weights are no candidate for the best ones.
        processes: Those that train; they agree on stopping, and the main one completes the checkpoints.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        has_validation: bool,
        reporter: Reporter,
        phase: str,
        interrupt: InterruptFlag,
        advance: Advance,
        on_checkpoint: Callable[[Path], None],
        on_step: Callable[[int, bool], None],
        diagnostics: Callable[[], dict[str, float]],
        validate: Validate | None,
        processes: Processes,
    ) -> None:
        """Keep what the callback needs."""
        self.config = config
        self.validates = has_validation and config.validation.every != "never"
        self.reporter = reporter
        self.phase = phase
        self.interrupt = interrupt
        self.advance = advance
        self.on_checkpoint = on_checkpoint
        self.on_step = on_step
        self.diagnostics = diagnostics
        self.validate = validate if self.validates and config.validation.keep_best else None
        self.processes = processes
        self._interrupted = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell how many steps there are and how many a resumed run has done, and measure what there is before."""
        self.advance.total(state.max_steps)
        self.advance(state.global_step)
        if state.global_step == 0 and self.validate is not None:
            with torch.random.fork_rng():
                metrics = {f"eval_{name}": value for name, value in self.validate().items()}
            state.log_history.append({**metrics, "step": 0, "epoch": 0.0})
            # Later weights must be better than these, not as good.
            state.best_metric, state.best_global_step = metrics[f"eval_{args.metric_for_best_model}"], 0
            self._record_validation(metrics, 0)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop where the checkpoint that a run was resumed from was its last one."""
        if state.global_step >= state.max_steps or self._is_out_of_patience(args, state):
            control.should_training_stop = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Schedule what is due after a step."""
        self.advance(1)
        last = state.global_step >= state.max_steps
        self.on_step(state.global_step, last)
        validation, checkpoint = self.config.validation.every, self.config.save_every
        self._schedule(control, _due(validation, state), _due(checkpoint, state))
        if last and isinstance(validation, int):
            self._schedule(control, True, True)
        self._interrupted = self.processes.any(self.interrupt.requested)
        if self._interrupted:
            control.should_save = control.should_training_stop = True
        if validation == "epoch" and self.validates and (last or state.epoch == int(state.epoch)):
            # A checkpoint must hold its epoch's validation, or a run resumed from it would miss it.
            control.should_save = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Schedule what is due after an epoch, which max_steps or an interruption may end early."""
        ended = state.global_step >= state.max_steps or state.epoch == int(state.epoch)
        if ended:
            due = self.config.save_every == "epoch" or self._interrupted or _due(self.config.save_every, state)
            self._schedule(
                control, self.config.validation.every == "epoch", due or state.global_step >= state.max_steps
            )

    def _schedule(self, control: TrainerControl, validation: bool, checkpoint: bool) -> None:
        if validation and self.validates:
            control.should_evaluate = True
            # The best weights can only be brought back from a checkpoint.
            control.should_save = control.should_save or self.config.validation.keep_best
        if checkpoint:
            control.should_save = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        """Record the loss, and stop where it is not finite."""
        if "loss" not in logs:
            return
        fields = {name: logs[name] for name in ("loss", "grad_norm", "learning_rate", "epoch") if name in logs}
        # Taken at every step, so that a record never holds those of the steps that `log_every` left out.
        values = self.diagnostics()
        if state.global_step % self.config.log_every == 0 or state.global_step >= state.max_steps:
            self.reporter.event("train_step", phase=self.phase, step=state.global_step, **fields, **values)
        # Under float16 an infinite gradient norm is how the loss scale is found; the step is skipped.
        checked = [fields["loss"]] if args.fp16 else [fields["loss"], fields.get("grad_norm", 0.0)]
        if not all(math.isfinite(value) for value in checked):
            raise TrainingError(
                f"The training loss is not finite at step {state.global_step} of {self.phase} "
                f"(loss {fields['loss']}, gradient norm {fields.get('grad_norm')}).",
                "Lower learning_rate, set precision: float32, or look for broken weights in the base model.",
            )

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, float], **_: Any
    ) -> None:
        """Record the validation and stop where patience is at its end."""
        self._record_validation(metrics, state.global_step)
        if self._is_out_of_patience(args, state):
            patience = self.config.validation.patience
            self.reporter.note(
                f"{self.phase}: no better {args.metric_for_best_model} for {patience} validations, stopping"
            )
            control.should_training_stop = True

    def _record_validation(self, metrics: dict[str, float], step: int) -> None:
        values = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
        self.reporter.event("validation", phase=self.phase, step=step, metrics=values)

    def _is_out_of_patience(self, args: TrainingArguments, state: TrainerState) -> bool:
        patience = self.config.validation.patience
        return self.validates and patience is not None and validations_without_gain(state, args) >= patience

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Complete a checkpoint with what is ours, and mark it whole."""
        # Each process has written the state of its random numbers.
        self.processes.barrier()
        if not self.processes.is_rank_0:
            return
        directory = Path(args.output_dir) / f"{CHECKPOINT_PREFIX}{state.global_step}"
        self.on_checkpoint(directory)
        mark_complete(directory)
        # Older checkpoints go only when the new one is whole.
        rotate_checkpoints(args.output_dir, self.config.keep_checkpoints, state.best_model_checkpoint)


def validations_without_gain(state: TrainerState, args: TrainingArguments) -> int:
    """Count the validations since the best one, the current included, from the log alone (so it survives a resume)."""
    name = f"eval_{args.metric_for_best_model}"
    values = [entry[name] for entry in state.log_history if name in entry]
    if not values:
        return 0
    best = max(values) if args.greater_is_better else min(values)
    return len(values) - 1 - values.index(best)


def _due(every: Every, state: TrainerState) -> bool:
    return isinstance(every, int) and state.global_step % every == 0
