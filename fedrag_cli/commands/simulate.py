"""`fedrag simulate`: a federation in one process, and with `--compare` what federating is worth beside other ways."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedrag_cli.commands.federation import (
    federation_summary,
    require_federation,
    run_federation,
    settings_of,
    stored_evaluation,
)
from fedrag_cli.commands.job import Job, open_job, save_models
from fedrag_cli.commands.run_data import RunData, chosen_metrics, load_rag_system, load_run_data
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
from fedrag_cli.federated.grid import InProcessGrid
from fedrag_cli.federated.task import FLTask
from fedrag_cli.federated.weights import Weights
from fedrag_cli.rag.build import build_hybrid_search, build_knowledge_store
from fedrag_cli.rag.system import RAGSystem, refresh_stale_store
from fedrag_cli.reports.compare import load_evaluated
from fedrag_cli.reports.interval_plots import plot_baselines
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.reporter import Reporter
from fedrag_cli.trainer_managers.build import build_manager

SIMULATION = "simulation"
UNTUNED, FEDERATED, POOLED = "untuned", "federated", "pooled"
ALONE = "each site alone, mean"


@dataclasses.dataclass(frozen=True)
class Site:
    """One simulated client's data."""

    nodes: list[KnowledgeNode]
    train: list[Example]
    validation: list[Example]


def simulate(
    source: ConfigSource,
    reporter: Reporter,
    *,
    command: Sequence[str] = (),
    clients: int | None = None,
    with_baselines: bool = False,
    run: RunDirectory | None = None,
) -> dict[str, Any]:
    """Simulate a new federation, or go on with one after its newest finished round, and see it through.

    Args:
        source: A loaded config, with all sites' data.
        reporter: Shows what happens.
        command: The command line of a new run, for the manifest.
        clients: Number of clients; with owners, that of the owners by default. A run that goes on has its own.
        with_baselines: Whether to train on the pooled data and on each site's alone too, and to compare.
        run: The simulation's run that goes on.

    Returns:
        The summary, as `summary.json` has it.

    Raises:
        FedRAGError: The config, data or a model is wrong, or the federation failed; data or a base model of a run that
            goes on have changed since it started.
    """
    config = source.config
    own: dict[str, Any] = {
        "role": SIMULATION,
        "side": require_federation(config),
        "clients": clients,
        "compare": with_baselines,
    }
    own = own if run is None else run.manifest()["federation"]
    require_training(config)
    with open_job(source, reporter, run, command=command, federation=own) as job:
        data = load_run_data(config)
        chosen_metrics(config, data)
        if own.get("compare") and data.split is None:
            raise ConfigError(
                "--compare needs questions to compare on, but the config has neither dataset.test nor "
                "dataset.validation.",
                "Add one of them.",
            )
        sites = split_sites(config, data, own["clients"])
        rag_system = job.load(lambda: load_rag_system(config, data, reporter), data)
        return _simulate(job, data, sites, rag_system, with_baselines=bool(own.get("compare")))


def _simulate(
    job: Job, data: RunData, sites: Mapping[str, Site], rag_system: RAGSystem, *, with_baselines: bool
) -> dict[str, Any]:
    run, settings, reporter = job.run, settings_of(job.config), job.reporter
    if (wanted := settings.wait_for_clients or 0) > len(sites):
        reporter.note(
            f"federated.wait_for_clients is {wanted}, but this simulation has {len(sites)} clients; it waits for none. "
            "For more, raise --clients."
        )
    # All clients are here, so nobody is waited for.
    settings = dataclasses.replace(settings, rejoin_timeout=1e-3, wait_for_clients=None)
    reporter.event("started", mode=job.config.trainer.mode, clients=len(sites), **data.counts())
    tasks = {name: _task_of(job, data, site, rag_system, name) for name, site in sites.items()}
    task = next(iter(tasks.values()))
    initial = task.weights()
    grid = InProcessGrid({name: ClientHandler(task, name) for name, task in tasks.items()}, reporter)
    state = run_federation(job, data, grid, task, rag_system, settings, shares_model=True)
    save_models(run, rag_system, job.config)
    comparison = run_baselines(job, data, tasks, rag_system, initial) if with_baselines else None
    summary = federation_summary(
        job,
        data,
        stored_evaluation(run, "before"),
        stored_evaluation(run, "after"),
        rounds=state.history,
        evaluations=state.evaluations,
    )
    summary["data"] |= {name: len(site.train) for name, site in sites.items()}
    if comparison is not None:
        summary["comparison"] = comparison
        plot_baselines(comparison, run.plots / "comparison.png")
    job.finish_tuning(summary)
    return summary


def _task_of(job: Job, data: RunData, site: Site, rag_system: RAGSystem, name: str) -> FLTask:
    """Return a client's task: its own data and knowledge store around the models that all clients take turns with."""
    own = dataclasses.replace(rag_system)
    if site.nodes is not data.nodes:
        own.knowledge_store = build_knowledge_store(rag_system.retriever, site.nodes, job.reporter)
        own.hybrid = build_hybrid_search(job.config, site.nodes, job.reporter)
    manager = build_manager(job.config, own, train=site.train, validation=site.validation, reporter=job.reporter)
    return manager.get_federated_task(work_directory=job.run.path / "federation" / name)


def site_name(column: str, owner: str) -> str:
    """Return the name of an owner's site, which names folders too: what paths are made of is quoted as in URLs."""
    return re.sub(r"[^\w .,+=@()-]", lambda found: quote(found[0], safe="", errors="replace"), f"{column}-{owner}")


def split_sites(config: Config, data: RunData, clients: int | None) -> dict[str, Site]:
    """Split a run's data over clients as `federated.sites` says, the same for the same seed.

    Raises:
        ConfigError: The number of clients is missing, does not fit the owners, or is below the quorum.
        DataError: A row has no owner, or a site would have no examples.
    """
    sites = _split_by_config(config, data, clients)
    quorum = settings_of(config).min_clients
    if len(sites) < quorum:
        raise ConfigError(
            f"{len(sites)} clients are fewer than federated.min_clients ({quorum}).",
            "Raise --clients, or lower federated.min_clients.",
        )
    return sites


def _split_by_config(config: Config, data: RunData, clients: int | None) -> dict[str, Site]:
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


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Another way to tune than the federation."""

    name: str
    stage: str
    """Name of its evaluation in the run directory."""
    rag_system: RAGSystem
    """The RAG system that it trains, with the knowledge store of its data."""
    data: RunData
    sites: int
    """Number of sites whose steps it takes, where the config counts steps."""
    caches: list[Path]
    """Folders with likelihoods that are known already; the first is its own."""


def run_baselines(
    job: Job, data: RunData, sites: Mapping[str, FLTask], rag_system: RAGSystem, initial: Weights
) -> dict[str, Any]:
    """Train and measure the baselines that are not done yet, and compare all ways with each other.

    Args:
        job: That of the finished federation.
        data: The whole data.
        sites: The clients' tasks by name, each with its own data and knowledge store.
        rag_system: The RAG system with the whole corpus; it shares its models with the tasks.
        initial: The weights that everything starts from.
    """
    task, folder = next(iter(sites.values())), job.run.path / "federation"
    caches = {name: folder / name / "cache" for name in sites}
    pooled = Baseline(POOLED, POOLED, rag_system, data, len(sites), [folder / POOLED / "cache", *caches.values()])
    baselines = [pooled]
    for name, site in sites.items():
        own = dataclasses.replace(data, train=site.trainer.train_examples, validation=site.trainer.validation_examples)
        baselines.append(Baseline(f"{name} alone", f"alone-{name}", site.trainer.rag_system, own, 1, [caches[name]]))
    for baseline in baselines:
        if job.run.read_json_if_there(f"evaluation/{baseline.stage}.json") is None:
            task.load(initial)
            _train(job, baseline)
            refresh_stale_store(rag_system)
            job.evaluate(baseline.stage, data, rag_system)
    stages = {UNTUNED: "before", FEDERATED: "after"} | {item.name: item.stage for item in baselines}
    return comparison_of(job.run, job.config, stages, [item.name for item in baselines if item is not pooled])


def _train(job: Job, baseline: Baseline) -> None:
    data, longer = baseline.data, with_all_passes(job.config, baseline.sites)
    job.reporter.note(f"Training {baseline.name} on {len(data.train)} examples")
    manager = build_manager(
        longer, baseline.rag_system, train=data.train, validation=data.validation, reporter=job.reporter
    )
    for trainer in manager.trainers.values():
        if trainer is not None:
            trainer.cache_directory = joined_caches(baseline.caches)
    manager.train(job.run.checkpoints / baseline.stage)


def with_all_passes(config: Config, sites: int) -> Config:
    """Return the config with as many passes over the examples as all rounds of a federation of so many sites make."""
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
    """Return the metrics of each way of tuning, its differences to `untuned` and `pooled`, and verdicts in words.

    Args:
        run: The run that holds their evaluations.
        config: Its config.
        stages: The evaluations' names by the ways' names; `untuned`, `federated` and `pooled` among them.
        alone: Names of the single sites.
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
