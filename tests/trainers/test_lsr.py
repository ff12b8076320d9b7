"""LSR on tiny models: what moves, what does not, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedrag_cli.config import load_config
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import DataError, TrainingError
from fedrag_cli.losses import lsr_loss
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.system import RAGSystem, refresh_store
from fedrag_cli.trainers.config import LSRConfig, ValidationConfig
from fedrag_cli.trainers.huggingface import HuggingFaceTrainerForLSR
from fedrag_cli.trainers.huggingface.base import HuggingFaceTrainer

NEVER = ValidationConfig(every="never")
QUICK: dict[str, Any] = {"top_k": 4, "batch_size": 4, "learning_rate": 1e-3}


@pytest.fixture
def rag_system(write_config: Callable[..., Path]) -> RAGSystem:
    return build_rag_system(load_config(write_config()))


def _copy(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _same(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_training_queries_moves_the_query_encoder_and_nothing_else(rag_system: RAGSystem) -> None:
    assert rag_system.generator is not None
    trainer = HuggingFaceTrainerForLSR(rag_system, config=LSRConfig(max_steps=1, **QUICK))
    retriever, store = rag_system.retriever, rag_system.knowledge_store
    assert retriever.query_encoder is not retriever.passage_encoder
    query, passage = _copy(retriever.query_encoder), _copy(retriever.passage_encoder)
    embeddings, generator = store.embeddings.clone(), _copy(rag_system.generator.model)
    result = trainer.train()
    assert result.steps == 1
    moved = [
        name for name, tensor in retriever.query_encoder.state_dict().items() if not torch.equal(tensor, query[name])
    ]
    # Every weight matrix of the encoder gets a gradient; only unused rows and the pooler may stay.
    assert sum("weight" in name for name in moved) >= 10
    assert _same(retriever.passage_encoder, passage)
    assert torch.equal(store.embeddings, embeddings)
    assert _same(rag_system.generator.model, generator)
    assert all(parameter.grad is None for parameter in rag_system.generator.model.parameters())
    assert not retriever.query_encoder.training
    assert not rag_system.generator.model.training


def test_each_query_of_a_step_is_encoded_once(rag_system: RAGSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passages are retrieved by the very embeddings that carry the gradient."""
    config = LSRConfig(epochs=2, validation=ValidationConfig(every="never"), **{**QUICK, "batch_size": 7})
    trainer = HuggingFaceTrainerForLSR(rag_system, config=config)
    embedded: list[tuple[bool, torch.Tensor]] = []
    searched: list[torch.Tensor] = []
    embed, search = rag_system.retriever.embed, rag_system.knowledge_store.search_positions

    def noted(encoder: Any, features: dict[str, Any]) -> torch.Tensor:
        found = embed(encoder, features)
        embedded.append((encoder is rag_system.retriever.query_encoder, found))
        return found

    def searching(queries: torch.Tensor, top_k: int) -> Any:
        searched.append(queries)
        return search(queries, top_k)

    monkeypatch.setattr(rag_system.retriever, "embed", noted)
    monkeypatch.setattr(rag_system.knowledge_store, "search_positions", searching)
    assert trainer.train().steps == 4
    # Before the first step all 14 queries are encoded and searched once, for their likelihoods.
    with_gradient = [found for _, found in embedded if found.requires_grad]
    assert [len(found) for found in with_gradient] == [7, 7, 7, 7]
    assert all(of_queries for of_queries, _ in embedded)
    assert sum(len(found) for _, found in embedded) == 14 + 4 * 7
    assert [len(queries) for queries in searched] == [14, 7, 7, 7, 7]
    for queries, found in zip(searched[1:], with_gradient, strict=True):
        assert torch.equal(queries, found)


def test_the_first_loss_is_the_formula_on_likelihoods_computed_apart(rag_system: RAGSystem) -> None:
    """The reported loss equals KL(Q || P) computed here with single forward passes of the language model."""
    generator = rag_system.require_generator()
    config = LSRConfig(top_k=4, batch_size=14, learning_rate=1e-3, max_steps=1)
    trainer = HuggingFaceTrainerForLSR(rag_system, config=config)
    expected = []
    for example in trainer.train_examples:
        found = rag_system.retrieve(example.query, 4)
        scores = torch.tensor([[scored.score for scored in found]])
        likelihoods = []
        for scored in found:
            encoded = generator.prompts.encode_pair(example.query, [scored.node], example.response, with_end=False)
            prompt, target = encoded.ids, encoded.answer
            labels = torch.tensor([[-100] * len(prompt) + target])
            with torch.no_grad():
                likelihoods.append(-generator.model(torch.tensor([prompt + target]), labels=labels).loss.item())
        expected.append(lsr_loss(scores, torch.tensor([likelihoods]), 0.05, 0.1).item())
    assert trainer.train().loss == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_training_both_moves_passages_and_refreshes_the_store(rag_system: RAGSystem) -> None:
    retriever, store = rag_system.retriever, rag_system.knowledge_store
    trainer = HuggingFaceTrainerForLSR(
        rag_system, config=LSRConfig(train="both", max_steps=3, refresh_every=2, **QUICK)
    )
    before, embeddings = retriever.fingerprint(), store.embeddings.clone()
    trainer.train()
    assert retriever.is_shared
    assert retriever.fingerprint() != before
    assert store.encoder_fingerprint == retriever.fingerprint()
    fresh = retriever.encode_passages([node.text for node in store.nodes])
    torch.testing.assert_close(store.embeddings, fresh)
    assert not torch.allclose(embeddings, fresh)
    rag_system.retrieve("what is the colour of the cat ?")


@pytest.mark.parametrize(("every", "expected"), [(2, [2, 4, 6]), (3, [3, 6]), (None, [4])])
def test_the_index_is_refreshed_when_it_is_due_and_searched_as_it_is_then(
    rag_system: RAGSystem, monkeypatch: pytest.MonkeyPatch, every: int | None, expected: list[int]
) -> None:
    """14 examples in batches of 4 make an epoch of 4 steps; after the last of 7 the index follows."""
    store, retriever = rag_system.knowledge_store, rag_system.retriever
    config = LSRConfig(train="both", max_steps=7, refresh_every=every, validation=NEVER, **QUICK)
    trainer = HuggingFaceTrainerForLSR(rag_system, config=config)
    replace, search, on_step = store.replace_embeddings, store.search_positions, trainer._on_step
    steps, refreshed, searched = [0], [], []

    def replacing(embeddings: torch.Tensor) -> None:
        refreshed.append(steps[-1])
        replace(embeddings)

    def searching(queries: torch.Tensor, top_k: int) -> Any:
        searched.append((steps[-1], store.embeddings.clone()))
        return search(queries, top_k)

    def stepped(step: int, last: bool) -> None:
        steps.append(step)
        on_step(step, last)
        if step in expected:
            fresh = retriever.encode_passages([node.text for node in store.nodes])
            torch.testing.assert_close(store.embeddings, fresh)

    monkeypatch.setattr(store, "replace_embeddings", replacing)
    monkeypatch.setattr(store, "search_positions", searching)
    monkeypatch.setattr(trainer, "_on_step", stepped)
    trainer.train()
    assert refreshed == [*expected, 7]
    # What steps search is the index of the newest refresh.
    for (step, before), (_, after) in itertools.pairwise(searched):
        assert torch.equal(before, after) is (step + 1 not in expected), step


def test_validation_searches_passages_as_they_are_encoded_now(rag_system: RAGSystem) -> None:
    trainer = HuggingFaceTrainerForLSR(rag_system, config=LSRConfig(train="both", **QUICK))
    stale = trainer.validate()["loss"]
    with torch.no_grad():
        for parameter in rag_system.retriever.passage_encoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    found = trainer.validate()["loss"]
    refresh_store(rag_system)
    assert found == pytest.approx(trainer.validate()["loss"], rel=1e-5)
    assert found != pytest.approx(stale, rel=1e-3)


def test_scores_are_computed_in_float32_under_mixed_precision(
    rag_system: RAGSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 has three digits, too few for cosines that are divided by a temperature of .05."""
    given: list[torch.Tensor] = []

    def noted(scores: torch.Tensor, *arguments: Any, **settings: Any) -> torch.Tensor:
        given.append(scores.detach().clone())
        return lsr_loss(scores, *arguments, **settings)

    monkeypatch.setattr("fedrag_cli.trainers.huggingface.lm_supervision.lsr_loss", noted)
    config = LSRConfig(precision="bfloat16", max_steps=1, validation=NEVER, **QUICK)
    HuggingFaceTrainerForLSR(rag_system, config=config).train()
    assert given[0].dtype == torch.float32
    assert not torch.equal(given[0], given[0].bfloat16().float())


def test_training_both_gives_gradient_to_separate_passage_encoders(rag_system: RAGSystem) -> None:
    retriever = rag_system.retriever
    retriever.separate_encoders()
    passage = _copy(retriever.passage_encoder)
    HuggingFaceTrainerForLSR(rag_system, config=LSRConfig(train="both", max_steps=1, **QUICK)).train()
    assert not _same(retriever.passage_encoder, passage)


def test_the_helpful_passage_ranks_first_after_training(rag_system: RAGSystem) -> None:
    """Three passages, and a language model whose preference is fixed: the retriever learns that preference."""
    store, retriever = rag_system.knowledge_store, rag_system.retriever
    generator = rag_system.require_generator()
    texts = ["the red cat", "the blue owl", "the green fox"]
    store.clear()
    nodes = [KnowledgeNode(str(number), text) for number, text in enumerate(texts)]
    store.add(nodes, retriever.encode_passages(texts))
    store.encoder_fingerprint = retriever.fingerprint()
    encoded = [generator.prompts.encode_pair("which ?", [node], "blue", with_end=False) for node in nodes]
    pairs = [(item.ids, item.answer) for item in encoded]
    preferred = str(int(generator.log_probs_of_ids(pairs).argmax()))
    last = [node.node.id for node in rag_system.retrieve("which ?", 3)][-1]
    config = LSRConfig(top_k=3, batch_size=1, learning_rate=3e-3, epochs=40, validation=ValidationConfig(every="never"))
    HuggingFaceTrainerForLSR(rag_system, [{"query": "which ?", "response": "blue"}], config=config).train()
    ranking = [node.node.id for node in rag_system.retrieve("which ?", 3)]
    assert ranking[0] == preferred
    assert last in ranking


def test_likelihoods_are_computed_once(rag_system: RAGSystem) -> None:
    generator = rag_system.require_generator()
    calls: list[int] = []
    generator.model.register_forward_hook(lambda *_: calls.append(1))
    config = LSRConfig(
        top_k=24, batch_size=14, learning_rate=1e-3, epochs=3, validation=ValidationConfig(every="never")
    )
    trainer = HuggingFaceTrainerForLSR(rag_system, config=config)
    result = trainer.train()
    # All 24 passages are candidates, so each pair is scored in the first pass and never again.
    assert result.metrics["scored_pairs"] == 14 * 24
    scored = len(calls)
    trainer._scoring().score([(trainer.train_examples[0], [rag_system.knowledge_store.nodes[0]])])
    assert len(calls) == scored


def test_a_frozen_encoder_is_named(rag_system: RAGSystem) -> None:
    trainer = HuggingFaceTrainerForLSR(rag_system, config=LSRConfig(**QUICK))
    rag_system.retriever.query_encoder.requires_grad_(False)
    with pytest.raises(TrainingError, match="The retriever is frozen: none of its 39 parameters takes a gradient"):
        trainer.train()


def test_a_learning_rate_of_zero_is_named(rag_system: RAGSystem) -> None:
    trainer = HuggingFaceTrainerForLSR(rag_system, config=LSRConfig(top_k=4, learning_rate=0.0))
    with pytest.raises(TrainingError, match="learning rate is 0"):
        trainer.train()


def test_a_learning_rate_that_rounds_away_is_named(rag_system: RAGSystem) -> None:
    trainer = HuggingFaceTrainerForLSR(
        rag_system,
        config=LSRConfig(top_k=4, batch_size=4, learning_rate=1e-60, validation=ValidationConfig(every="never")),
    )
    with pytest.raises(
        TrainingError, match="did not move the retriever: every step was smaller than the weights' rounding"
    ):
        trainer.train()


def test_flat_targets_are_named(rag_system: RAGSystem) -> None:
    """Where the language model ignores the passage, its likelihoods teach nothing."""
    generator = rag_system.require_generator()
    with torch.no_grad():
        generator.model.get_output_embeddings().weight.zero_()
    trainer = HuggingFaceTrainerForLSR(rag_system, config=LSRConfig(**QUICK))
    with pytest.raises(TrainingError, match="targets are flat"):
        trainer.train()


def test_weights_that_are_not_finite_are_named(rag_system: RAGSystem) -> None:
    trainer = HuggingFaceTrainerForLSR(rag_system, config=LSRConfig(**QUICK))
    rag_system.retriever.query_encoder.requires_grad_(True)
    with torch.no_grad():
        rag_system.require_generator().model.get_output_embeddings().weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="The generator's likelihoods are not finite"):
        trainer.train()


def test_examples_without_response_are_refused(rag_system: RAGSystem) -> None:
    with pytest.raises(DataError, match="response"):
        HuggingFaceTrainerForLSR(rag_system, [{"query": "what ?"}])


def _train(write_config: Callable[..., Path], folder: str, **settings: Any) -> dict[str, torch.Tensor]:
    rag_system = build_rag_system(load_config(write_config(folder)))
    trainer = HuggingFaceTrainerForLSR(
        rag_system,
        config=LSRConfig(top_k=4, validation=ValidationConfig(every="never"), **{"learning_rate": 1e-3, **settings}),
    )
    trainer.train()
    return trainer.trained_weights()


def test_accumulated_batches_equal_one_large_batch(write_config: Callable[..., Path]) -> None:
    """With plain SGD, because Adam's first steps divide rounding errors by themselves."""
    start = HuggingFaceTrainerForLSR(build_rag_system(load_config(write_config("start")))).trained_weights()
    large = _train(write_config, "large", batch_size=8, epochs=2, optimizer="sgd", learning_rate=1e-2)
    small = _train(
        write_config,
        "small",
        batch_size=1,
        gradient_accumulation_steps=8,
        epochs=2,
        optimizer="sgd",
        learning_rate=1e-2,
    )
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    assert max((large[name] - start[name]).abs().max().item() for name in large) > 1e-4


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(write_config: Callable[..., Path]) -> None:
    first = _train(write_config, "one", batch_size=4)
    second = _train(write_config, "two", batch_size=4)
    assert all(torch.equal(first[name], second[name]) for name in first)
    rag_system = build_rag_system(load_config(write_config("three")))
    other = HuggingFaceTrainerForLSR(
        rag_system,
        config=LSRConfig(batch_size=4, top_k=4, learning_rate=1e-3, validation=ValidationConfig(every="never")),
        seed=7,
    )
    other.train()
    assert any(not torch.equal(first[name], tensor) for name, tensor in other.trained_weights().items())


def test_the_proximal_term_holds_the_weights_back(rag_system: RAGSystem) -> None:
    trainer = HuggingFaceTrainerForLSR(rag_system, config=LSRConfig(epochs=4, **QUICK))
    start = trainer.trained_weights()

    def distance() -> float:
        return sum((tensor - start[name]).pow(2).sum().item() for name, tensor in trainer.trained_weights().items())

    trainer.train()
    free = distance()
    trainer.load_trained_weights(start)
    trainer.add_proximal_term(10.0)
    trainer.train()
    assert 0 < distance() < 0.5 * free


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_best_weights_are_kept_only_where_that_is_asked_for(rag_system: RAGSystem, keep_best: bool) -> None:
    """The validation loss falls and then rises, whatever the weights are."""
    validation = ValidationConfig(every=1, keep_best=keep_best)
    config = LSRConfig(max_steps=4, validation=validation, **QUICK)
    trainer = HuggingFaceTrainerForLSR(rag_system, config=config)
    seen: list[dict[str, torch.Tensor]] = []
    losses = iter([3.0, 1.0, 2.0, 2.5])

    def validate() -> dict[str, float]:
        seen.append(trainer.trained_weights())
        return {"loss": next(losses)}

    trainer.validate = validate  # type: ignore[method-assign]
    result = trainer.train()
    wanted = seen[1] if keep_best else seen[3]
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in trainer.trained_weights().items())
    assert not all(torch.equal(seen[1][name], seen[3][name]) for name in wanted)
    assert result.metrics["validation"]["loss"] == (1.0 if keep_best else 2.5)
    assert result.metrics["validation_step"] == (2 if keep_best else 4)


@pytest.mark.parametrize(("losses", "steps"), [([2.0, 1.0, 1.0, 1.0, 0.5], 4), ([2.0, 1.0, 1.5, 0.9, 1.0, 1.0], 6)])
def test_a_tie_is_no_gain_for_patience(rag_system: RAGSystem, losses: list[float], steps: int) -> None:
    config = LSRConfig(epochs=10, validation=ValidationConfig(every=1, patience=2), **QUICK)
    trainer = HuggingFaceTrainerForLSR(rag_system, config=config)
    given = iter(losses)
    trainer.validate = lambda: {"loss": next(given)}  # type: ignore[method-assign]
    result = trainer.train()
    assert result.steps == steps
    # Of equally good ones the first is the best.
    assert result.metrics["validation_step"] == losses.index(min(losses[:steps])) + 1


def test_early_stopping_and_the_best_checkpoint(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """With a learning rate that soon destroys the encoder, the best weights are not the last ones."""
    rag_system = build_rag_system(load_config(write_config()))
    config = LSRConfig(
        top_k=4, batch_size=4, learning_rate=5e-2, epochs=10, validation=ValidationConfig(every=2, patience=2)
    )
    trainer = HuggingFaceTrainerForLSR(rag_system, config=config)
    losses: list[float] = []
    validate = trainer.validate

    def watch() -> dict[str, float]:
        metrics = validate()
        losses.append(metrics["loss"])
        return metrics

    trainer.validate = watch  # type: ignore[method-assign]
    result = trainer.train(checkpoints=tmp_path / "checkpoints")
    assert result.steps < 40
    assert len(losses) - 1 - losses.index(min(losses)) == 2
    assert result.metrics["validation"]["loss"] == min(losses)
    assert HuggingFaceTrainer.validate is not None
    assert validate()["loss"] == pytest.approx(min(losses), abs=1e-6)


def test_mixed_precision_scores_passages_in_float32(rag_system: RAGSystem) -> None:
    trainer = HuggingFaceTrainerForLSR(rag_system, config=LSRConfig(top_k=8, validation=NEVER))
    features = rag_system.retriever.features([trainer.train_examples[0].query], queries=True)
    seen: list[torch.Tensor] = []
    loss = trainer._loss
    trainer._loss = lambda scores, lm: (seen.append(scores), loss(scores, lm))[1]  # type: ignore[method-assign]
    with torch.autocast("cpu", torch.bfloat16):
        trainer.losses(features, [0])
    assert seen[0].dtype == torch.float32
    assert not torch.equal(seen[0], seen[0].bfloat16().float())


def test_tied_weights_of_an_encoder_are_saved(rag_system: RAGSystem, tmp_path: Path) -> None:
    rag_system.retriever.separate_encoders()
    encoder = rag_system.retriever.query_encoder
    encoder.register_parameter("tied", next(encoder.parameters()))
    trainer = HuggingFaceTrainerForLSR(rag_system, config=LSRConfig(**QUICK))
    assert trainer.train(checkpoints=tmp_path / "checkpoints").steps == 4
