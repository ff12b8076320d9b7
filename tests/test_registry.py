from __future__ import annotations

from typing import Literal

import pytest

from fedrag_cli.config.fields import PositiveInt, config_class
from fedrag_cli.errors import ConfigError
from fedrag_cli.registry import KINDS, Registry, build, registry


@config_class
class MineConfig:
    """A component of the tests."""

    type: Literal["mine"] = "mine"
    """Names it."""
    size: PositiveInt = 1
    """How large."""


def build_mine(config: MineConfig, extra: int) -> int:
    return config.size + extra


def test_register_and_build() -> None:
    fresh = Registry()
    fresh.register("corpus", "mine", MineConfig, f"{__name__}:build_mine", "of the tests")
    component = fresh.get("corpus", "mine")
    assert (component.kind, component.name, component.origin) == ("corpus", "mine", "fedrag-cli")
    assert component.load_builder() is build_mine
    assert fresh.of_kind("corpus") == {"mine": component}
    assert fresh.all() == [component]


def test_name_clash() -> None:
    fresh = Registry()
    fresh.register("corpus", "mine", MineConfig, "a:b", "")
    fresh.register("examples", "mine", MineConfig, "a:b", "")
    with pytest.raises(ConfigError, match=r"registers the corpus 'mine', which 'fedrag-cli' has registered already"):
        fresh.register("corpus", "mine", MineConfig, "a:b", "")


def test_unknown_kind() -> None:
    with pytest.raises(ConfigError, match=r"'fedrag-cli' registers the unknown kind 'retreiver'") as caught:
        Registry().register("retreiver", "mine", MineConfig, "a:b", "")
    assert caught.value.hint == f"Kinds: {', '.join(KINDS)}."


def test_config_class_without_a_fitting_type_field() -> None:
    @config_class
    class NoType:
        size: int = 1

    class NoDataclass:
        type: Literal["mine"] = "mine"

    for owner, name in ((NoType, "mine"), (NoDataclass, "mine"), (MineConfig, "yours")):
        with pytest.raises(ConfigError, match=rf"The config class of the corpus '{name}' needs a field `type: Literal"):
            Registry().register("corpus", name, owner, "a:b", "")


@pytest.mark.parametrize("builder", ["fedrag_no_such_module:x", "json:no_such_function", "json:loads.nothing"])
def test_builder_that_cannot_be_imported(builder: str) -> None:
    fresh = Registry()
    fresh.register("corpus", "mine", MineConfig, builder, "")
    with pytest.raises(ConfigError, match=rf"The builder '{builder}' of the corpus 'mine' cannot be imported"):
        fresh.get("corpus", "mine").load_builder()


def test_unknown_component() -> None:
    with pytest.raises(ConfigError, match=r"There is no retriever_trainer of type 'x'") as caught:
        registry().get("retriever_trainer", "x")
    assert caught.value.hint == "Known types: contrastive, emdr2, loop, lsr, pdist."
    with pytest.raises(ConfigError, match=r"There is no corpus of type 'mine'"):
        build("corpus", MineConfig())


def test_every_built_in_component_can_be_imported_and_has_help_for_every_setting() -> None:
    from fedrag_cli.config.json_schema import component_settings

    for component in registry().all():
        assert callable(component.load_builder())
        assert component.help
        assert [s["name"] for s in component_settings(component.config_class) if not s["help"]] == [], component
