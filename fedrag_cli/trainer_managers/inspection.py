"""Looking at a config's data and models without training: sizes, truncation and memory."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from fedrag_cli.config import Config
from fedrag_cli.data.examples import Example
from fedrag_cli.evaluation.evaluator import choose_metrics
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.prompts import TruncationCount
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.runs.reporting import Reporter
from fedrag_cli.trainer_managers.build import build_manager
from fedrag_cli.trainer_managers.run_parts import load_run_data, uses_generator
from fedrag_cli.trainers.huggingface.checks import trainable


def inspect_config(config: Config, sides: tuple[str, ...], reporter: Reporter) -> dict[str, Any]:
    """Load all that a config names, and report on it without a training step.

    Args:
        config: A loaded config.
        sides: The sides that its mode tunes.
        reporter: Shows the progress.

    Returns:
        Rows of data, parameters of the models and how many are trained, truncated queries, passages and prompts, the
        metrics that would be computed, and the memory in use.

    Raises:
        FedRAGError: Whatever `train` would fail with before its first step.
    """
    data = load_run_data(config)
    rag_system = build_rag_system(
        config, nodes=data.nodes, with_generator=uses_generator(config, data), reporter=reporter
    )
    report: dict[str, Any] = {
        "rows": data.counts(),
        "truncated": _truncation(rag_system, data.train or data.evaluation),
    }
    if data.evaluation:
        report["metrics"] = choose_metrics(config.evaluation.metrics, sides, data.evaluation, config.evaluation.context)
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
    models: dict[str, nn.Module] = {"retriever": rag_system.retriever.passage_encoder}
    if rag_system.generator is not None:
        models["generator"] = rag_system.generator.model
    return {name: _count(dict(model.named_parameters())) for name, model in models.items()}


def _count(parameters: dict[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


def _truncation(rag_system: RAGSystem, examples: list[Example]) -> dict[str, int]:
    retriever, nodes = rag_system.retriever, rag_system.knowledge_store.nodes
    queries = [example.query for example in examples]
    counts = {
        "passages": retriever.count_truncated([node.text for node in nodes], queries=False),
        "queries": retriever.count_truncated(queries, queries=True),
    }
    if rag_system.generator is not None and queries:
        prompts = TruncationCount()
        for query, found in zip(queries, rag_system.batch_retrieve(queries), strict=True):
            prompts.add(rag_system.generator.encode_prompt(query, [scored.node for scored in found]))
        counts["prompts"] = prompts.truncated
    return counts
