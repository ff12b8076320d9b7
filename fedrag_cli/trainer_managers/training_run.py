"""A whole training run: baseline evaluation, training, evaluation, and all that goes into the run directory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml

from fedrag_cli.config import Config, ConfigSource
from fedrag_cli.config.checks import evaluation_split, require_training, tuned_sides
from fedrag_cli.data.corpora import load_corpus
from fedrag_cli.data.examples import Example, load_examples
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.relevance import resolve_relevant_ids
from fedrag_cli.errors import FedRAGError, RunInterruptedError
from fedrag_cli.evaluation.difference import compare_metrics
from fedrag_cli.evaluation.evaluator import Evaluation, choose_metrics, evaluate
from fedrag_cli.rag.build import build_rag_system, corpus_fingerprint
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.runs.atomic import replace_directory_atomically, write_text_atomically
from fedrag_cli.runs.directory import SCHEMA_VERSION, RunDirectory
from fedrag_cli.runs.metrics_log import MetricsLog
from fedrag_cli.runs.model_card import model_card
from fedrag_cli.runs.plots import plot_curves, plot_difference
from fedrag_cli.runs.reporting import Reporter
from fedrag_cli.trainer_managers.build import build_manager
from fedrag_cli.trainer_managers.huggingface import HuggingFaceRAGTrainerManager
from fedrag_cli.trainers.base import TrainResult


@dataclass(frozen=True)
class RunData:
    """All data of a run, read and checked before any weight is loaded."""

    nodes: list[KnowledgeNode]
    train: list[Example]
    validation: list[Example]
    evaluation: list[Example]
    split: str | None

    def counts(self) -> dict[str, int]:
        """Return the number of rows of each part."""
        counts = {"passages": len(self.nodes), "train": len(self.train), "validation": len(self.validation)}
        return {**counts, self.split: len(self.evaluation)} if self.split else counts


class RunReporter:
    """Writes events into the run's log and hands everything on to another reporter."""

    def __init__(self, log: MetricsLog, inner: Reporter) -> None:
        """Keep both."""
        self._log = log
        self._inner = inner

    def event(self, name: str, **fields: Any) -> None:
        """Record an event in `metrics.jsonl`."""
        self._log.append(name, **fields)
        self._inner.event(name, **fields)

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Any:
        """Hand a task on."""
        with self._inner.task(description, total, unit) as advance:
            yield advance

    def note(self, message: str) -> None:
        """Hand a note on."""
        self._inner.note(message)


def load_run_data(config: Config) -> RunData:
    """Read corpus and examples and check that they fit each other.

    Raises:
        DataError: Anything in them is missing or bad.
    """
    nodes = load_corpus(config.dataset.corpus)
    dataset, split = config.dataset, evaluation_split(config)
    validation = resolve_relevant_ids(load_examples(dataset.validation), nodes) if dataset.validation else []
    questions: list[Example] = []
    if split is not None:
        source = getattr(dataset, split)
        questions = validation if split == "validation" else resolve_relevant_ids(load_examples(source), nodes)
    train = load_examples(dataset.train) if dataset.train is not None else []
    return RunData(nodes, train, validation, questions[: config.evaluation.limit], split)


def start_training(source: ConfigSource, command: Sequence[str], reporter: Reporter) -> dict[str, Any]:
    """Start a new run from a config and see it through.

    Args:
        source: A loaded config.
        command: The command line, for the manifest.
        reporter: Shows what happens.

    Returns:
        The summary, as `summary.json` has it.

    Raises:
        FedRAGError: Anything fails; what is wrong with config, data or models leaves no run directory behind.
    """
    config = source.config
    require_training(config)
    data = load_run_data(config)
    _chosen_metrics(config, data)
    run = RunDirectory.create(
        config.run.output_dir, config.run.name, source.to_yaml(), command=command, seed=config.run.seed
    )
    reporter.note(f"Run directory: {run.path}")
    with run.locked():
        try:
            rag_system = build_rag_system(config, nodes=data.nodes, reporter=reporter)
            _require_room(rag_system, [*data.train, *data.validation])
        except (FedRAGError, KeyboardInterrupt):
            # Nothing was computed that is worth keeping.
            run.remove()
            raise
        return _see_through(run, config, data, rag_system, reporter)


def resume_training(run: RunDirectory, source: ConfigSource, reporter: Reporter) -> dict[str, Any]:
    """Go on with a run from its directory alone; a finished run is left as it is.

    Args:
        run: The run directory.
        source: Its config.
        reporter: Shows what happens.

    Returns:
        The summary, with the numbers that an undisturbed run would have ended with.
    """
    if run.manifest().get("status") == "done":
        reporter.note(f"The run in {run.path} is finished already.")
        return run.summary()
    with run.locked():
        config = source.config
        data = load_run_data(config)
        _require_same_data(run, data)
        run.update_manifest(status="running", error=None)
        rag_system = build_rag_system(config, nodes=data.nodes, reporter=reporter)
        _require_same_models(run, rag_system)
        return _see_through(run, config, data, rag_system, reporter)


def _require_room(rag_system: RAGSystem, examples: Sequence[Example]) -> None:
    """Raise DataError where a question and its answer do not fit into the context window even without passages."""
    generator = rag_system.require_generator()
    for example in examples:
        answer = generator.prompts.encode_answer(example.response)
        generator.encode_prompt(example.query, [], answer_tokens=len(answer))


def _see_through(
    run: RunDirectory, config: Config, data: RunData, rag_system: RAGSystem, reporter: Reporter
) -> dict[str, Any]:
    started = time.monotonic()
    reporter = RunReporter(run.open_log(), reporter)
    try:
        run.update_manifest(fingerprints=_fingerprints(run, data, rag_system))
        reporter.event("started", mode=config.trainer.mode, **data.counts())
        metrics = _chosen_metrics(config, data)
        before = _evaluate_once(run, "before", config, data, rag_system, metrics, reporter)
        manager = build_manager(config, rag_system, train=data.train, validation=data.validation, reporter=reporter)
        result = manager.train(run.checkpoints)
        after = _evaluate_once(run, "after", config, data, rag_system, metrics, reporter)
        _save_models(run, rag_system, config)
        summary = _summary(run, config, data, manager, result, before, after, time.monotonic() - started)
        _write_results(run, summary)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | RunInterruptedError)
        run.update_manifest(status="interrupted" if interrupted else "failed", error=str(error))
        if interrupted:
            raise RunInterruptedError(
                str(getattr(error, "message", "") or "Interrupted; what was computed is saved."),
                f"Go on with: fedrag resume {run.path}",
            ) from error
        raise
    return summary


def _evaluate_once(
    run: RunDirectory,
    stage: str,
    config: Config,
    data: RunData,
    rag_system: RAGSystem,
    metrics: Sequence[str],
    reporter: Reporter,
) -> Evaluation | None:
    """Evaluate, or return what an earlier part of the same run has evaluated already."""
    if data.split is None:
        return None
    done = run.read_json_if_there(f"evaluation/{stage}.json")
    if done is not None:
        return Evaluation.from_dict(done)
    reporter.note(f"Evaluating {stage} training on the {data.split} split ({len(data.evaluation)} questions)")
    evaluation = evaluate(rag_system, data.evaluation, metrics, depth=config.evaluation.depth, reporter=reporter)
    evaluation.write_predictions(run.path / "evaluation" / f"{stage}-predictions.jsonl")
    run.write_json(f"evaluation/{stage}.json", evaluation.to_dict())
    reporter.event("evaluation", stage=stage, split=data.split, metrics=evaluation.means())
    return evaluation


def _save_models(run: RunDirectory, rag_system: RAGSystem, config: Config) -> None:
    sides = tuned_sides(config)
    if "retriever" in sides:
        with replace_directory_atomically(run.retriever) as target:
            rag_system.retriever.save(target)
    if "generator" in sides:
        with replace_directory_atomically(run.generator) as target:
            rag_system.require_generator().save(target)
    rag_system.knowledge_store.save(run.knowledge_store)


def _summary(
    run: RunDirectory,
    config: Config,
    data: RunData,
    manager: HuggingFaceRAGTrainerManager,
    result: TrainResult,
    before: Evaluation | None,
    after: Evaluation | None,
    seconds: float,
) -> dict[str, Any]:
    differences = []
    if before is not None and after is not None:
        compared = compare_metrics(before.values, after.values, config.evaluation, config.run.seed)
        differences = [difference.to_dict() for difference in compared]
    manifest = run.manifest()
    stored = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    return {
        "schema_version": SCHEMA_VERSION,
        "run_name": config.run.name,
        "run_dir": str(run.path),
        "status": "done",
        "mode": manager.mode,
        "seed": config.run.seed,
        "command": manifest["command"],
        "tuned": _tuned(tuned_sides(config), stored),
        "data": data.counts(),
        "fingerprints": manifest["fingerprints"],
        "split": data.split,
        "differences": differences,
        "loss": result.loss,
        "steps": result.steps,
        "metrics": result.metrics,
        "seconds": seconds,
        "settings": {side: stored["trainer"][side] for side in tuned_sides(config)},
        "truncated": _truncated(result, after),
        "versions": manifest["versions"],
    }


def _tuned(sides: Sequence[str], stored: dict[str, Any]) -> dict[str, Any]:
    """Return what was tuned, from the config as it is stored: with references where values came from elsewhere."""
    tuned: dict[str, Any] = {"retriever": None, "generator": None}
    for side in sides:
        component, trainer = stored["rag_system"][side], stored["trainer"][side]
        model = component.get("model") or component.get("query_model") or component["type"]
        tuned[side] = {"model": model, "trainer": trainer["type"]}
    if tuned["retriever"] is not None:
        tuned["retriever"]["train"] = stored["trainer"]["retriever"].get("train", "both")
    if tuned["generator"] is not None:
        tuned["generator"]["adapter"] = stored["trainer"]["generator"].get("lora") is not None
    return tuned


def _truncated(result: TrainResult, after: Evaluation | None) -> dict[str, int]:
    """Return what was cut in training (in all phases) and in the evaluation after it."""
    truncated = {f"evaluation {name}": count for name, count in (after.truncated if after else {}).items()}
    phases = [result.metrics, *(phase for phase in result.metrics.values() if isinstance(phase, dict))]
    for phase in phases:
        for name, label in (("scoring", "scored prompts"), ("prompts", "training prompts")):
            if isinstance(phase.get(name), dict):
                truncated[label] = truncated.get(label, 0) + int(phase[name]["truncated"])
    return truncated


def _write_results(run: RunDirectory, summary: dict[str, Any]) -> None:
    plots = plot_curves(run.events(), run.plots)
    if summary["differences"]:
        plot_difference(summary["differences"], run.plots / "difference.png")
        plots.append(run.plots / "difference.png")
    summary["plots"] = [path.name for path in plots]
    write_text_atomically(run.path / "README.md", model_card(summary))
    run.write_json("summary.json", summary)
    run.update_manifest(status="done", error=None)


def _fingerprints(run: RunDirectory, data: RunData, rag_system: RAGSystem) -> dict[str, str]:
    known: dict[str, str] | None = run.manifest().get("fingerprints")
    if known is not None:
        return known
    return _data_fingerprints(data) | _model_fingerprints(rag_system)


def _data_fingerprints(data: RunData) -> dict[str, str]:
    rows = {"train": data.train, "validation": data.validation}
    if data.split is not None:
        rows[data.split] = data.evaluation
    examples = {
        name: corpus_fingerprint([KnowledgeNode(example.query, "|".join(example.responses)) for example in split])
        for name, split in rows.items()
    }
    return {"passages": corpus_fingerprint(data.nodes), **examples}


def _chosen_metrics(config: Config, data: RunData) -> list[str]:
    """Return the metrics of the evaluation before and after; none where there is nothing to evaluate on."""
    if data.split is None:
        return []
    return choose_metrics(config.evaluation.metrics, tuned_sides(config), data.evaluation)


def _model_fingerprints(rag_system: RAGSystem) -> dict[str, str]:
    generator = rag_system.generator
    models = {"retriever": rag_system.retriever.fingerprint()}
    return models | ({"generator": generator.fingerprint()} if generator is not None else {})


def _require_same_models(run: RunDirectory, rag_system: RAGSystem) -> None:
    known = run.manifest().get("fingerprints") or {}
    changed = [name for name, value in _model_fingerprints(rag_system).items() if known.get(name, value) != value]
    if changed:
        raise FedRAGError(
            f"The base models of this run are others than when it started: {', '.join(changed)}.",
            "Put the old models back, or start a new run with 'fedrag train'.",
        )


def _require_same_data(run: RunDirectory, data: RunData) -> None:
    known = run.manifest().get("fingerprints") or {}
    changed = [name for name, value in _data_fingerprints(data).items() if known.get(name, value) != value]
    if changed:
        raise FedRAGError(
            f"The data of this run has changed since it started: {', '.join(changed)}.",
            "Put the old files back, or start a new run with 'fedrag train'.",
        )
