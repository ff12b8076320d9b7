"""Config dataclasses of the trainers, and their registration."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

from fedrag_cli.config.fields import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationMetricName,
    config_class,
)
from fedrag_cli.registry import Registry

Every = PositiveInt | Literal["epoch", "never"]


@config_class
class ValidationConfig:
    """Validation while training; it needs `dataset.validation`."""

    every: Every = "epoch"
    """Validate every epoch, every so many steps, or never."""
    metric: ValidationMetricName | None = None
    """Metric that chooses the best checkpoint; loss by default."""
    keep_best: bool = True
    """End with the best checkpoint's weights rather than the last."""
    patience: PositiveInt | None = None
    """Stop after so many validations without a better metric."""


@config_class
class TrainingConfig:
    """What all trainers share."""

    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate."""
    epochs: PositiveFloat = 1.0
    """Passes over the training examples."""
    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps, whatever `epochs` says."""
    batch_size: PositiveInt = 16
    """Examples of a batch on one device."""
    gradient_accumulation_steps: PositiveInt = 1
    """Batches that make one optimizer step."""
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"] = "adamw_torch"
    """Optimizer, by its name in transformers."""
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Course of the learning rate."""
    warmup: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Share of the steps over which the learning rate rises."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this norm; 0 leaves them."""
    precision: Literal["auto", "fast", "float32", "bfloat16", "float16"] = "auto"
    """Mixed precision; auto takes bfloat16 on cuda where it is supported, and float32 elsewhere; fast takes it also on
    processors that have it in hardware."""
    gradient_checkpointing: bool = False
    """Compute activations twice to save memory."""
    save_every: Every = "epoch"
    """Write a checkpoint every epoch, every so many steps, or never but at the end."""
    keep_checkpoints: PositiveInt = 2
    """How many checkpoints are kept; the newest and the best always are."""
    log_every: PositiveInt = 1
    """Steps between two records of the loss."""
    validation: ValidationConfig = ValidationConfig()
    """Validation while training."""


@config_class
class LSRConfig(TrainingConfig):
    """LM-supervised retrieval: the language model's likelihood of the answer teaches the retriever its ranking."""

    type: Literal["lsr"] = "lsr"
    """Names this trainer."""
    train: Literal["query", "both"] = "query"
    """Tune the query encoder alone (the index stays valid), or queries and passages."""
    top_k: PositiveInt = 8
    """Passages retrieved for each training query."""
    retriever_temperature: PositiveFloat = 0.05
    """Temperature of the retriever's distribution over the passages."""
    lm_temperature: PositiveFloat = 0.1
    """Temperature of the language model's distribution over the passages."""
    likelihood: Literal["mean", "sum"] = "mean"
    """Log-likelihood of the answer: mean over its tokens, or sum."""
    divergence: Literal["forward", "reverse"] = "forward"
    """forward is KL(LM || retriever), reverse is KL(retriever || LM)."""
    dropout: bool = False
    """Use the encoder's dropout while training; the retrieved passages then jitter, and each new one must be scored."""
    refresh_every: PositiveInt | None = None
    """With train: both, re-encode all passages every so many steps; once an epoch by default."""


@config_class
class LoRAConfig:
    """Low-rank adapters (peft)."""

    r: PositiveInt = 16
    """Rank."""
    alpha: PositiveFloat = 32.0
    """Scaling; the update is multiplied by alpha / r."""
    dropout: Fraction = 0.0
    """Dropout before the adapter."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the layers that get an adapter; all-linear takes every linear layer but the output head."""


@config_class
class RALTConfig(TrainingConfig):
    """Retrieval-augmented tuning: the generator learns to answer from the retrieved passages."""

    type: Literal["ralt"] = "ralt"
    """Names this trainer."""
    top_k: PositiveInt = 3
    """Passages retrieved for each training example."""
    passages: Literal["separate", "together"] = "separate"
    """separate makes one instance a passage (as in RA-DIT), together puts all in one prompt (as at inference)."""
    lora: LoRAConfig | None = LoRAConfig()
    """Tune low-rank adapters; null tunes all weights."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate."""
    batch_size: PositiveInt = 8
    """Instances of a batch on one device."""


def register(registry: Registry) -> None:
    """Register the trainers."""
    registry.register(
        "retriever_trainer",
        "lsr",
        LSRConfig,
        "fedrag_cli.trainers.huggingface.lsr:HuggingFaceTrainerForLSR.from_config",
        "LM-supervised retrieval (REPLUG, RA-DIT)",
    )
    registry.register(
        "generator_trainer",
        "ralt",
        RALTConfig,
        "fedrag_cli.trainers.huggingface.ralt:HuggingFaceTrainerForRALT.from_config",
        "retrieval-augmented tuning of the generator (RA-DIT)",
    )
