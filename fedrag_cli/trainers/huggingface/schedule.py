"""When to validate, when to save, when to stop: a callback of transformers.Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from fedrag_cli.errors import TrainingError
from fedrag_cli.runs.checkpoints import PREFIX, mark_complete
from fedrag_cli.runs.interrupt import InterruptGuard
from fedrag_cli.runs.processes import Processes
from fedrag_cli.runs.reporting import Advance, Reporter
from fedrag_cli.trainers.config import Every, TrainingConfig


class ScheduleCallback(TrainerCallback):
    """Schedules validation, checkpoints, early stopping and interruption, and records what happens.

    Args:
        config: The trainer's settings.
        has_validation: Whether there is something to validate on.
        reporter: Takes the events.
        phase: Name of the phase in the events.
        guard: Tells whether the user wants to stop.
        advance: Takes the steps done.
        on_checkpoint: Called with each checkpoint's folder before it is marked complete.
        on_step: Called with the number of each step that was done, and whether it was the last one.
        diagnostics: Returns further values of the step that was done.
        processes: Those that train; they agree on stopping, and the main one completes the checkpoints.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        has_validation: bool,
        reporter: Reporter,
        phase: str,
        guard: InterruptGuard,
        advance: Advance,
        on_checkpoint: Callable[[Path], None],
        on_step: Callable[[int, bool], None],
        diagnostics: Callable[[], dict[str, float]],
        processes: Processes,
    ) -> None:
        """Keep what the callback needs."""
        self.config = config
        self.validates = has_validation and config.validation.every != "never"
        self.reporter = reporter
        self.phase = phase
        self.guard = guard
        self.advance = advance
        self.on_checkpoint = on_checkpoint
        self.on_step = on_step
        self.diagnostics = diagnostics
        self.processes = processes
        self._interrupted = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell how many steps there are and how many a resumed run has done."""
        self.advance.total(state.max_steps)
        self.advance(state.global_step)

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
        self._interrupted = self.processes.any(self.guard.requested)
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
        values = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
        self.reporter.event("validation", phase=self.phase, step=state.global_step, metrics=values)
        if self._is_out_of_patience(args, state):
            patience = self.config.validation.patience
            self.reporter.note(
                f"{self.phase}: no better {args.metric_for_best_model} for {patience} validations, stopping"
            )
            control.should_training_stop = True

    def _is_out_of_patience(self, args: TrainingArguments, state: TrainerState) -> bool:
        patience = self.config.validation.patience
        return self.validates and patience is not None and validations_without_gain(state, args) >= patience

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Complete a checkpoint with what is ours, and mark it whole."""
        # Each process has written the state of its random numbers.
        self.processes.meet()
        if not self.processes.is_main:
            return
        directory = Path(args.output_dir) / f"{PREFIX}{state.global_step}"
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
