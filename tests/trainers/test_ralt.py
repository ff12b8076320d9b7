"""RALT on tiny models: which tokens carry loss, what moves, and that it learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel

from fedrag_cli.config import load_config
from fedrag_cli.errors import TrainingError
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.trainers.config import LoRAConfig, RALTConfig, ValidationConfig
from fedrag_cli.trainers.huggingface import HuggingFaceTrainerForRALT
from fedrag_cli.trainers.huggingface.generator import answer_loss

NEVER = ValidationConfig(every="never")


@pytest.fixture
def rag_system(write_config: Callable[..., Path]) -> RAGSystem:
    return build_rag_system(load_config(write_config()))


def test_lora_moves_adapters_only(rag_system: RAGSystem) -> None:
    generator, retriever = rag_system.require_generator(), rag_system.retriever
    base = {name: tensor.clone() for name, tensor in generator.model.state_dict().items()}
    encoder = retriever.fingerprint()
    trainer = HuggingFaceTrainerForRALT(
        rag_system, config=RALTConfig(learning_rate=1e-2, batch_size=4, validation=NEVER)
    )
    assert isinstance(generator.model, PeftModel)
    before = trainer.trained_weights()
    assert before
    assert all("lora_" in name for name in before)
    trainer.train()
    after = trainer.trained_weights()
    assert sum(not torch.equal(after[name], before[name]) for name in before) == len(before)
    now = generator.model.get_base_model().state_dict()
    for name, tensor in base.items():
        kept = now[name] if name in now else now[name.replace(".weight", ".base_layer.weight")]
        assert torch.equal(kept, tensor), name
    assert retriever.fingerprint() == encoder
    assert all(parameter.grad is None for parameter in retriever.passage_encoder.parameters())


def test_full_tuning_moves_all_weights(rag_system: RAGSystem) -> None:
    trainer = HuggingFaceTrainerForRALT(
        rag_system, config=RALTConfig(lora=None, learning_rate=1e-3, batch_size=4, validation=NEVER)
    )
    before = trainer.trained_weights()
    trainer.train()
    moved = [name for name, tensor in trainer.trained_weights().items() if not torch.equal(tensor, before[name])]
    assert len(moved) == len(before)


@pytest.mark.parametrize("passages", ["separate", "together"])
def test_the_reported_loss_is_the_mean_over_answer_tokens(rag_system: RAGSystem, passages: Any) -> None:
    """One step over all instances: the loss equals -sum log p / tokens, computed apart, prompt tokens excluded."""
    generator = rag_system.require_generator()
    config = RALTConfig(batch_size=64, max_steps=1, top_k=2, passages=passages, learning_rate=1e-3, validation=NEVER)
    trainer = HuggingFaceTrainerForRALT(rag_system, config=config)
    instances = trainer.instances(trainer.train_examples)
    assert len(instances) == 14 * (2 if passages == "separate" else 1)
    total, tokens = 0.0, 0
    for item in instances:
        assert item.answer[-1] == generator.tokenizer.eos_token_id
        labels = torch.tensor([[-100] * len(item.prompt) + item.answer])
        with torch.no_grad():
            loss = generator.model(torch.tensor([item.prompt + item.answer]), labels=labels).loss.item()
        total, tokens = total + loss * len(item.answer), tokens + len(item.answer)
    assert trainer.train().loss == pytest.approx(total / tokens, rel=1e-4)
    result = trainer.train()
    assert result.metrics["supervised_tokens"] == tokens


def test_it_learns_to_answer(rag_system: RAGSystem) -> None:
    config = RALTConfig(
        lora=LoRAConfig(r=8),
        batch_size=1,
        top_k=1,
        learning_rate=2e-2,
        epochs=30,
        scheduler="constant",
        validation=NEVER,
    )
    data = [{"query": "what is the colour of the cat ?", "response": "red"}]
    HuggingFaceTrainerForRALT(rag_system, data, config=config).train()
    assert rag_system.query("what is the colour of the cat ?", 1).text == "red"


def test_validation_loss_is_that_of_the_validation_examples(rag_system: RAGSystem) -> None:
    trainer = HuggingFaceTrainerForRALT(rag_system, config=RALTConfig(learning_rate=1e-2, batch_size=4, top_k=2))
    assert len(trainer.validation_examples) == 4
    before = trainer.validate()["loss"]
    result = trainer.train()
    assert result.metrics["validation"]["loss"] == pytest.approx(trainer.validate()["loss"], abs=1e-5)
    assert trainer.validate()["loss"] != before


def _train(write_config: Callable[..., Path], folder: str, **settings: Any) -> dict[str, torch.Tensor]:
    rag_system = build_rag_system(load_config(write_config(folder)))
    trainer = HuggingFaceTrainerForRALT(rag_system, config=RALTConfig(learning_rate=1e-2, validation=NEVER, **settings))
    trainer.train()
    return trainer.trained_weights()


def test_accumulated_batches_equal_one_large_batch(write_config: Callable[..., Path]) -> None:
    """Answers differ in length, so the mean must be over the tokens of the whole step and not over batches."""
    large = _train(write_config, "large", batch_size=8, optimizer="sgd")
    small = _train(write_config, "small", batch_size=1, gradient_accumulation_steps=8, optimizer="sgd")
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    assert max(tensor.abs().max().item() for name, tensor in large.items() if "lora_B" in name) > 1e-4


def test_weighted_loss_by_hand() -> None:
    """Two answers of two tokens and of one; probabilities 1/2, 1/4 and 1/8, weights 1.5 and 0.5."""
    logits = torch.full((2, 3, 2), 0.0)
    for row, column, probability in ((0, 0, 1 / 2), (0, 1, 1 / 4), (1, 1, 1 / 8)):
        logits[row, column] = torch.tensor([probability, 1 - probability]).log()
    labels = torch.tensor([[-100, 0, 0], [-100, -100, 0]])
    outputs, weights = SimpleNamespace(logits=logits), torch.tensor([1.5, 0.5])
    log2 = math.log(2)
    assert answer_loss(outputs, labels).item() == pytest.approx((1 + 2 + 3) * log2 / 3)
    assert answer_loss(outputs, labels, None, weights).item() == pytest.approx((1.5 * (1 + 2) + 0.5 * 3) * log2 / 3)
    # Normalised by the tokens of the whole optimizer step.
    assert answer_loss(outputs, labels, 12, weights).item() == pytest.approx(6 * log2 / 12)
    assert answer_loss(outputs, labels, 12, torch.ones(2)).item() == pytest.approx(answer_loss(outputs, labels, 12))


def test_instances_are_weighted_by_the_retriever(rag_system: RAGSystem) -> None:
    """The weights are top_k times the retriever's probabilities, and the reported loss is the weighted one."""
    generator = rag_system.require_generator()
    config = RALTConfig(
        top_k=3,
        passage_weights="retriever",
        retriever_temperature=0.005,
        batch_size=64,
        max_steps=1,
        learning_rate=1e-3,
        validation=NEVER,
    )
    trainer = HuggingFaceTrainerForRALT(rag_system, config=config)
    instances = trainer.instances(trainer.train_examples)
    expected = []
    for example in trainer.train_examples:
        scores = [scored.score for scored in rag_system.retrieve(example.query, 3)]
        exponentials = [math.exp((score - scores[0]) / 0.005) for score in scores]
        expected += [3 * value / sum(exponentials) for value in exponentials]
    assert [item.weight for item in instances] == pytest.approx(expected, rel=1e-4)
    assert sum(expected) == pytest.approx(len(expected))
    assert max(expected) > 1.1
    totals = generator.log_probs_of_ids([(item.prompt, item.answer) for item in instances]).tolist()
    tokens = sum(len(item.answer) for item in instances)
    weighted = -sum(weight * total for weight, total in zip(expected, totals, strict=True)) / tokens
    assert weighted != pytest.approx(-sum(totals) / tokens, rel=1e-4)
    assert trainer.train().loss == pytest.approx(weighted, rel=1e-4)


def test_the_validation_loss_is_weighted_like_that_of_training(rag_system: RAGSystem) -> None:
    config = RALTConfig(top_k=3, passage_weights="retriever", retriever_temperature=0.0005)
    trainer = HuggingFaceTrainerForRALT(rag_system, config=config)
    instances = trainer.instances(trainer.validation_examples)
    pairs = [(item.prompt, item.answer) for item in instances]
    totals = rag_system.require_generator().log_probs_of_ids(pairs).tolist()
    tokens = sum(len(item.answer) for item in instances)
    weighted = -sum(item.weight * total for item, total in zip(instances, totals, strict=True)) / tokens
    assert weighted != pytest.approx(-sum(totals) / tokens, rel=1e-4)
    assert trainer.validate()["loss"] == pytest.approx(weighted, rel=1e-5)


def test_weighted_accumulated_batches_equal_one_large_batch(write_config: Callable[..., Path]) -> None:
    settings: dict[str, Any] = {"optimizer": "sgd", "passage_weights": "retriever"}
    large = _train(write_config, "large", batch_size=8, **settings)
    small = _train(write_config, "small", batch_size=1, gradient_accumulation_steps=8, **settings)
    uniform = _train(write_config, "uniform", batch_size=8, optimizer="sgd")
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    assert max(float((large[name] - uniform[name]).abs().max()) for name in large) > 1e-5


def test_a_model_without_gradient_is_named(rag_system: RAGSystem) -> None:
    trainer = HuggingFaceTrainerForRALT(rag_system, config=RALTConfig(lora=None))
    rag_system.require_generator().model.requires_grad_(False)
    with pytest.raises(TrainingError, match="The generator is frozen"):
        trainer.train()


def test_a_loss_that_is_not_finite_is_named(rag_system: RAGSystem) -> None:
    trainer = HuggingFaceTrainerForRALT(rag_system, config=RALTConfig(batch_size=4, validation=NEVER))
    with torch.no_grad():
        rag_system.require_generator().model.get_output_embeddings().weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="not finite at step 1"):
        trainer.train()


def test_mixed_precision_ends_with_training(rag_system: RAGSystem) -> None:
    generator = rag_system.require_generator()
    settings = RALTConfig(lora=None, precision="bfloat16", learning_rate=1e-3, batch_size=4, validation=NEVER)
    HuggingFaceTrainerForRALT(rag_system, config=settings).train()
    score = generator.target_log_probs(["the cat is"], [" red"])
    fresh = type(generator)(generator.model, generator.tokenizer, generator.config)
    vars(fresh.model).pop("forward", None)
    assert torch.equal(fresh.target_log_probs(["the cat is"], [" red"]), score)
