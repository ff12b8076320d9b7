"""Checking values against the schema, over several settings at once, and what each command needs."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fedrag_cli.config.fields import (
    MOST_BYTES_OF_NAME,
    ComponentSlot,
    adapter_of,
    dataclass_at,
    generator_metrics_of,
    is_optional,
    ranking_metrics_of,
    slots_of,
)
from fedrag_cli.config.problems import ConfigProblem, Finding, KeyPath, suggestion
from fedrag_cli.config.references import outside_reference, without_values
from fedrag_cli.config.schema import Config, FederatedConfig, FusionConfig, RAGSystemConfig
from fedrag_cli.config.source import ConfigTree
from fedrag_cli.errors import ConfigError
from fedrag_cli.registry import registry

EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
}
_MOST_SHOWN = 300


def validate_values(values: dict[str, Any], tree: ConfigTree) -> tuple[Config | None, list[ConfigProblem]]:
    """Return the config of resolved values (plain dicts, lists and scalars), or None and all that is wrong."""
    try:
        return adapter_of(Config).validate_python(values), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    messages: dict[KeyPath, dict[str, None]] = {}
    for detail in details:
        path, message = _finding(detail, values, tree)
        messages.setdefault(path, {})[message] = None
    # The members of a union may each say something about the same value.
    return None, tree.problems((path, "; or ".join(said)) for path, said in messages.items())


def _finding(details: ErrorDetails, values: dict[str, Any], tree: ConfigTree) -> Finding:
    path, owner = _locate(details["loc"], values)
    if details["type"] == "union_tag_invalid":
        path = (*path, "type")
    return path, without_values(_message(details, path, owner, tree), outside_reference(tree.tree, path) or "")


def _locate(location: tuple[str | int, ...], values: Any) -> tuple[KeyPath, type | None]:
    """Turn pydantic's location into a key path, and find the dataclass that the last key belongs to.

    A location also names the chosen `type:` of a component and the tried members of a union; these are no keys.
    """
    path: list[str | int] = []
    owner: type | None = Config
    current: Any = values
    inner: type | None = Config
    for position, part in enumerate(location):
        last = position == len(location) - 1
        is_key = isinstance(part, int) or (inner is not None and part in _field_names(inner))
        if inner is not None and not is_key and not (last and isinstance(current, dict) and part in current):
            continue
        if inner is None and not isinstance(part, int):
            continue
        owner = inner
        path.append(part)
        current = _child(current, part)
        inner = dataclass_at(owner, part, current) if owner is not None and isinstance(part, str) else None
    return tuple(path), owner


def _child(value: Any, key: str | int) -> Any:
    try:
        return value[key]
    except (KeyError, IndexError, TypeError):
        return None


def _field_names(owner: type) -> list[str]:
    return [field.name for field in dataclasses.fields(owner)]


def _message(details: ErrorDetails, path: KeyPath, owner: type | None, tree: ConfigTree) -> str:
    kind, given = details["type"], details["input"]
    shown = _shown(given, path, tree)
    context: dict[str, Any] = details.get("ctx") or {}
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"is no setting here{suggestion(path[-1], _field_names(owner) if owner else ())}"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return "is required"
    if kind == "union_tag_invalid":
        tags = [tag.strip().strip("'") for tag in str(context.get("expected_tags", "")).split(",")]
        tag = context.get("tag")
        named = f"'{tag}'" if outside_reference(tree.tree, path) is None else shown
        return f"there is no type {named}{suggestion(tag, tags)}"
    if kind == "literal_error":
        options = [
            option.strip().strip("'") for option in str(context.get("expected", "")).replace(" or ", ",").split(",")
        ]
        listed = [*options, "null"] if owner is not None and is_optional(owner, str(path[-1])) else options
        return f"{shown} is not one of {', '.join(listed)}{_close(given, options)}"
    if kind == "value_error":
        return f"{shown} {context.get('error')}"
    if kind in ("dataclass_type", "dict_type", "union_tag_not_found"):
        return f"needs settings below it ('key: value' lines), not {shown}"
    if kind in EXPECTED:
        return f"must be {EXPECTED[kind]}, not {shown}"
    if kind == "string_too_short":
        return "must not be empty"
    message = details["msg"].replace("Input should be", "must be")
    return f"{message[0].lower()}{message[1:]}, not {shown}"


def _shown(given: object, path: KeyPath, tree: ConfigTree) -> str:
    """Write a value as Python does, but what comes from outside of the config as its reference: it may be a secret."""
    reference = outside_reference(tree.tree, path)
    if reference is not None:
        return f"the value of {reference}"
    if isinstance(given, dict):
        return f"{{{', '.join(f'{key!r}: {_shown(item, (*path, key), tree)}' for key, item in given.items())}}}"
    if isinstance(given, list):
        return f"[{', '.join(_shown(item, (*path, index), tree) for index, item in enumerate(given))}]"
    text = repr(given)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _close(given: object, options: list[str]) -> str:
    """Return a suggestion among the options with the numbers of what is given: 16bit does not mean 8bit."""
    numbers = re.findall(r"\d+", str(given))
    alike = [option for option in options if not numbers or re.findall(r"\d+", option) == numbers]
    if isinstance(given, int) and len(alike) == 1:
        return f" (did you mean '{alike[0]}'?)"
    text = suggestion(given, alike)
    return text if "did you mean" in text else ""


def check_config(config: Config) -> Iterator[Finding]:
    """Yield what is wrong between settings that are each right by themselves."""
    yield from _check_run_name(config)
    yield from _check_device(config)
    yield from _check_trackers(config)
    yield from _check_inference(config)
    yield from _check_evaluation(config)
    yield from _check_federation(config)
    idle = [("trainer", side) for side in ("retriever", "generator") if side not in tuned_sides(config)]
    for kind, path, component in components_of(config):
        if path not in idle:
            yield from _check_component(config, kind, path, component)


def components_of(section: Any, path: KeyPath = ()) -> Iterator[tuple[str, KeyPath, Any]]:
    """Yield kind, key path and config of each component that a section of the config has."""
    for field in dataclasses.fields(section):
        inner, value = (*path, field.name), getattr(section, field.name)
        if not dataclasses.is_dataclass(value):
            continue
        slots = slots_of(type(section), field.name)
        yield from ((slot.kind, inner, value) for slot in slots if isinstance(slot, ComponentSlot))
        yield from components_of(value, inner)


def _check_component(config: Config, kind: str, path: KeyPath, component: Any) -> list[Finding]:
    """Return what a component's `check` finds; plug-ins may raise or return anything."""
    if not hasattr(component, "check"):
        return []
    try:
        found = [(tuple(where), message) for where, message in component.check(config, path)]
        if any(not isinstance(message, str) for _, message in found):
            raise TypeError("a message is no text")
        if any(not isinstance(key, str | int) for where, _ in found for key in where):
            raise TypeError("a key path has something else than names and numbers")
    except Exception as error:
        origin = registry().get(kind, component.type).origin
        raise ConfigError(
            f"The check of the {kind} '{component.type}' of '{origin}' fails: {type(error).__name__}: {error}",
            f"Repair or uninstall '{origin}'.",
        ) from error
    return found


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
    """Return whether an objective that is trained uses the generator."""
    return any(getattr(config.trainer, side).needs_generator for side in tuned_sides(config))


def trains_on_relevant_ids(config: Config) -> bool:
    """Return whether an objective that is trained needs examples with relevant ids."""
    return any(getattr(config.trainer, side).needs_relevant_ids for side in tuned_sides(config))


def trains_on_responses(config: Config) -> bool:
    """Return whether an objective that is trained needs examples with answers."""
    return any(getattr(config.trainer, side).needs_responses for side in tuned_sides(config))


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


def _check_inference(config: Config) -> Iterator[Finding]:
    settings = config.rag_system
    if settings.inference == "concat" and settings.ensemble_temperature is not None:
        yield ("rag_system", "ensemble_temperature"), "has no effect with inference: concat; remove it"
    if settings.inference == "ensemble" and settings.generator is None:
        yield ("rag_system", "inference"), "ensemble needs a rag_system.generator"
    method = settings.fusion.method if settings.lexical is not None else "weighted"
    if settings.inference == "ensemble" and settings.ensemble_temperature is None and method != "weighted":
        message = f"is missing: the default is for similarities, and the scores of fusion.method: {method} are none"
        yield ("rag_system", "ensemble_temperature"), message
    yield from _check_fusion(settings)


def _check_fusion(settings: RAGSystemConfig) -> Iterator[Finding]:
    fusion, default, path = settings.fusion, FusionConfig(), ("rag_system", "fusion")
    if settings.lexical is None and fusion != default:
        yield path, "has no effect without rag_system.lexical; remove it, or add lexical: {}"
        return
    for name, methods in (("weight", ("weighted",)), ("rrf_constant", ("rrf",)), ("candidates", ("weighted", "rrf"))):
        if fusion.method not in methods and getattr(fusion, name) != getattr(default, name):
            yield (*path, name), f"has no effect with method: {fusion.method}; remove it"


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
    if settings.privacy is not None and not settings.strategy.takes_mean:
        known: dict[str, Any] = {name: each.config_class for name, each in registry().of_kind("strategy").items()}
        fitting = [name for name, strategy in known.items() if strategy.takes_mean]
        message = f"adds noise to the mean of the updates, which {settings.strategy.type} does not take (use one of "
        yield (*path, "privacy"), message + ", ".join(fitting) + ")"
    yield from _check_lora_aggregation(config, settings)
    if settings.wait_for_clients is not None and settings.wait_for_clients < settings.min_clients:
        yield (*path, "wait_for_clients"), f"must not be below min_clients ({settings.min_clients})"


def _check_lora_aggregation(config: Config, settings: FederatedConfig) -> Iterator[Finding]:
    chosen, path = settings.lora_aggregation, ("federated", "lora_aggregation")
    if chosen == "average":
        return
    if config.trainer.mode != "generator" or config.trainer.generator.lora is None:
        yield path, f"{chosen} is for LoRA adapters, but none is tuned (trainer.mode: generator with a lora section)"
    if chosen == "svd" and not settings.strategy.gives_mean:
        yield path, f"svd gives the mean itself, of which {settings.strategy.type} takes no step; use FedAvg or FedProx"
    if chosen == "svd" and settings.privacy is not None:
        yield path, "svd looks at single updates, which federated.privacy keeps it from; use freeze_a or average"
