"""Checks over several settings at once, and what each command needs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from fedrag_cli.config.fields import MOST_BYTES_OF_NAME
from fedrag_cli.config.metrics import GENERATOR_METRICS, generator_metrics_of, ranking_metrics_of
from fedrag_cli.config.problems import KeyPath
from fedrag_cli.config.schema import Config, FederatedConfig
from fedrag_cli.errors import ConfigError

Finding = tuple[KeyPath, str]
# Settings of the faiss store that only one kind of index has.
_INDEX_OF_SETTING = {"nlist": "ivf", "nprobe": "ivf", "m": "hnsw", "ef_construction": "hnsw", "ef_search": "hnsw"}
# Retriever objectives that compare the passages of one query with each other.
_RANKING_OBJECTIVES = ("lsr", "pdist", "emdr2", "loop")
# Strategies to which updates are no more than their mean.
_STRATEGIES_OF_MEANS = ("FedAvg", "FedProx", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi")


def check_config(config: Config) -> Iterator[Finding]:
    """Yield what is wrong between settings that are each right by themselves, as (key path, message)."""
    yield from _check_run_name(config)
    yield from _check_device(config)
    yield from _check_trackers(config)
    yield from _check_retriever_models(config)
    yield from _check_knowledge_store(config)
    yield from _check_inference(config)
    yield from _check_placement(config)
    yield from _check_evaluation(config)
    yield from _check_federation(config)
    for side in tuned_sides(config):
        yield from _check_trainer(config, side)


def tuned_sides(config: Config) -> tuple[str, ...]:
    """Return which sides the mode tunes, in their order: retriever, generator, or both."""
    return ("retriever", "generator") if config.trainer.mode == "alternating" else (config.trainer.mode,)


def require_training(config: Config) -> None:
    """Raise ConfigError where something is missing that `train` needs."""
    require_generator_for_training(config)
    if config.dataset.train is None:
        raise ConfigError(
            "The config has no dataset.train, which training needs.", "Add a file of questions and answers there."
        )


def trains_with_generator(config: Config) -> bool:
    """Return whether an objective that is trained uses the generator; all do that do not say otherwise."""
    return any(getattr(getattr(config.trainer, side), "needs_generator", True) for side in tuned_sides(config))


def trains_on_relevant_ids(config: Config) -> bool:
    """Return whether an objective that is trained needs examples with relevant ids."""
    return any(getattr(getattr(config.trainer, side), "needs_relevant_ids", False) for side in tuned_sides(config))


def trains_on_responses(config: Config) -> bool:
    """Return whether an objective that is trained needs examples with answers; all do that do not say otherwise."""
    return any(getattr(getattr(config.trainer, side), "needs_responses", True) for side in tuned_sides(config))


def require_generator_for_training(config: Config) -> None:
    """Raise ConfigError where the config has no generator but an objective that is trained needs one."""
    if trains_with_generator(config):
        require_generator(config, "training")


def require_generator(config: Config, purpose: str) -> None:
    """Raise ConfigError where the config has no generator but the purpose needs one."""
    if config.rag_system.generator is None:
        raise ConfigError(
            f"The config has no rag_system.generator, which {purpose} needs.", "Add a generator with its 'model:'."
        )


def evaluation_split(config: Config) -> str | None:
    """Return the name of the split to evaluate on, or None where the config has neither test nor validation."""
    if config.evaluation.split != "auto":
        return config.evaluation.split
    if config.dataset.test is not None:
        return "test"
    return "validation" if config.dataset.validation is not None else None


def require_evaluation_split(config: Config) -> str:
    """Return the name of the split to evaluate on; raise ConfigError where there is none."""
    split = evaluation_split(config)
    if split is None:
        raise ConfigError(
            "The config has neither dataset.test nor dataset.validation to evaluate on.", "Add one of them."
        )
    return split


def _check_run_name(config: Config) -> Iterator[Finding]:
    name = config.run.name
    if name.strip(" .") == "" or any(character in name for character in "/\\\0"):
        yield ("run", "name"), f"{name!r} is no name of a folder (write the path into run.output_dir)"
    elif len(os.fsencode(name)) > MOST_BYTES_OF_NAME - len("-evaluation"):
        yield ("run", "name"), "is too long for the name of a folder"


def _check_device(config: Config) -> Iterator[Finding]:
    device = config.run.device
    number = device.removeprefix("cuda:")
    if device not in ("auto", "cpu", "mps", "cuda") and not (device.startswith("cuda:") and number.isdigit()):
        yield ("run", "device"), f"'{device}' is no device (auto, cpu, mps, cuda, cuda:N)"


def _check_trackers(config: Config) -> Iterator[Finding]:
    for number, name in enumerate(config.run.report_to):
        if importlib.util.find_spec(name) is None:
            yield ("run", "report_to", number), f"the package of '{name}' is not installed"


def _check_retriever_models(config: Config) -> Iterator[Finding]:
    retriever = config.rag_system.retriever
    if retriever.type != "sentence_transformer":
        return
    path = ("rag_system", "retriever")
    separate = (retriever.query_model, retriever.passage_model)
    if retriever.model is None and None in separate:
        yield path, "needs 'model', or both 'query_model' and 'passage_model'"
    if retriever.model is not None and separate != (None, None):
        yield path, "has 'model' beside 'query_model' or 'passage_model'; keep one or the other"


def _check_knowledge_store(config: Config) -> Iterator[Finding]:
    store, path = config.rag_system.knowledge_store, ("rag_system", "knowledge_store")
    if store.type == "faiss":
        for name, index in _INDEX_OF_SETTING.items():
            if getattr(store, name) is not None and store.index != index:
                yield (*path, name), f"has no effect with index: {store.index}; remove it"
    if store.type in ("memory", "faiss") and store.memory_map and store.path is None:
        yield (*path, "memory_map"), "needs a path, the folder of the saved store"
    if store.type == "qdrant":
        if store.path is not None and store.url is not None:
            yield (*path, "path"), "stands beside url; keep one or the other"
        if store.api_key is not None and store.url is None:
            yield (*path, "api_key"), "has no effect without url; remove it"


def _check_inference(config: Config) -> Iterator[Finding]:
    settings = config.rag_system
    if settings.inference == "concat" and settings.ensemble_temperature is not None:
        yield ("rag_system", "ensemble_temperature"), "has no effect with inference: concat; remove it"
    if settings.inference == "ensemble" and settings.generator is None:
        yield ("rag_system", "inference"), "ensemble needs a rag_system.generator"


def _check_placement(config: Config) -> Iterator[Finding]:
    generator, path = config.rag_system.generator, ("rag_system", "generator")
    if generator is None or generator.type != "causal_lm":
        return
    if generator.device_map is not None and config.run.device not in ("auto", "cuda"):
        message = f"takes all GPUs, but run.device is {config.run.device}; set that to auto or cuda, or remove it"
        yield (*path, "device_map"), message
    if generator.quantization is not None and generator.model.endswith(".gguf"):
        yield (*path, "quantization"), "is not for GGUF files, which transformers turns into plain weights; remove it"


def _check_evaluation(config: Config) -> Iterator[Finding]:
    split = config.evaluation.split
    if split != "auto" and getattr(config.dataset, split) is None:
        yield ("evaluation", "split"), f"is '{split}', but there is no dataset.{split}"
    if config.evaluation.metrics == ():
        yield ("evaluation", "metrics"), "names no metric; leave it out for those of the side that is tuned"
    metrics = config.evaluation.metrics or ()
    answering = generator_metrics_of(metrics)
    if config.rag_system.generator is None and answering:
        yield ("evaluation", "metrics"), f"{answering[0]} needs a rag_system.generator"
    if config.evaluation.choice_score != "sum" and metrics and "accuracy" not in metrics:
        yield ("evaluation", "choice_score"), "has no effect without the metric accuracy; remove it"
    ranked = ranking_metrics_of(metrics)
    if ranked and config.evaluation.context != "retrieved":
        yield ("evaluation", "metrics"), f"{ranked[0]} needs evaluation.context: retrieved"


def _check_federation(config: Config) -> Iterator[Finding]:
    if config.federated is None:
        return
    settings, path = config.federated, ("federated",)
    strategy = settings.strategy
    malicious = getattr(strategy, "num_malicious_nodes", 0)
    needed = {"Krum": 2 * malicious + 3, "MultiKrum": 2 * malicious + 3, "Bulyan": 4 * malicious + 3}.get(strategy.type)
    if needed is not None and settings.min_clients < needed:
        message = f"must be at least {needed} for {strategy.type} with num_malicious_nodes {malicious}"
        yield (*path, "min_clients"), message
    if strategy.type == "MultiKrum" and strategy.num_nodes_to_select > settings.min_clients:
        yield (*path, "strategy", "num_nodes_to_select"), f"must not be above min_clients ({settings.min_clients})"
    if settings.privacy is not None and strategy.type not in _STRATEGIES_OF_MEANS:
        message = f"adds noise to the mean of the updates, which {strategy.type} does not take (use one of "
        yield (*path, "privacy"), message + ", ".join(_STRATEGIES_OF_MEANS) + ")"
    yield from _check_lora_aggregation(config, settings)
    if settings.wait_for_clients is not None and settings.wait_for_clients < settings.min_clients:
        yield (*path, "wait_for_clients"), f"must not be below min_clients ({settings.min_clients})"
    if strategy.type == "QFedAvg" and "loss" not in settings.metrics:
        yield (*path, "metrics"), "must have loss in it for QFedAvg, which weighs clients by it"


def _check_lora_aggregation(config: Config, settings: FederatedConfig) -> Iterator[Finding]:
    chosen, path = settings.lora_aggregation, ("federated", "lora_aggregation")
    if chosen == "average":
        return
    if config.trainer.mode != "generator" or config.trainer.generator.lora is None:
        yield path, f"{chosen} is for LoRA adapters, but none is tuned (trainer.mode: generator with a lora section)"
    if chosen == "svd" and settings.strategy.type not in ("FedAvg", "FedProx"):
        yield path, f"svd gives the mean itself, of which {settings.strategy.type} takes no step; use FedAvg or FedProx"
    if chosen == "svd" and settings.privacy is not None:
        yield path, "svd looks at single updates, which federated.privacy keeps it from; use freeze_a or average"


def _check_trainer(config: Config, side: str) -> Iterator[Finding]:
    trainer: Any = getattr(config.trainer, side)
    path = ("trainer", side)
    yield from _check_retriever_objective(trainer, path)
    yield from _check_generator_objective(config, trainer, path)
    if getattr(trainer, "warmup", 0) and getattr(trainer, "scheduler", "") == "constant":
        yield (*path, "warmup"), "has no effect with scheduler: constant; use constant_with_warmup"
    validation = getattr(trainer, "validation", None)
    if validation is None:
        return
    if config.dataset.validation is None:
        for name in ("metric", "patience"):
            if getattr(validation, name) is not None:
                yield (*path, "validation", name), "needs a dataset.validation"
    if validation.every == "never" and validation.patience is not None:
        yield (*path, "validation", "patience"), "needs validation.every: epoch or a number of steps"
    answers = validation.metric in GENERATOR_METRICS
    if validation.metric not in (None, "loss") and answers != (side == "generator"):
        known = f"loss, {', '.join(GENERATOR_METRICS)}" if side == "generator" else "loss, mrr, hit@K, recall@K, ndcg@K"
        yield (*path, "validation", "metric"), f"'{validation.metric}' does not measure the {side} (metrics: {known})"


def _check_retriever_objective(trainer: Any, path: KeyPath) -> Iterator[Finding]:
    if trainer.type in _RANKING_OBJECTIVES:
        if trainer.top_k < 2:
            yield (*path, "top_k"), "must be at least 2: among one passage there is no ranking to learn"
        if trainer.train == "query" and trainer.refresh_every is not None:
            yield (*path, "refresh_every"), "has no effect with train: query, whose index never goes stale; remove it"
    if trainer.type == "contrastive":
        alone = trainer.batch_size * trainer.gradient_accumulation_steps == 1
        if alone and not trainer.hard_negatives:
            yield (*path, "hard_negatives"), "must be at least 1 where a step has one example: it has no other negative"


def _check_generator_objective(config: Config, trainer: Any, path: KeyPath) -> Iterator[Finding]:
    if trainer.type not in ("ralt", "raft"):
        return
    if getattr(config.rag_system.generator, "adapter", None) and trainer.lora is None:
        yield (*path, "lora"), "null tunes all weights, but rag_system.generator has an adapter; remove one of the two"
    if getattr(config.rag_system.generator, "quantization", None) and trainer.lora is None:
        yield (*path, "lora"), "is needed, because the weights of a quantised generator cannot be tuned themselves"
    if trainer.type == "raft":
        return
    if trainer.passage_weights == "uniform":
        if trainer.retriever_temperature != type(trainer)().retriever_temperature:
            yield (*path, "retriever_temperature"), "has no effect with passage_weights: uniform; remove it"
    elif trainer.passages == "together":
        yield (*path, "passage_weights"), "retriever needs passages: separate; together makes one instance of them all"
    elif trainer.top_k < 2:
        yield (*path, "passage_weights"), "retriever needs a top_k of at least 2; one passage always has the weight 1"
