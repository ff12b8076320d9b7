"""The config's dataclasses that belong to no single component.

Components (retrievers, stores, trainers, data sources) bring their own dataclasses; see `registry.py`.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from fedrag_cli.config.fields import (
    ComponentSlot,
    Fraction,
    MetricName,
    NonEmptyStr,
    NonNegativeInt,
    OutputPathStr,
    PassageTemplate,
    PositiveInt,
    PromptTemplate,
    config_class,
    default_component,
)

DEFAULT_PROMPT = (
    "Answer the question with a few words from the context.\n\nContext:\n{context}\n\nQuestion: {query}\nAnswer:"
)


@config_class
class RunConfig:
    """How a run is named, where it is kept, and what it runs on."""

    name: NonEmptyStr = "run"
    """Name of the run; its directory is <output_dir>/<name>/<UTC time>-<short id>."""
    output_dir: OutputPathStr = "runs"
    """Folder that holds the run directories."""
    seed: NonNegativeInt = 42
    """Seed of all randomness: data order, LoRA initialisation, dropout, bootstrap."""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:N; auto takes cuda, then mps, then cpu."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "trackio"], ...] = ()
    """Experiment trackers that also get the training curves; their packages must be installed."""


@config_class
class PromptConfig:
    """How passages and the query become the generator's prompt."""

    template: PromptTemplate = DEFAULT_PROMPT
    """The prompt, with {context} and {query}; the user's turn where a chat template is used."""
    passage_template: PassageTemplate = "{text}"
    """One passage in the context, with {text} and any metadata field of the corpus, such as {title}."""
    separator: str = "\n"
    """What stands between two passages."""
    system: str | None = None
    """System message, for chat templates."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """auto uses the tokenizer's chat template where it has one."""


@config_class
class RAGSystemConfig:
    """Retriever, generator, knowledge store and prompt."""

    retriever: Annotated[Any, ComponentSlot("retriever", default="sentence_transformer")]
    """Encodes queries and passages."""
    generator: Annotated[Any, ComponentSlot("generator", default="causal_lm")] | None = None
    """Answers from the retrieved passages; needed by all commands but `index` and retrieval-only evaluation."""
    knowledge_store: Annotated[Any, ComponentSlot("knowledge_store", default="memory")] = default_component(
        "knowledge_store", "memory"
    )
    """Holds the passages and their embeddings; an in-memory exact store where nothing is said."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """How the prompt is written."""
    top_k: PositiveInt = 3
    """Passages that are retrieved for a prompt."""


@config_class
class DatasetConfig:
    """The passages and the question-answer examples."""

    corpus: Annotated[Any, ComponentSlot("corpus", default="file")]
    """The passages of the knowledge store."""
    train: Annotated[Any, ComponentSlot("examples", default="file")] | None = None
    """Examples to train on."""
    validation: Annotated[Any, ComponentSlot("examples", default="file")] | None = None
    """Examples for early stopping and the choice of the best checkpoint."""
    test: Annotated[Any, ComponentSlot("examples", default="file")] | None = None
    """Examples for the evaluation before and after training."""


@config_class
class TrainerConfig:
    """What is tuned, and how."""

    mode: Literal["retriever", "generator", "alternating"] = "retriever"
    """Tune the retriever, the generator, or both in turn."""
    retriever: Annotated[Any, ComponentSlot("retriever_trainer", default="lsr")] = default_component(
        "retriever_trainer", "lsr"
    )
    """The retriever's trainer; LSR with its defaults where nothing is said."""
    generator: Annotated[Any, ComponentSlot("generator_trainer", default="ralt")] = default_component(
        "generator_trainer", "ralt"
    )
    """The generator's trainer; RALT with its defaults where nothing is said."""
    cycles: PositiveInt = 1
    """In alternating mode: how often retriever and generator are tuned in turn."""


@config_class
class EvaluationConfig:
    """What `train` measures before and after, and what `evaluate` measures."""

    split: Literal["auto", "validation", "test"] = "auto"
    """The split to evaluate on; auto takes test, and validation where there is no test."""
    metrics: tuple[MetricName, ...] | None = None
    """Metrics to compute; by default those of the side that is tuned."""
    depth: PositiveInt = 100
    """Length of the rankings that mrr is computed on."""
    limit: PositiveInt | None = None
    """Evaluate on the first so many examples only."""
    confidence: Fraction = 0.95
    """Level of the bootstrap intervals."""
    resamples: PositiveInt = 10000
    """Resamples of the bootstrap."""


@config_class
class Config:
    """One file that describes a RAG system, its data and how to tune it."""

    rag_system: RAGSystemConfig
    """The RAG system."""
    dataset: DatasetConfig
    """Its data."""
    run: RunConfig = field(default_factory=RunConfig)
    """Name, folder, seed and device."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """What is tuned, and how."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured."""
