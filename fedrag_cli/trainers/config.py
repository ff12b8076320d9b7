"""Config dataclasses of the trainers, and their registration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Interval

from fedrag_cli.config.fields import (
    GENERATOR_METRICS,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationMetricName,
    config_class,
)
from fedrag_cli.config.problems import Finding, KeyPath
from fedrag_cli.registry import Registry

if TYPE_CHECKING:
    from fedrag_cli.config.schema import Config

Every = PositiveInt | Literal["epoch", "never"]


@config_class
class ValidationConfig:
    """Validation while training; it needs `dataset.validation`."""

    every: Every = "epoch"
    """Validate every epoch, every so many steps, or never."""
    metric: ValidationMetricName | None = None
    """Metric that chooses the best checkpoint; loss by default."""
    keep_best: bool = True
    """End with the best weights rather than the last; those from before training are kept where none is better."""
    patience: PositiveInt | None = None
    """Stop after so many validations without a better metric."""


@config_class
class TrainingConfig:
    """What all trainers share."""

    # What an objective cannot do without.
    needs_generator: ClassVar[bool] = True
    needs_responses: ClassVar[bool] = True
    needs_relevant_ids: ClassVar[bool] = False

    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate."""
    epochs: PositiveFloat = 1.0
    """Passes over the training examples."""
    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps, whatever `epochs` says."""
    batch_size: PositiveInt = 16
    """Examples of a batch; several processes share it."""
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

    def check(self, config: Config, path: KeyPath) -> Iterator[Finding]:
        """Yield what has no effect, or what validation lacks; the last key of the path is the side that is tuned."""
        if self.warmup and self.scheduler == "constant":
            yield (*path, "warmup"), "has no effect with scheduler: constant; use constant_with_warmup"
        metric, patience = self.validation.metric, self.validation.patience
        if config.dataset.validation is None:
            for name, value in (("metric", metric), ("patience", patience)):
                if value is not None:
                    yield (*path, "validation", name), "needs a dataset.validation"
        if self.validation.every == "never" and patience is not None:
            yield (*path, "validation", "patience"), "needs validation.every: epoch or a number of steps"
        side = path[-1]
        if metric not in (None, "loss") and (metric in GENERATOR_METRICS) != (side == "generator"):
            known = ", ".join(GENERATOR_METRICS) if side == "generator" else "mrr, hit@K, recall@K, ndcg@K"
            message = f"'{metric}' does not measure the {side} (metrics: loss, {known})"
            yield (*path, "validation", "metric"), message


@config_class
class RetrieverTrainingConfig(TrainingConfig):
    """What all trainers of the retriever share."""

    train: Literal["query", "both"] = "query"
    """Tune the query encoder alone (the index stays valid), or queries and passages."""
    dropout: bool = False
    """Use the encoder's dropout while training; what is retrieved while training then jitters, and each new passage
    must be scored."""


@config_class
class LMSupervisedConfig(RetrieverTrainingConfig):
    """What the trainers share in which the language model teaches the retriever."""

    top_k: PositiveInt = 8
    """Passages retrieved for each training query."""
    retriever_temperature: PositiveFloat = 0.05
    """Temperature of the retriever's distribution over the passages."""
    refresh_every: PositiveInt | None = None
    """With train: both, re-encode all passages every so many steps; once an epoch by default."""

    def check(self, config: Config, path: KeyPath) -> Iterator[Finding]:
        """Yield also where there is no ranking to learn, or no index to refresh."""
        if self.top_k < 2:
            yield (*path, "top_k"), "must be at least 2: among one passage there is no ranking to learn"
        if self.train == "query" and self.refresh_every is not None:
            yield (*path, "refresh_every"), "has no effect with train: query, whose index never goes stale; remove it"
        objective, method = config.trainer.retriever.type, config.rag_system.fusion.method
        # A config without training examples is for commands that only search.
        if config.dataset.train is not None and config.rag_system.lexical is not None and method != "weighted":
            message = f"must be weighted where {objective} tunes the retriever: a ranking by {method} has no gradient"
            yield ("rag_system", "fusion", "method"), message
        yield from super().check(config, path)


@config_class
class LSRConfig(LMSupervisedConfig):
    """LM-supervised retrieval: the language model's likelihood of the answer teaches the retriever its ranking."""

    type: Literal["lsr"] = "lsr"
    """Names this trainer."""
    lm_temperature: PositiveFloat = 0.1
    """Temperature of the language model's distribution over the passages."""
    likelihood: Literal["mean", "sum"] = "mean"
    """Log-likelihood of the answer: mean over its tokens, or sum."""
    divergence: Literal["forward", "reverse"] = "forward"
    """forward is KL(LM || retriever), reverse is KL(retriever || LM)."""


@config_class
class PDistConfig(LMSupervisedConfig):
    """Perplexity distillation (Atlas): KL(LM || retriever) with the mean log-likelihood of the answer's tokens."""

    type: Literal["pdist"] = "pdist"
    """Names this trainer."""
    lm_temperature: PositiveFloat = 0.01
    """Temperature of the language model's distribution over the passages; 0.01 is Atlas's own."""


@config_class
class EMDR2Config(LMSupervisedConfig):
    """EMDR2: the retriever learns to make the answer likely, summed over the passages."""

    type: Literal["emdr2"] = "emdr2"
    """Names this trainer."""
    likelihood: Literal["mean", "sum"] = "sum"
    """Log-likelihood of the answer: sum over its tokens, as the marginal likelihood has it, or mean."""


@config_class
class LOOPConfig(LMSupervisedConfig):
    """Leave one out (Atlas): a passage is worth what the answer loses without it.

    Each of the top_k scores of a query needs a prompt of top_k - 1 passages, so the language model reads
    top_k * (top_k - 1) passages a query, where LSR's reads top_k.
    """

    type: Literal["loop"] = "loop"
    """Names this trainer."""
    top_k: PositiveInt = 4
    """Passages retrieved for each training query, at least 2; the cost of scoring grows with its square."""
    lm_temperature: PositiveFloat = 0.01
    """Temperature of the language model's distribution over the passages; 0.01 is Atlas's own."""
    likelihood: Literal["mean", "sum"] = "mean"
    """Log-likelihood of the answer: mean over its tokens, or sum."""


@config_class
class ContrastiveConfig(RetrieverTrainingConfig):
    """Multiple negatives ranking: a query's relevant passage against those of the other queries and mined ones.

    It needs examples with relevant ids, and neither answers nor a generator.
    """

    needs_generator: ClassVar[bool] = False
    needs_responses: ClassVar[bool] = False
    needs_relevant_ids: ClassVar[bool] = True

    type: Literal["contrastive"] = "contrastive"
    """Names this trainer."""
    scale: PositiveFloat = 20.0
    """Factor of the similarities before the softmax; the inverse of a temperature."""
    hard_negatives: NonNegativeInt = 1
    """Mined for each query: the best passages that the untuned retriever finds and that are not relevant."""
    dropout: bool = False
    """Use the encoder's dropout while training."""

    def check(self, config: Config, path: KeyPath) -> Iterator[Finding]:
        """Yield also where an example has no negative."""
        if self.batch_size * self.gradient_accumulation_steps == 1 and not self.hard_negatives:
            message = "must be at least 1 where a step has one example: it has no other negative"
            yield (*path, "hard_negatives"), message
        yield from super().check(config, path)


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
class GeneratorTrainingConfig(TrainingConfig):
    """What all trainers of the generator share."""

    lora: LoRAConfig | None = LoRAConfig()
    """Tune low-rank adapters; null tunes all weights."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate."""
    batch_size: PositiveInt = 8
    """Instances of a batch; several processes share it."""
    group_by_length: bool = True
    """Put instances of similar length into the same step, which saves padding; the order of the steps stays random and
    follows from the seed."""


@config_class
class RALTConfig(GeneratorTrainingConfig):
    """Retrieval-augmented tuning: the generator learns to answer from the retrieved passages."""

    type: Literal["ralt"] = "ralt"
    """Names this trainer."""
    top_k: PositiveInt = 3
    """Passages retrieved for each training example."""
    passages: Literal["separate", "together"] = "separate"
    """separate makes one instance a passage (as in RA-DIT), together puts all in one prompt (as at inference)."""
    passage_weights: Literal["uniform", "retriever"] = "uniform"
    """With passages: separate, count all instances alike, or each by its probability under the retriever times top_k,
    so that the mean weight is 1."""
    retriever_temperature: PositiveFloat = 0.05
    """Temperature of the retriever's distribution with passage_weights: retriever."""

    def check(self, config: Config, path: KeyPath) -> Iterator[Finding]:
        """Yield also what does not go together with passage_weights."""
        if self.passage_weights == "uniform":
            if self.retriever_temperature != type(self).retriever_temperature:
                yield (*path, "retriever_temperature"), "has no effect with passage_weights: uniform; remove it"
        elif self.passages == "together":
            message = "retriever needs passages: separate; together makes one instance of them all"
            yield (*path, "passage_weights"), message
        elif self.top_k < 2:
            message = "retriever needs a top_k of at least 2; one passage always has the weight 1"
            yield (*path, "passage_weights"), message
        yield from super().check(config, path)


@config_class
class RAFTConfig(GeneratorTrainingConfig):
    """RAFT: the generator learns to answer among distractors, and now and then from distractors alone.

    It needs examples with relevant ids.
    """

    needs_relevant_ids: ClassVar[bool] = True

    type: Literal["raft"] = "raft"
    """Names this trainer."""
    top_k: PositiveInt = 5
    """Passages of a prompt: the relevant ones, where they are in it, and distractors; the paper has one and four."""
    gold_share: Fraction = 0.8
    """Probability that an example's prompt has its relevant passages; the others have distractors only."""


def register(registry: Registry) -> None:
    """Register the trainers."""
    components: tuple[tuple[str, str, type, str, str], ...] = (
        ("retriever", "lsr", LSRConfig, "HuggingFaceTrainerForLSR", "LM-supervised retrieval (REPLUG, RA-DIT)"),
        ("retriever", "pdist", PDistConfig, "HuggingFaceTrainerForPDist", "perplexity distillation (Atlas)"),
        ("retriever", "emdr2", EMDR2Config, "HuggingFaceTrainerForEMDR2", "the answer's likelihood over all passages"),
        ("retriever", "loop", LOOPConfig, "HuggingFaceTrainerForLOOP", "leaving one passage out (Atlas)"),
        (
            "retriever",
            "contrastive",
            ContrastiveConfig,
            "HuggingFaceTrainerForContrastive",
            "relevant passages against in-batch and mined negatives; needs no generator",
        ),
        (
            "generator",
            "ralt",
            RALTConfig,
            "HuggingFaceTrainerForRALT",
            "retrieval-augmented tuning of the generator (RA-DIT)",
        ),
        ("generator", "raft", RAFTConfig, "HuggingFaceTrainerForRAFT", "tuning of the generator among distractors"),
    )
    for side, name, settings, trainer, help in components:
        builder = f"fedrag_cli.trainers.huggingface:{trainer}.from_config"
        registry.register(f"{side}_trainer", name, settings, builder, help)
