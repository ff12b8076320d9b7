"""The registry: which component a `type:` in the config names.

A component is a config dataclass, a builder and one line of help. Builders are named as `module:attribute` and
imported when something is built, so that listing and validating components loads no model library. Packages of
third parties join through the entry-point group `fedrag.components`: an entry point is a function that takes the
registry and registers what the package offers.

Components answer for themselves: nothing else asks for a type by its name. Configs are made with
`config.fields.config_class`, and what each kind offers is told by the classes below:

- `retriever`: `builder(config, device=)` returns a `rag.retrievers.base.Retriever`.
- `lexical`: `builder(config, nodes, folder, progress=)` opens or builds a `rag.lexical.LexicalIndex`, or what searches
  and scores passages as it does, and saves a `lexical.json` among its files.
- `generator`: `builder(config, prompt=, device=, seed=)` returns a `rag.generators.base.Generator`. Where one of the
  two can be tuned, `config.tuned_in(directory)` returns the config of what it has saved there.
- `knowledge_store`: the config is a `rag.config.KnowledgeStoreConfig`, and `builder(config, device=)` returns a
  `rag.knowledge_stores.base.KnowledgeStore`.
- `corpus`: `builder(config)` returns a list of `data.nodes.KnowledgeNode`.
- `examples`: `builder(config)` returns a list of `data.examples.Example`; where the config has
  `may_lack_responses = True`, `builder(config, needs_responses=False)` takes rows without answers.
- `retriever_trainer` and `generator_trainer`, the objectives: the config is a `RetrieverTrainingConfig` or
  `GeneratorTrainingConfig` of `trainers.config`, and `builder(config, rag_system, **options)` returns a
  `trainers.huggingface.base.HuggingFaceTrainer`.
- `strategy`: the config is a `federated.config.StrategyConfig`, and `builder(config, min_clients=, learning_rate=)`
  returns a `flwr.serverapp.strategy.Strategy`.

Any config may have `check(config, path)`, which takes the whole config and the key path of the component, and yields
(key path, message) for all that is wrong between settings that are each right by themselves.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from fedrag_cli.errors import ConfigError, FedRAGError

ENTRY_POINT_GROUP = "fedrag.components"
BUILT_IN_MODULES = {
    "fedrag_cli.data.config": ("corpus", "examples"),
    "fedrag_cli.data.benchmarks.config": ("corpus", "examples"),
    "fedrag_cli.rag.config": ("retriever", "lexical", "generator", "knowledge_store"),
    "fedrag_cli.trainers.config": ("retriever_trainer", "generator_trainer"),
    "fedrag_cli.federated.config": ("strategy",),
}
"""Modules that register components, and of which kinds; each is imported when somebody asks for what it may hold."""
BASES = {
    "retriever": None,
    "lexical": None,
    "generator": None,
    "knowledge_store": "fedrag_cli.rag.config.KnowledgeStoreConfig",
    "corpus": None,
    "examples": None,
    "retriever_trainer": "fedrag_cli.trainers.config.RetrieverTrainingConfig",
    "generator_trainer": "fedrag_cli.trainers.config.GeneratorTrainingConfig",
    "strategy": "fedrag_cli.federated.config.StrategyConfig",
}
"""The kinds, and what their configs derive from."""
KINDS = tuple(BASES)


@dataclass(frozen=True)
class Component:
    """One thing that a config can name by `type:`.

    Args:
        kind: The slot that it fits, one of `KINDS`.
        name: The `type:` that names it.
        config_class: The dataclass of its settings.
        builder: `module:attribute` of the callable that builds it from its config.
        help: One line for `fedrag components`.
        origin: The distribution that registered it.
    """

    kind: str
    name: str
    config_class: type
    builder: str
    help: str
    origin: str = "fedrag-cli"

    def load_builder(self) -> Callable[..., Any]:
        """Import and return the builder; raises ConfigError where it cannot be imported."""
        module_name, _, attribute = self.builder.partition(":")
        try:
            builder: Any = importlib.import_module(module_name)
            for name in attribute.split("."):
                builder = getattr(builder, name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"The builder '{self.builder}' of the {self.kind} '{self.name}' cannot be imported: {error}",
                f"Check the installation of '{self.origin}', or choose another type ('fedrag components' lists them).",
            ) from error
        found: Callable[..., Any] = builder
        return found


class Registry:
    """Components by kind and name."""

    def __init__(self) -> None:
        """Start empty."""
        self._waiting: dict[str, tuple[str, ...]] = {}
        self._components: dict[str, dict[str, Component]] = {kind: {} for kind in KINDS}
        self._origin = "fedrag-cli"

    def register(self, kind: str, name: str, config_class: type, builder: str, help: str) -> None:
        """Add a component.

        Args:
            kind: The slot that it fits, one of `KINDS`.
            name: The `type:` that names it.
            config_class: The dataclass of its settings, with a field `type: Literal[name] = name`, derived from the
                kind's base where it has one.
            builder: `module:attribute` of the callable that builds it.
            help: One line for `fedrag components`.

        Raises:
            ConfigError: The kind is unknown, the name is taken, or the dataclass does not fit.
        """
        if kind not in self._components:
            raise ConfigError(f"'{self._origin}' registers the unknown kind '{kind}'.", f"Kinds: {', '.join(KINDS)}.")
        taken = self._components[kind].get(name)
        if taken is not None:
            raise ConfigError(
                f"'{self._origin}' registers the {kind} '{name}', which '{taken.origin}' has registered already.",
                f"Uninstall one of '{self._origin}' and '{taken.origin}'.",
            )
        # The default alone: resolving the annotations of all config classes would slow every command's start.
        fields = dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ()
        if not any(field.name == "type" and field.default == name for field in fields):
            raise ConfigError(
                f'The config class of the {kind} \'{name}\' needs a field `type: Literal["{name}"] = "{name}"`.'
            )
        base = BASES[kind]
        if base is not None and base not in (f"{each.__module__}.{each.__qualname__}" for each in config_class.__mro__):
            raise ConfigError(
                f"The config class of the {kind} '{name}' of '{self._origin}' does not derive from {base}.",
                f"Repair or uninstall '{self._origin}'.",
            )
        self._components[kind][name] = Component(kind, name, config_class, builder, help, self._origin)

    def get(self, kind: str, name: str) -> Component:
        """Return one component; raises ConfigError with the known names where there is none."""
        found = self.find(kind, name)
        if found is None:
            known = ", ".join(sorted(self._components.get(kind, {})))
            raise ConfigError(f"There is no {kind} of type '{name}'.", f"Known types: {known}.")
        return found

    def find(self, kind: str, name: str) -> Component | None:
        """Return one component, or None; no more modules are imported than it takes to find it."""
        known = self._components.get(kind, {})
        while name not in known and self._import_next(kind):
            pass
        return known.get(name)

    def of_kind(self, kind: str) -> dict[str, Component]:
        """Return the components of a kind by name."""
        while self._import_next(kind):
            pass
        return dict(self._components[kind])

    def all(self) -> list[Component]:
        """Return every component, in the order of `KINDS` and then of registration."""
        return [component for kind in KINDS for component in self.of_kind(kind).values()]

    def load(self) -> Registry:
        """Register the built-in components and those of installed packages, and return the registry itself."""
        self._waiting = dict(BUILT_IN_MODULES)
        for entry_point in metadata.entry_points(group=ENTRY_POINT_GROUP):
            # What is built in comes first, so that a package that takes one of its names is told so.
            self.all()
            self._origin = entry_point.dist.name if entry_point.dist else entry_point.value
            try:
                entry_point.load()(self)
            except FedRAGError:
                raise
            except Exception as error:  # A plug-in may raise anything, and every command loads it.
                reason = f"{type(error).__name__}: {error}"
                raise ConfigError(
                    f"The plug-in '{entry_point.name}' of '{self._origin}' cannot be loaded: {reason}",
                    f"Repair or uninstall '{self._origin}'.",
                ) from error
        return self

    def _import_next(self, kind: str) -> bool:
        """Let one more module register that may hold components of a kind; return whether there was one."""
        for module, kinds in self._waiting.items():
            if kind in kinds:
                del self._waiting[module]
                importlib.import_module(module).register(self)
                return True
        return False


@functools.cache
def registry() -> Registry:
    """Return the process's registry, filled at the first call."""
    return Registry().load()


def build(kind: str, config: Any, *args: Any, **kwargs: Any) -> Any:
    """Build the component that `config.type` names; the config is the builder's first argument."""
    return registry().get(kind, config.type).load_builder()(config, *args, **kwargs)
