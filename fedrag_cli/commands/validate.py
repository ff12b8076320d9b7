"""Looking at a config's data and models without training: sizes, truncation and memory."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from fedrag_cli.commands.run_data import RunData, chosen_metrics, load_rag_system, load_run_data, measured_lengths
from fedrag_cli.config import Config
from fedrag_cli.config.validation import require_training
from fedrag_cli.rag.generators.base import TrainableGenerator
from fedrag_cli.rag.lengths import TruncationCount
from fedrag_cli.rag.retrievers.base import TrainableRetriever
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.runs.reporter import Reporter
from fedrag_cli.trainer_managers.build import build_manager
from fedrag_cli.trainers.huggingface.checks import trainable


def inspect_config(config: Config, reporter: Reporter) -> dict[str, Any]:
    """Load all that a config names, and report on it without a training step.

    Args:
        config: A loaded config.
        reporter: Shows the progress.

    Returns:
        Rows of data, parameters of the models and how many are trained, truncated queries, passages and prompts, the
        metrics that would be computed, and the memory in use.

    Raises:
        FedRAGError: Whatever `train` would fail with before its first step, but for what only scoring all examples can
            tell: that the language model prefers none of the passages.
    """
    if config.dataset.train is not None:
        require_training(config)
    data = load_run_data(config)
    metrics = chosen_metrics(config, data)
    rag_system = load_rag_system(config, data, reporter)
    report: dict[str, Any] = {
        "rows": data.counts(),
        "overlaps": [overlap.to_dict() for overlap in data.overlaps()],
        **_truncation(rag_system, data),
    }
    if data.evaluation:
        report["metrics"] = metrics
    if data.train:
        manager = build_manager(config, rag_system, train=data.train, validation=data.validation)
        trained = {side: _count(trainable(trainer.model)) for side, trainer in manager.trainers.items() if trainer}
        report["trained_parameters"] = trained
    report["parameters"] = _parameters(rag_system)
    return report | _peak_memory()


def _peak_memory() -> dict[str, int]:
    """Return the most memory that this process has had; nothing on Windows, which keeps no such account."""
    try:
        import resource
    except ImportError:
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return {"peak_memory_bytes": peak if sys.platform == "darwin" else peak * 1024}


def _parameters(rag_system: RAGSystem) -> dict[str, int]:
    models: dict[str, nn.Module] = {}
    if isinstance(rag_system.retriever, TrainableRetriever):
        models["retriever"] = rag_system.retriever.passage_encoder
    if isinstance(rag_system.generator, TrainableGenerator):
        models["generator"] = rag_system.generator.model
    return {name: _count(dict(model.named_parameters())) for name, model in models.items()}


def _count(parameters: dict[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


def _truncation(rag_system: RAGSystem, data: RunData) -> dict[str, Any]:
    """Return how many passages, questions and prompts are cut, and what there is to say about it."""
    passages, questions = lengths = measured_lengths(rag_system, data)
    counts = {"passages": passages.truncated, "queries": questions.truncated}
    queries = [example.query for example in data.train or data.evaluation]
    generator = rag_system.generator
    # One search shows that queries and passages have embeddings of the same size.
    retrieved = rag_system.batch_retrieve(queries if generator is not None else queries[:1])
    if generator is not None and queries:
        prompts = TruncationCount()
        for query, found in zip(queries, retrieved, strict=True):
            prompt = generator.encode_prompt(query, [scored.node for scored in found])
            prompts.add(prompt.tokens, prompt.dropped_tokens)
        counts["prompts"] = prompts.truncated
        lengths = [*lengths, generator.measure("prompts", prompts.to_dict())]
    return {"truncated": counts, "lengths": [item.to_dict() for item in lengths]}
