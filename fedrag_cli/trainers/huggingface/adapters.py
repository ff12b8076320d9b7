"""LoRA adapters (peft)."""

from __future__ import annotations

import difflib
import re
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
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
        ConfigError: The model has no layer of one of the wanted names, or its adapter has another shape.
    """
    if isinstance(model, PeftModel):
        _require_same_shape(model.peft_config[model.active_adapter], config)
        return _with_sorted_targets(model)
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    if not isinstance(targets, str):
        _require_layers(model, targets)
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
            return _with_sorted_targets(get_peft_model(model, settings))
        except (ValueError, re.error) as error:
            raise ConfigError(
                f"trainer.generator.lora.target_modules does not fit the model: {error}",
                "Use all-linear, or name layers of this model.",
            ) from error


def _require_layers(model: Any, targets: list[str]) -> None:
    """Raise ConfigError where a name is that of no layer; peft drops it in silence as long as others fit."""
    names = [name for name, _ in model.named_modules() if name]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if not unknown and targets:
        return
    layers = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _takes_adapter(module)})
    near = {name: difflib.get_close_matches(name.rpartition(".")[2], layers, n=2, cutoff=0.5) for name in unknown}
    listed = ", ".join(
        f"'{name}'" + (f" (did you mean {' or '.join(map(repr, close))}?)" if close else "")
        for name, close in near.items()
    )
    raise ConfigError(
        f"trainer.generator.lora.target_modules names no layer of the model: {listed or 'it is empty'}.",
        f"Use all-linear by itself, or name layers of this model: {', '.join(layers)}.",
    )


def _takes_adapter(module: Any) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding | Conv1D)


def _with_sorted_targets(model: PeftModel) -> PeftModel:
    """Keep the names of the layers in an order of their own; peft has a set, which each process writes otherwise."""
    for settings in model.peft_config.values():
        for field in ("target_modules", "exclude_modules"):
            if isinstance(getattr(settings, field, None), set):
                setattr(settings, field, sorted(getattr(settings, field)))
    return model


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
