"""Settings of two stores that a third party would write, one that is kept nowhere and one that is saved."""

from __future__ import annotations

from typing import Literal

from fedrag_cli.config.fields import config_class
from fedrag_cli.rag.config import FolderStoreConfig, KnowledgeStoreConfig
from fedrag_cli.registry import Registry


@config_class
class PlainStoreConfig(KnowledgeStoreConfig):
    """A dictionary."""

    type: Literal["plain"] = "plain"
    """Names this store."""


@config_class
class SavedStoreConfig(FolderStoreConfig):
    """A dictionary that is saved."""

    type: Literal["plain_saved"] = "plain_saved"
    """Names this store."""


def register(registry: Registry) -> None:
    builder = "plugin_store:PlainStore.from_config"
    registry.register("knowledge_store", "plain", PlainStoreConfig, builder, "a dictionary")
    registry.register("knowledge_store", "plain_saved", SavedStoreConfig, builder, "a dictionary that is saved")
