"""PDist, EMDR2 and LOOP on tiny models: their losses are their formulas, and only the query encoder moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedrag_cli.config import load_config
from fedrag_cli.errors import TrainingError
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.trainers.config import EMDR2Config, LMSupervisedConfig, LOOPConfig, PDistConfig, ValidationConfig
from fedrag_cli.trainers.huggingface import (
    HuggingFaceTrainerForEMDR2,
    HuggingFaceTrainerForLOOP,
    HuggingFaceTrainerForPDist,
)
from fedrag_cli.trainers.huggingface.lm_supervision import HuggingFaceTrainerForLMSupervision

OBJECTIVES: list[tuple[type[HuggingFaceTrainerForLMSupervision], type[LMSupervisedConfig]]] = [
    (HuggingFaceTrainerForPDist, PDistConfig),
    (HuggingFaceTrainerForEMDR2, EMDR2Config),
    (HuggingFaceTrainerForLOOP, LOOPConfig),
]
NEVER = ValidationConfig(every="never")
LAST = ValidationConfig(keep_best=False)


@pytest.fixture
def rag_system(write_config: Callable[..., Path]) -> RAGSystem:
    return build_rag_system(load_config(write_config()))


def _likelihood(rag_system: RAGSystem, query: str, response: str, nodes: list[Any]) -> tuple[float, int]:
    """Return the log-likelihood of an answer and its tokens, by a single forward pass of the language model."""
    generator = rag_system.require_generator()
    encoded = generator.prompts.encode_pair(query, nodes, response, with_end=False)
    prompt, target = encoded.ids, encoded.answer
    labels = torch.tensor([[-100] * len(prompt) + target])
    with torch.no_grad():
        mean = -generator.model(torch.tensor([prompt + target]), labels=labels).loss.item()
    return mean * len(target), len(target)


def _expected(name: str, scores: torch.Tensor, rows: list[tuple[float, int]]) -> float:
    """Return the loss of one example from its definition in the paper."""
    log_retriever = torch.log_softmax(scores.double() / 0.05, dim=0)
    sums = torch.tensor([total for total, _ in rows], dtype=torch.float64)
    means = torch.tensor([total / tokens for total, tokens in rows], dtype=torch.float64)
    if name == "emdr2":
        return -float(torch.log((log_retriever.exp() * sums.exp()).sum()))
    log_target = torch.log_softmax((means if name == "pdist" else -means) / 0.01, dim=0)
    return float((log_target.exp() * (log_target - log_retriever)).sum())


@pytest.mark.parametrize(("trainer_class", "config_class"), OBJECTIVES)
def test_the_first_loss_is_the_formula_on_likelihoods_computed_apart(
    rag_system: RAGSystem, trainer_class: Any, config_class: Any
) -> None:
    config = config_class(top_k=3, batch_size=14, learning_rate=1e-3, max_steps=1, validation=NEVER)
    trainer = trainer_class(rag_system, config=config)
    expected = []
    for example in trainer.train_examples:
        found = rag_system.retrieve(example.query, 3)
        nodes = [scored.node for scored in found]
        prompts = [[node] for node in nodes]
        if config.type == "loop":
            prompts = [[nodes[1], nodes[2]], [nodes[0], nodes[2]], [nodes[0], nodes[1]]]
        rows = [_likelihood(rag_system, example.query, example.response, prompt) for prompt in prompts]
        expected.append(_expected(config.type, torch.tensor([scored.score for scored in found]), rows))
    assert trainer.train().loss == pytest.approx(sum(expected) / len(expected), rel=1e-3)


@pytest.mark.parametrize(("trainer_class", "config_class"), OBJECTIVES)
def test_the_query_encoder_moves_and_nothing_else(rag_system: RAGSystem, trainer_class: Any, config_class: Any) -> None:
    generator = rag_system.require_generator()
    config = config_class(top_k=4, batch_size=4, learning_rate=1e-3, max_steps=1, validation=LAST)
    trainer = trainer_class(rag_system, config=config)
    retriever, store = rag_system.retriever, rag_system.knowledge_store
    query, passages = retriever.query_fingerprint(), retriever.fingerprint()
    embeddings, language_model = store.embeddings.clone(), generator.fingerprint()
    result = trainer.train()
    assert retriever.query_fingerprint() != query
    assert retriever.fingerprint() == passages
    assert torch.equal(store.embeddings, embeddings)
    assert generator.fingerprint() == language_model
    assert all(parameter.grad is None for parameter in generator.model.parameters())
    assert result.metrics["validation"]["loss"] == pytest.approx(trainer.validate()["loss"], abs=1e-5)


@pytest.mark.parametrize(("trainer_class", "config_class"), OBJECTIVES)
def test_accumulated_batches_equal_one_large_batch(
    write_config: Callable[..., Path], trainer_class: Any, config_class: Any
) -> None:
    def train(folder: str, **settings: Any) -> dict[str, torch.Tensor]:
        system = build_rag_system(load_config(write_config(folder)))
        config = config_class(top_k=3, optimizer="sgd", learning_rate=1e-2, validation=NEVER, **settings)
        trainer = trainer_class(system, config=config)
        trainer.train()
        weights: dict[str, torch.Tensor] = trainer.trained_weights()
        return weights

    large = train("large", batch_size=8)
    small = train("small", batch_size=2, gradient_accumulation_steps=4)
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_both_encoders_move_and_the_store_follows(rag_system: RAGSystem) -> None:
    config = EMDR2Config(train="both", top_k=4, batch_size=4, learning_rate=1e-3, max_steps=2, validation=LAST)
    before = rag_system.retriever.fingerprint()
    HuggingFaceTrainerForEMDR2(rag_system, config=config).train()
    assert rag_system.retriever.fingerprint() != before
    rag_system.require_matching_store()


def test_each_passage_is_left_out_once(rag_system: RAGSystem) -> None:
    config = LOOPConfig(top_k=4, batch_size=14, max_steps=1, learning_rate=1e-3, validation=NEVER)
    trainer = HuggingFaceTrainerForLOOP(rag_system, config=config)
    nodes = rag_system.knowledge_store.nodes[:4]
    assert [[node.id for node in context] for context in trainer._contexts(nodes)] == [
        [node.id for node in nodes if node is not left_out] for left_out in nodes
    ]
    assert trainer.train().metrics["scored_pairs"] == 14 * 4


def test_flat_likelihoods_are_named_without_a_temperature_that_there_is_not(rag_system: RAGSystem) -> None:
    with torch.no_grad():
        rag_system.require_generator().model.get_output_embeddings().weight.zero_()
    trainer = HuggingFaceTrainerForEMDR2(rag_system, config=EMDR2Config(top_k=4))
    with pytest.raises(TrainingError, match="targets are flat") as caught:
        trainer.train()
    assert "lm_temperature" not in f"{caught.value.message} {caught.value.hint}"


def test_one_loss_for_a_whole_batch_is_refused(rag_system: RAGSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HuggingFaceTrainerForPDist, "_loss", lambda self, scores, lm_scores: scores.mean())
    trainer = HuggingFaceTrainerForPDist(rag_system, config=PDistConfig(top_k=3, batch_size=4, validation=NEVER))
    with pytest.raises(TrainingError, match=r"HuggingFaceTrainerForPDist made losses of shape .* for 4 examples"):
        trainer.train()
