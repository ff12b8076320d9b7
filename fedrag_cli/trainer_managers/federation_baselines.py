"""`fedrag simulate --compare`: what federating is worth, beside pooled data and each site by itself.

All start from the same weights, train with the federation's settings and as many passes over the examples, and answer
the same questions over the whole corpus.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedrag_cli.config import Config
from fedrag_cli.errors import ConfigError
from fedrag_cli.evaluation.comparison import Evaluated, compare, metric_table
from fedrag_cli.federated.task import FLTask
from fedrag_cli.federated.weights import Weights
from fedrag_cli.rag.system import RAGSystem, refresh_stale_store
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.reporting import Reporter
from fedrag_cli.trainer_managers.build import build_manager
from fedrag_cli.trainer_managers.comparing import load_evaluated
from fedrag_cli.trainer_managers.federated_parts import settings_of
from fedrag_cli.trainer_managers.run_parts import RunData, chosen_metrics, evaluate_once

UNTUNED, FEDERATED, POOLED = "untuned", "federated", "pooled"
ALONE = "each site alone, mean"


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Another way to tune than the federation.

    Args:
        name: What it is called.
        stage: Name of its evaluation in the run directory.
        rag_system: The RAG system that it trains, with the knowledge store of its data.
        data: What it trains on.
        sites: Number of sites whose steps it takes, where the config counts steps.
        caches: Folders with likelihoods that are known already; the first is its own.
    """

    name: str
    stage: str
    rag_system: RAGSystem
    data: RunData
    sites: int
    caches: list[Path]


def require_questions(data: RunData) -> None:
    """Raise ConfigError where there are no questions to compare on."""
    if data.split is None:
        raise ConfigError(
            "--compare needs questions to compare on, but the config has neither dataset.test nor dataset.validation.",
            "Add one of them.",
        )


def run_baselines(
    run: RunDirectory,
    config: Config,
    data: RunData,
    sites: Mapping[str, FLTask],
    rag_system: RAGSystem,
    initial: Weights,
    reporter: Reporter,
) -> dict[str, Any]:
    """Train and measure the baselines that are not done yet, and compare all ways with each other.

    Args:
        run: The run of the finished federation.
        config: Its config.
        data: The whole data.
        sites: The clients' tasks by name, each with its own data and knowledge store.
        rag_system: The RAG system with the whole corpus; it shares its models with the tasks.
        initial: The weights that everything starts from.
        reporter: Shows what happens.

    Returns:
        The comparison, for the summary and for tables.
    """
    task = next(iter(sites.values()))
    caches = {name: run.path / "federation" / name / "cache" for name in sites}
    pooled = Baseline(
        POOLED, POOLED, rag_system, data, len(sites), [run.path / "federation" / POOLED / "cache", *caches.values()]
    )
    baselines = [pooled]
    for name, site in sites.items():
        own = dataclasses.replace(data, train=site.trainer.train_examples, validation=site.trainer.validation_examples)
        baselines.append(Baseline(f"{name} alone", f"alone-{name}", site.trainer.rag_system, own, 1, [caches[name]]))
    for baseline in baselines:
        if run.read_json_if_there(f"evaluation/{baseline.stage}.json") is None:
            task.load(initial)
            _train(run, config, baseline, reporter)
            refresh_stale_store(rag_system)
            evaluate_once(run, baseline.stage, config, data, rag_system, chosen_metrics(config, data), reporter)
    stages = {UNTUNED: "before", FEDERATED: "after"} | {item.name: item.stage for item in baselines}
    return comparison_of(run, config, stages, [item.name for item in baselines if item is not pooled])


def _train(run: RunDirectory, config: Config, baseline: Baseline, reporter: Reporter) -> None:
    reporter.note(f"Training {baseline.name} on {len(baseline.data.train)} examples")
    longer = with_all_passes(config, baseline.sites)
    manager = build_manager(
        longer,
        baseline.rag_system,
        train=baseline.data.train,
        validation=baseline.data.validation,
        reporter=reporter,
    )
    for trainer in manager.trainers.values():
        if trainer is not None:
            trainer.cache_directory = joined_caches(baseline.caches)
    manager.train(run.checkpoints / baseline.stage)


def with_all_passes(config: Config, sites: int) -> Config:
    """Return the config with as many passes over the examples as all rounds of the federation make.

    Args:
        config: The federation's config, whose trainer describes one round of one client.
        sites: Number of sites whose steps are taken together, where the config counts steps.
    """
    side, rounds = config.trainer.mode, settings_of(config).rounds
    trainer = getattr(config.trainer, side)
    steps = trainer.max_steps * rounds * sites if trainer.max_steps is not None else None
    trainer = dataclasses.replace(trainer, epochs=trainer.epochs * rounds, max_steps=steps)
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, **{side: trainer}))


def joined_caches(caches: Sequence[Path]) -> Path:
    """Put all known likelihoods into the first folder: those of the same question and passage are the same."""
    target = caches[0]
    target.mkdir(parents=True, exist_ok=True)
    for cache in caches[1:]:
        for file in sorted(cache.glob("*.jsonl")):
            joined = target / file.name
            known = joined.read_text(encoding="utf-8") if joined.exists() else ""
            new = file.read_text(encoding="utf-8")
            if new not in known:
                joined.write_text(known + new, encoding="utf-8")
    return target


def comparison_of(run: RunDirectory, config: Config, stages: Mapping[str, str], alone: Sequence[str]) -> dict[str, Any]:
    """Compare all ways of tuning with the untuned and with the pooled model.

    Args:
        run: The run that holds their evaluations.
        config: Its config.
        stages: The evaluations' names by the ways' names; `untuned`, `federated` and `pooled` among them.
        alone: Names of the single sites.

    Returns:
        The metrics of each way, its differences to `untuned` and `pooled`, and a verdict in words.
    """
    settings, seed = config.evaluation, config.run.seed
    evaluated = {
        name: dataclasses.replace(load_evaluated(f"{run.path}:{stage}"), label=name) for name, stage in stages.items()
    }
    if len(alone) > 1:
        evaluated[ALONE] = mean_of([evaluated[name] for name in alone], ALONE)
    rows, verdicts = [], []
    for name, item in evaluated.items():
        row: dict[str, Any] = {"name": name, "metrics": metric_table(item, settings, seed)}
        for other in (UNTUNED, POOLED):
            if name in (other, UNTUNED):
                continue
            found = compare(evaluated[other], item, settings, seed)
            row[f"to_{other}"] = {difference.metric: difference.to_dict() for difference in found.differences}
            if name == FEDERATED or (name == ALONE and other == UNTUNED):
                verdicts.append(found.verdict())
        rows.append(row)
    single = evaluated[ALONE if ALONE in evaluated else alone[0]]
    verdicts.append(compare(single, evaluated[FEDERATED], settings, seed).verdict())
    return {"rows": rows, "verdicts": verdicts, "confidence": settings.confidence}


def mean_of(evaluated: Sequence[Evaluated], name: str) -> Evaluated:
    """Return each question's mean over several models, as if it were the evaluation of one."""
    records = []
    for rows in zip(*(item.predictions for item in evaluated), strict=True):
        metrics = {metric: sum(row["metrics"][metric] for row in rows) / len(rows) for metric in rows[0]["metrics"]}
        records.append({"id": rows[0]["id"], "query": rows[0]["query"], "metrics": metrics})
    return Evaluated(name, records, name)
