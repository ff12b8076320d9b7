"""RAFT on tiny models: what is in the prompts, and that it trains like RALT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import data_rows, write_rows

from fedrag_cli.config import load_config
from fedrag_cli.data.examples import Example
from fedrag_cli.errors import DataError
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.trainers.config import RAFTConfig, ValidationConfig
from fedrag_cli.trainers.huggingface import HuggingFaceTrainerForRAFT

NEVER = ValidationConfig(every="never")
QUERY = "what is the colour of the cat ?"


@pytest.fixture
def rag_system(write_config: Callable[..., Path]) -> RAGSystem:
    return build_rag_system(load_config(write_config()))


def _trainer(rag_system: RAGSystem, seed: int | None = None, **settings: Any) -> HuggingFaceTrainerForRAFT:
    config = RAFTConfig(**{"top_k": 4, "learning_rate": 1e-2, "validation": NEVER, **settings})
    return HuggingFaceTrainerForRAFT(rag_system, config=config, seed=seed)


def _many(count: int = 400) -> list[Example]:
    return [Example(str(number), QUERY, ("red",), ("colour-cat",)) for number in range(count)]


def test_the_gold_passage_is_in_its_share_of_the_prompts(rag_system: RAGSystem) -> None:
    contexts = _trainer(rag_system, gold_share=0.8).contexts(_many())
    with_gold = [context for context in contexts if "colour-cat" in {node.id for node in context.nodes}]
    # Four standard deviations of a share of 0.8 among 400.
    assert abs(len(with_gold) / 400 - 0.8) < 0.08
    assert {len(context.nodes) for context in contexts} == {4}
    places = {[node.id for node in context.nodes].index("colour-cat") for context in with_gold}
    assert places == {0, 1, 2, 3}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_distractors_are_the_best_passages_that_are_not_relevant(rag_system: RAGSystem, share: float) -> None:
    example = Example("1", QUERY, ("red",), ("colour-cat", "home-cat"))
    [context] = _trainer(rag_system, gold_share=share).contexts([example])
    ranking = [scored.node.id for scored in rag_system.retrieve(QUERY, 24)]
    others = [node_id for node_id in ranking if node_id not in example.relevant_ids]
    expected = {"colour-cat", "home-cat", *others[:2]} if share else set(others[:4])
    assert {node.id for node in context.nodes} == expected


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_what_answers_the_question_is_no_distractor(write_config: Callable[..., Path], share: float) -> None:
    """Neither a twin of the relevant passage, nor what is relevant to the same question in another row."""
    config = write_config()
    copy = {"id": "again-cat", "text": "The colour of  the cat is red .", "title": "copy"}
    write_rows(config.parent / "corpus.jsonl", [*data_rows()["corpus"], copy])
    examples = [
        Example("1", QUERY, ("red",), ("again-cat", "colour-cat")),
        Example("2", QUERY.upper().replace(" ?", "?"), ("red",), ("home-cat",)),
    ]
    trainer = HuggingFaceTrainerForRAFT(
        build_rag_system(load_config(config)), examples, [], RAFTConfig(top_k=25, gold_share=share)
    )
    others = {node.id for node in trainer.rag_system.knowledge_store.nodes} - {"again-cat", "colour-cat", "home-cat"}
    first, second = ([node.id for node in context.nodes] for context in trainer.contexts(examples))
    assert sorted(first) == sorted([*others, *(["again-cat"] if share else [])])
    assert sorted(second) == sorted([*others, *(["home-cat"] if share else [])])


def test_more_gold_than_room_and_a_small_store(rag_system: RAGSystem) -> None:
    example = Example("1", QUERY, ("red",), ("colour-cat", "home-cat", "home-dog"))
    [context] = _trainer(rag_system, gold_share=1.0, top_k=2).contexts([example])
    assert {node.id for node in context.nodes} == {"colour-cat", "home-cat"}
    [rest] = _trainer(rag_system, gold_share=0.0, top_k=24).contexts([example])
    assert len(rest.nodes) == 21


def test_prompts_follow_from_the_seed_and_the_example_alone(rag_system: RAGSystem) -> None:
    examples = _many(60)
    trainer = _trainer(rag_system)

    def shown(other: HuggingFaceTrainerForRAFT, some: list[Example]) -> list[list[str]]:
        return [[node.id for node in context.nodes] for context in other.contexts(some)]

    expected = shown(trainer, examples)
    assert shown(trainer, examples[::-1]) == expected[::-1]
    assert shown(_trainer(rag_system), examples) == expected
    assert shown(_trainer(rag_system, seed=7), examples) != expected
    trainer.seed += 1
    assert shown(trainer, examples) == expected


def test_examples_without_relevant_ids_are_left_out_and_counted(rag_system: RAGSystem) -> None:
    bare = Example("bare", "where ?", ("red",))
    config = RAFTConfig(top_k=2, batch_size=2, learning_rate=1e-2)
    result = HuggingFaceTrainerForRAFT(rag_system, [*_many(2), bare], [], config).train()
    assert result.metrics["without_relevant_ids"] == 1
    assert result.metrics["prompts"]["prompts"] == 2
    with pytest.raises(DataError, match="None of the 1 examples of the training data has relevant ids"):
        HuggingFaceTrainerForRAFT(rag_system, [bare], [], config)


def test_the_reported_loss_is_the_mean_over_answer_tokens(rag_system: RAGSystem) -> None:
    generator = rag_system.require_generator()
    trainer = _trainer(rag_system, batch_size=14, max_steps=1)
    instances = trainer.instances(trainer.train_examples)
    assert len(instances) == 14
    total, tokens = 0.0, 0
    for item in instances:
        labels = torch.tensor([[-100] * len(item.prompt) + item.answer])
        with torch.no_grad():
            loss = generator.model(torch.tensor([item.prompt + item.answer]), labels=labels).loss.item()
        total, tokens = total + loss * len(item.answer), tokens + len(item.answer)
    assert trainer.train().loss == pytest.approx(total / tokens, rel=1e-4)


def test_it_moves_the_adapters_and_validates_on_the_same_prompts(rag_system: RAGSystem) -> None:
    trainer = _trainer(rag_system, batch_size=4, validation=ValidationConfig())
    retriever, before = rag_system.retriever.fingerprint(), trainer.trained_weights()
    first = trainer.validate()["loss"]
    result = trainer.train()
    assert trainer.validate()["loss"] == pytest.approx(result.metrics["validation"]["loss"], abs=1e-5)
    assert trainer.validate()["loss"] != first
    assert rag_system.retriever.fingerprint() == retriever
    assert all(not torch.equal(tensor, before[name]) for name, tensor in trainer.trained_weights().items())


def test_accumulated_batches_equal_one_large_batch(write_config: Callable[..., Path]) -> None:
    def run(folder: str, **settings: Any) -> dict[str, torch.Tensor]:
        trainer = _trainer(build_rag_system(load_config(write_config(folder))), optimizer="sgd", **settings)
        trainer.train()
        return trainer.trained_weights()

    large = run("large", batch_size=8)
    small = run("small", batch_size=1, gradient_accumulation_steps=8)
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
