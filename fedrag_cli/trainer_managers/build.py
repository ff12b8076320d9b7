"""Building trainers and manager from a config, through the registry."""

from __future__ import annotations

from fedrag_cli.config import Config
from fedrag_cli.config.validation import tuned_sides
from fedrag_cli.data.examples import Example
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.registry import build
from fedrag_cli.runs.reporter import Reporter
from fedrag_cli.trainer_managers.huggingface import HuggingFaceRAGTrainerManager
from fedrag_cli.trainers.huggingface.base import HuggingFaceTrainer


def build_manager(
    config: Config,
    rag_system: RAGSystem,
    *,
    train: list[Example],
    validation: list[Example],
    reporter: Reporter | None = None,
) -> HuggingFaceRAGTrainerManager:
    """Build the trainers that the config's mode needs, and their manager.

    Args:
        config: A loaded config.
        rag_system: The RAG system to tune.
        train: Training examples.
        validation: Validation examples; empty for none.
        reporter: Takes events and progress.

    Raises:
        FedRAGError: Training could not begin: settings, data and models do not fit each other.
    """
    trainers = build_trainers(config, rag_system, train=train, validation=validation, reporter=reporter)
    for trainer in trainers.values():
        trainer.require_ready()
    return HuggingFaceRAGTrainerManager(
        config.trainer.mode, trainers.get("retriever"), trainers.get("generator"), config.trainer.cycles
    )


def build_trainers(
    config: Config,
    rag_system: RAGSystem,
    *,
    train: list[Example],
    validation: list[Example],
    reporter: Reporter | None = None,
) -> dict[str, HuggingFaceTrainer]:
    """Build the trainers that the config's mode needs, by side; arguments as for `build_manager`."""
    return {
        side: build(
            f"{side}_trainer",
            getattr(config.trainer, side),
            rag_system,
            train_dataset=train,
            validation_dataset=validation,
            seed=config.run.seed,
            reporter=reporter,
        )
        for side in tuned_sides(config)
    }
