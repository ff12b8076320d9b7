"""What trainers record beside the loss, and how far they say that they moved the weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedrag_cli.config import load_config
from fedrag_cli.errors import RunInterruptedError
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.runs.interrupt import InterruptFlag
from fedrag_cli.runs.reporter import SilentReporter
from fedrag_cli.trainers.config import ContrastiveConfig, LOOPConfig, LSRConfig, RALTConfig, ValidationConfig
from fedrag_cli.trainers.huggingface import (
    HuggingFaceTrainerForContrastive,
    HuggingFaceTrainerForLOOP,
    HuggingFaceTrainerForLSR,
    HuggingFaceTrainerForRALT,
)
from fedrag_cli.trainers.huggingface.checks import PhaseStart, StepDiagnostics, module_of, movement

NEVER = ValidationConfig(every="never")


class Recorder(SilentReporter):
    """Keeps the events."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def event(self, name: str, **fields: Any) -> None:
        self.events.append({"event": name, **fields})

    def of(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]


@pytest.fixture
def rag_system(write_config: Callable[..., Path]) -> RAGSystem:
    return build_rag_system(load_config(write_config()))


def test_means_over_the_batches_of_a_step() -> None:
    diagnostics = StepDiagnostics()
    diagnostics.add(3, a=1.0, b=2.0)
    diagnostics.add(1, a=5.0)
    assert diagnostics.take() == {"a": 2.0, "b": 2.0}
    assert diagnostics.take() == {}


def _entropy(values: list[float]) -> float:
    top = max(values)
    exponentials = [math.exp(value - top) for value in values]
    return -sum(e / sum(exponentials) * math.log(e / sum(exponentials)) for e in exponentials)


@pytest.mark.parametrize("objective", ["lsr", "loop"])
def test_disagreement_and_entropies_are_those_of_the_batch(rag_system: RAGSystem, objective: str) -> None:
    """All examples in one step of several batches: the record holds the means over all of them."""
    recorder = Recorder()
    settings: dict[str, Any] = {
        "top_k": 3,
        "batch_size": 5,
        "gradient_accumulation_steps": 3,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "lm_temperature": 0.05,
        "validation": NEVER,
    }
    trainer: HuggingFaceTrainerForLSR | HuggingFaceTrainerForLOOP
    if objective == "lsr":
        trainer = HuggingFaceTrainerForLSR(rag_system, config=LSRConfig(**settings), reporter=recorder)
    else:
        trainer = HuggingFaceTrainerForLOOP(rag_system, config=LOOPConfig(**settings), reporter=recorder)
    embeddings = rag_system.retriever.encode_queries([example.query for example in trainer.train_examples])
    scores, positions = rag_system.knowledge_store.search_positions(embeddings, 3)
    lm_scores = trainer._lm_scores(trainer.train_examples, positions)
    lm_scores = lm_scores if objective == "lsr" else -lm_scores
    expected = {
        "lm_disagrees": sum(
            row.index(max(row)) != other.index(max(other))
            for row, other in zip(scores.tolist(), lm_scores.tolist(), strict=True)
        ),
        "retriever_entropy": sum(_entropy([value / 0.05 for value in row]) for row in scores.tolist()),
        "lm_entropy": sum(_entropy([value / 0.05 for value in row]) for row in lm_scores.tolist()),
    }
    trainer.train()
    [step] = recorder.of("train_step")
    for name, total in expected.items():
        assert step[name] == pytest.approx(total / 14, rel=1e-4), name
    assert step["grad_norm"] > 0


def test_the_supervised_share_is_that_of_the_whole_step(rag_system: RAGSystem) -> None:
    recorder = Recorder()
    config = RALTConfig(
        top_k=2, batch_size=10, gradient_accumulation_steps=3, max_steps=1, learning_rate=1e-3, validation=NEVER
    )
    result = HuggingFaceTrainerForRALT(rag_system, config=config, reporter=recorder).train()
    [step] = recorder.of("train_step")
    assert step["supervised_share"] == result.metrics["supervised_tokens"] / result.metrics["total_tokens"]
    assert "lm_entropy" not in step


def test_records_hold_their_own_step_alone(rag_system: RAGSystem) -> None:
    def record(log_every: int) -> dict[int, float]:
        recorder = Recorder()
        config = LSRConfig(top_k=4, batch_size=4, learning_rate=1e-3, log_every=log_every, validation=NEVER)
        system = RAGSystem(
            rag_system.retriever.with_query_encoder(rag_system.retriever.passage_encoder, shared=True),
            rag_system.knowledge_store,
            rag_system.generator,
            config=rag_system.config,
        )
        HuggingFaceTrainerForLSR(system, config=config, reporter=recorder).train()
        return {event["step"]: event["retriever_entropy"] for event in recorder.of("train_step")}

    often, rarely = record(1), record(2)
    assert list(rarely) == [2, 4]
    assert all(rarely[step] == often[step] for step in rarely)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("query_encoder.0.model.encoder.layer.3.attention.self.query.weight", "layer.3"),
        ("query_encoder.0.auto_model.embeddings.LayerNorm.bias", "embeddings"),
        ("query_encoder.2.linear.weight", "linear"),
        ("base_model.model.model.layers.11.self_attn.q_proj.lora_A.default.weight", "layers.11"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("transformer.h.0.attn.c_attn.weight", "h.0"),
        ("lm_head.weight", "lm_head"),
        ("weight", "weight"),
    ],
)
def test_names_of_modules(name: str, module: str) -> None:
    assert module_of(name) == module


def test_distances_by_hand() -> None:
    before = {"layers.0.a": torch.tensor([3.0]), "layers.0.b": torch.tensor([4.0, 0.0]), "head.w": torch.zeros(2)}
    after = {
        "layers.0.a": torch.tensor([9.0]),
        "layers.0.b": torch.tensor([4.0, 8.0]),
        "head.w": torch.tensor([0.0, 2.0]),
    }
    assert movement(before, after) == {
        "layers.0": {"distance": 10.0, "relative": 2.0},
        "head": {"distance": 2.0, "relative": None},
    }


def test_two_encoders_are_told_apart() -> None:
    before = {f"{side}_encoder.0.model.pooler.w": torch.ones(1) for side in ("query", "passage")}
    assert set(movement(before, before)) == {"query pooler", "passage pooler"}


def test_the_distances_are_those_from_the_start_of_the_phase(rag_system: RAGSystem, tmp_path: Path) -> None:
    recorder = Recorder()
    config = ContrastiveConfig(batch_size=4, learning_rate=1e-3, epochs=2, save_every=1, validation=NEVER)
    trainer = HuggingFaceTrainerForContrastive(rag_system, config=config, reporter=recorder)
    start = trainer.trained_weights()
    trainer.train(phase="1-retriever", checkpoints=tmp_path / "whole")
    [event] = recorder.of("moved")
    assert event["phase"] == "1-retriever"
    assert list(event["modules"]) == ["embeddings", "layer.0", "layer.1", "pooler"]
    after = trainer.trained_weights()
    squares = [(after[name] - start[name]).square().sum().item() for name in start if ".layer.0." in name]
    assert event["modules"]["layer.0"]["distance"] == pytest.approx(sum(squares) ** 0.5, rel=1e-5)
    assert not (tmp_path / "whole" / "start.safetensors").exists()
    # A run that is taken up again in another process has the start weights until the checkpoint is loaded.
    trainer.load_trained_weights(start)
    trainer.train(phase="1-retriever", checkpoints=tmp_path / "whole")
    assert recorder.of("moved")[1] == event


def watched_flag(monkeypatch: pytest.MonkeyPatch) -> InterruptFlag:
    """Let training look for interruptions at this flag alone."""
    flag = InterruptFlag()

    @contextlib.contextmanager
    def flagged() -> Iterator[InterruptFlag]:
        yield flag

    monkeypatch.setattr("fedrag_cli.trainers.huggingface.base.deferred_interrupts", flagged)
    return flag


def test_training_that_goes_on_in_the_same_process_measures_from_the_start(
    rag_system: RAGSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    config = ContrastiveConfig(batch_size=4, learning_rate=1e-3, epochs=2, validation=NEVER)
    trainer = HuggingFaceTrainerForContrastive(rag_system, config=config, reporter=recorder)
    start = trainer.trained_weights()

    flag = watched_flag(monkeypatch)
    trainer._on_step = lambda step, last: setattr(flag, "requested", step == 3)  # type: ignore[method-assign, assignment]
    with pytest.raises(RunInterruptedError):
        trainer.train(checkpoints=tmp_path / "checkpoints")
    assert recorder.of("moved") == []
    flag.requested = False
    trainer.train(checkpoints=tmp_path / "checkpoints")
    [event] = recorder.of("moved")
    now = trainer.trained_weights()
    assert event["modules"] == movement(start, now)


@pytest.mark.parametrize("lasting", [True, False])
def test_an_interrupted_training_says_whether_a_checkpoint_is_saved(
    rag_system: RAGSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasting: bool
) -> None:
    watched_flag(monkeypatch).requested = True
    config = ContrastiveConfig(batch_size=4, learning_rate=1e-3, epochs=2, validation=NEVER)
    trainer = HuggingFaceTrainerForContrastive(rag_system, config=config)
    folder = tmp_path / "checkpoints" if lasting else None
    with pytest.raises(RunInterruptedError) as caught:
        trainer.train(checkpoints=folder)
    assert ("a checkpoint is saved" in caught.value.message) is lasting
    assert len(list(tmp_path.rglob("checkpoint-1/complete.json"))) == int(lasting)


def test_without_the_first_weights_nothing_is_said(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    PhaseStart(model, tmp_path)
    with torch.no_grad():
        model.weight.add_(1.0)
    assert PhaseStart(model, tmp_path).movement(model) == {}
