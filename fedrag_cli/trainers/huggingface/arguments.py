"""From our settings to the arguments of transformers.Trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from fedrag_cli.config.metrics import LOWER_IS_BETTER
from fedrag_cli.errors import ModelError, TrainingError
from fedrag_cli.rag.models import has_fast_bfloat16, require_bfloat16
from fedrag_cli.runs.launch import process_count
from fedrag_cli.trainers.config import TrainingConfig


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

    Validation and checkpoints are scheduled by `schedule.py`; the arguments only allow them.

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
