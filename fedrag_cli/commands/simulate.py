"""`fedrag simulate`: a federation in one process, and with `--compare` what federating is worth beside other ways."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedrag_cli.commands.federation import (
    create_run,
    federation_summary,
    require_federation,
    run_federation,
    settings_of,
    stored_evaluation,
)
from fedrag_cli.commands.job import (
    RunData,
    RunReporter,
    chosen_metrics,
    data_fingerprints,
    evaluate_once,
    life_cycle,
    load_rag_system,
    load_run_data,
    model_fingerprints,
    record_fingerprints,
    require_unchanged,
    save_models,
    write_results,
)
from fedrag_cli.config import Config, ConfigSource
from fedrag_cli.config.validation import require_training
from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.partition import (
    corpus_by_owner,
    require_sites,
    split_at_random,
    split_by_dirichlet,
    split_by_owner,
)
from fedrag_cli.errors import ConfigError
from fedrag_cli.evaluation.comparison import Evaluated, compare, metric_table
from fedrag_cli.federated.client import ClientHandler
from fedrag_cli.federated.grid import LocalGrid
from fedrag_cli.federated.task import FLTask
from fedrag_cli.federated.weights import Weights
from fedrag_cli.rag.build import build_knowledge_store
from fedrag_cli.rag.system import RAGSystem, refresh_stale_store
from fedrag_cli.reports.compare import load_evaluated
from fedrag_cli.reports.plots import plot_baselines
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.interrupt import terminable
from fedrag_cli.runs.metrics_log import seconds_spent
from fedrag_cli.runs.reporter import Reporter
from fedrag_cli.trainer_managers.build import build_manager

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


SIMULATION = "simulation"


@dataclasses.dataclass(frozen=True)
class Site:
    """One simulated client's data."""

    nodes: list[KnowledgeNode]
    train: list[Example]
    validation: list[Example]


def start_simulation(
    source: ConfigSource,
    clients: int | None,
    *,
    command: Sequence[str],
    reporter: Reporter,
    with_baselines: bool = False,
) -> dict[str, Any]:
    """Simulate a new federation and see it through.

    Args:
        source: A loaded config, with all sites' data.
        clients: Number of clients; with owners, that of the owners by default.
        command: The command line, for the manifest.
        reporter: Shows what happens.
        with_baselines: Whether to train on the pooled data and on each site's alone too, and to compare.

    Returns:
        The summary, as `summary.json` has it.

    Raises:
        FedRAGError: The config, data or a model is wrong, or the federation failed.
    """
    config = source.config
    side = require_federation(config)
    require_training(config)
    data = load_run_data(config)
    chosen_metrics(config, data)
    if with_baselines:
        require_questions(data)
    sites = split_sites(config, data, clients)
    _require_quorum(config, sites)
    with terminable():
        run = create_run(source, command, role=SIMULATION, side=side, clients=clients, compare=with_baselines)
        with life_cycle(run, is_new=True):
            reporter.note(f"Run directory: {run.path}")
            rag_system = load_rag_system(config, data, reporter)
            return _see_through(run, config, data, sites, rag_system, reporter)


def resume_simulation(run: RunDirectory, source: ConfigSource, reporter: Reporter) -> dict[str, Any]:
    """Go on with a simulation after its newest finished round; see `start_simulation`.

    Args:
        run: The simulation's run directory.
        source: Its config.
        reporter: Shows what happens.

    Raises:
        FedRAGError: Beside what `start_simulation` raises: the data or a base model has changed since it started.
    """
    config = source.config
    with life_cycle(run):
        data = load_run_data(config)
        require_unchanged(run, "data", data_fingerprints(data))
        sites = split_sites(config, data, run.manifest()["federation"]["clients"])
        _require_quorum(config, sites)
        rag_system = load_rag_system(config, data, reporter)
        require_unchanged(run, "base models", model_fingerprints(rag_system))
        return _see_through(run, config, data, sites, rag_system, reporter)


def site_name(column: str, owner: str) -> str:
    """Return the name of an owner's site, which names folders too: what paths are made of is quoted as in URLs."""
    return re.sub(r"[^\w .,+=@()-]", lambda found: quote(found[0], safe="", errors="replace"), f"{column}-{owner}")


def split_sites(config: Config, data: RunData, clients: int | None) -> dict[str, Site]:
    """Split a run's data over clients, the same for the same seed.

    Args:
        config: Its `federated.sites` says how.
        data: The whole data.
        clients: Number of clients; with owners, that of the owners where it is None.

    Raises:
        ConfigError: The number of clients is missing or does not fit the owners.
        DataError: A row has no owner, or a site would have no examples.
    """
    settings, seed = settings_of(config).sites, config.run.seed
    by = settings.by
    if by == "auto":
        by = "owner" if any(settings.column in example.metadata for example in data.train) else "random"
    if by == "owner":
        train = split_by_owner(data.train, settings.column)
        require_sites(train, clients, settings.column)
        validation = split_by_owner(data.validation, settings.column)
        corpus = corpus_by_owner(data.nodes, settings.column) or dict.fromkeys(train, data.nodes)
        missing = [owner for owner in train if owner not in corpus]
        if missing:
            raise ConfigError(
                f"The corpus has no passages of '{missing[0]}', who has training examples.",
                "Give the passages the same owners, or leave the column out of the corpus to share it.",
            )
        return {
            site_name(settings.column, owner): Site(corpus[owner], train[owner], validation.get(owner, []))
            for owner in train
        }
    if clients is None:
        raise ConfigError("The number of clients is missing.", "Say --clients N.")
    if clients > len(data.train):
        raise ConfigError(f"{clients} clients cannot share {len(data.train)} training examples.", "Lower --clients.")
    if by == "dirichlet":
        parts = split_by_dirichlet(data.train, settings.column, clients, settings.alpha, seed)
    else:
        parts = split_at_random(data.train, clients, seed)
    checked = split_at_random(data.validation, clients, seed)
    width = len(str(clients))
    return {
        f"client-{number:0{width}d}": Site(data.nodes, part, held_out)
        for number, (part, held_out) in enumerate(zip(parts, checked, strict=True), start=1)
    }


def _require_quorum(config: Config, sites: Mapping[str, Site]) -> None:
    settings = settings_of(config)
    if len(sites) < settings.min_clients:
        raise ConfigError(
            f"{len(sites)} clients are fewer than federated.min_clients ({settings.min_clients}).",
            "Raise --clients, or lower federated.min_clients.",
        )


def _see_through(
    run: RunDirectory,
    config: Config,
    data: RunData,
    sites: Mapping[str, Site],
    rag_system: RAGSystem,
    reporter: Reporter,
) -> dict[str, Any]:
    settings = settings_of(config)
    if (wanted := settings.wait_for_clients or 0) > len(sites):
        reporter.note(
            f"federated.wait_for_clients is {wanted}, but this simulation has {len(sites)} clients; it waits for none. "
            "For more, raise --clients."
        )
    # All clients are here, so nobody is waited for.
    settings = dataclasses.replace(settings, rejoin_timeout=1e-3, wait_for_clients=None)
    reporter = RunReporter(run.open_log(), reporter)
    # A run that goes on counts what its earlier parts have taken.
    started = time.monotonic() - seconds_spent(run.events())
    record_fingerprints(run, rag_system, data)
    reporter.event("started", mode=config.trainer.mode, clients=len(sites), **data.counts())
    handlers = {
        name: ClientHandler(_task_of(run, config, data, site, rag_system, name, reporter), name)
        for name, site in sites.items()
    }
    task = next(iter(handlers.values())).task
    initial = task.weights()
    state = run_federation(
        run, config, data, LocalGrid(handlers, reporter), task, rag_system, settings, reporter, shares_model=True
    )
    save_models(run, rag_system, config)
    summary = federation_summary(
        run,
        config,
        role=SIMULATION,
        counts=data.counts() | {name: len(site.train) for name, site in sites.items()},
        split=data.split,
        before=stored_evaluation(run, "before"),
        after=stored_evaluation(run, "after"),
        rounds=state.history,
        evaluations=state.evaluations,
        seconds=time.monotonic() - started,
        overlaps=data.overlaps(),
    )
    if run.manifest()["federation"].get("compare"):
        tasks = {name: handler.task for name, handler in handlers.items()}
        summary["comparison"] = run_baselines(run, config, data, tasks, rag_system, initial, reporter)
        plot_baselines(summary["comparison"], run.plots / "comparison.png")
    summary["seconds"] = time.monotonic() - started
    write_results(run, summary)
    return summary


def _task_of(
    run: RunDirectory, config: Config, data: RunData, site: Site, rag_system: RAGSystem, name: str, reporter: Reporter
) -> FLTask:
    """Return a client's task: its own data and knowledge store around the models that all clients take turns with."""
    own = dataclasses.replace(rag_system)
    if site.nodes is not data.nodes:
        own.knowledge_store = build_knowledge_store(rag_system.retriever, site.nodes, reporter)
    manager = build_manager(config, own, train=site.train, validation=site.validation, reporter=reporter)
    return manager.get_federated_task(work_directory=run.path / "federation" / name)
