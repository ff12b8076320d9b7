"""LoRA adapters (peft)."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.pytorch_utils import Conv1D

from fedrag_cli.errors import ConfigError
from fedrag_cli.trainers.config import LoRAConfig


def add_adapter(model: Any, config: LoRAConfig, seed: int) -> PeftModel:
    """Put a fresh LoRA adapter on a model; a model that has one already keeps it and goes on training it.

    Args:
        model: A `PreTrainedModel`, or a `PeftModel`.
        config: Rank, scaling, dropout and target layers.
        seed: Seed of the initialisation.

    Raises:
        ConfigError: No layer of the model has one of the wanted names, or the model's adapter has another shape.
    """
    if isinstance(model, PeftModel):
        _require_same_shape(model.peft_config[model.active_adapter], config)
        return model
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    settings = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        # GPT-2 keeps its weights transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, settings)
        except ValueError as error:
            raise ConfigError(
                f"trainer.generator.lora.target_modules does not fit the model: {error}",
                "Use all-linear, or name layers of this model.",
            ) from error


def _require_same_shape(present: LoraConfig, config: LoRAConfig) -> None:
    hint = "Make them equal, or start from the model without adapter."
    there = (present.r, float(present.lora_alpha), present.lora_dropout)
    if there != (config.r, float(config.alpha), config.dropout):
        raise ConfigError(
            f"The model has an adapter with r {present.r}, alpha {present.lora_alpha} and dropout "
            f"{present.lora_dropout} already, but trainer.generator.lora asks for r {config.r}, alpha {config.alpha} "
            f"and dropout {config.dropout}.",
            hint,
        )
    # `all-linear` was expanded to names when the adapter was made, so it cannot be compared any more.
    if not isinstance(config.target_modules, str) and set(config.target_modules) != set(present.target_modules or ()):
        raise ConfigError(
            f"The model has an adapter on {', '.join(sorted(present.target_modules or ()))} already, "
            f"but trainer.generator.lora.target_modules asks for {', '.join(config.target_modules)}.",
            hint,
        )
