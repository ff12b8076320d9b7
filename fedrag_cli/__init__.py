"""Tune the retriever and the generator of a RAG system on your own data.

The names below are loaded when they are first used, so that `import fedrag_cli` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedrag_cli.config import Config as Config
    from fedrag_cli.config import load_config as load_config
    from fedrag_cli.data.examples import Example as Example
    from fedrag_cli.data.nodes import KnowledgeNode as KnowledgeNode
    from fedrag_cli.errors import FedRAGError as FedRAGError
    from fedrag_cli.rag.build import build_rag_system as build_rag_system
    from fedrag_cli.rag.system import RAGAnswer as RAGAnswer
    from fedrag_cli.rag.system import RAGSystem as RAGSystem

_HOMES = {
    "Config": "fedrag_cli.config",
    "Example": "fedrag_cli.data.examples",
    "FedRAGError": "fedrag_cli.errors",
    "KnowledgeNode": "fedrag_cli.data.nodes",
    "RAGAnswer": "fedrag_cli.rag.system",
    "RAGSystem": "fedrag_cli.rag.system",
    "build_rag_system": "fedrag_cli.rag.build",
    "load_config": "fedrag_cli.config",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from its home (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedrag_cli' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
