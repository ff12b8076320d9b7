"""A trainer around another model and other data, for clients that bring their own."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from fedrag_cli.errors import ModelError
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore
from fedrag_cli.rag.system import RAGSystem, refresh_store
from fedrag_cli.trainers.huggingface.base import HuggingFaceTrainer


def trainer_around(
    trainer: HuggingFaceTrainer, model: nn.Module | None, train_dataset: Any, validation_dataset: Any
) -> HuggingFaceTrainer:
    """Return a trainer with the same settings around another model and other data.

    Args:
        trainer: The trainer to follow.
        model: The model to train; the trainer's own where it is None.
        train_dataset: Training examples; none where it is None.
        validation_dataset: Validation examples; none where it is None.

    Raises:
        ModelError: The model is of another kind than the trainer's.
        DataError: The trainer measures what needs relevant ids, and no validation example has any.
    """
    rag_system = trainer.rag_system if model is None else _with_model(trainer, model)
    own = type(trainer)(
        rag_system,
        train_dataset=[] if train_dataset is None else train_dataset,
        validation_dataset=[] if validation_dataset is None else validation_dataset,
        config=trainer.config,
        seed=trainer.seed,
        reporter=trainer.reporter,
    )
    if trainer.extra_validation is not None and own.validation_examples:
        own.extra_validation = trainer.extra_validation.around(own)
    return own


def _with_model(trainer: HuggingFaceTrainer, model: nn.Module) -> RAGSystem:
    rag_system = trainer.rag_system
    if trainer.side == "generator":
        generator = rag_system.require_generator()
        if model is generator.model:
            return rag_system
        return dataclasses.replace(rag_system, generator=generator.with_model(model))
    retriever = rag_system.retriever
    if model is retriever.query_encoder:
        return rag_system
    if not isinstance(model, type(retriever.query_encoder)):
        raise ModelError(
            f"A retriever's model is a SentenceTransformer, not a {type(model).__name__}.",
            "Pass rag_system.retriever.query_encoder, or another SentenceTransformer.",
        )
    both = getattr(trainer.config, "train", "query") == "both"
    shared = model is retriever.passage_encoder or (both and retriever.is_shared)
    own = dataclasses.replace(rag_system, retriever=retriever.with_query_encoder(model, shared=shared))
    if both:
        # The passages' embeddings follow this model's weights, so they cannot be those of the other store.
        own.knowledge_store = _copy_of(rag_system.knowledge_store, retriever.device)
        if len(own.knowledge_store):
            refresh_store(own)
        own.knowledge_store.encoder_fingerprint = own.retriever.fingerprint()
    return own


def _copy_of(store: KnowledgeStore, device: torch.device) -> InMemoryKnowledgeStore:
    copy = InMemoryKnowledgeStore(device)
    copy.add(store.nodes, store.embeddings)
    copy.corpus_fingerprint = store.corpus_fingerprint
    return copy
