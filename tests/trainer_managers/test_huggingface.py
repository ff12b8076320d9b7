"""The manager: modes, alternation, validation metrics, and the Python API as DESIGN prints it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from fedrag_cli import build_rag_system, load_config
from fedrag_cli.config import Config
from fedrag_cli.errors import ConfigError, DataError
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.trainer_managers.build import build_manager
from fedrag_cli.trainer_managers.huggingface import HuggingFaceRAGTrainerManager
from fedrag_cli.trainers.base import TrainResult
from fedrag_cli.trainers.config import LSRConfig, RALTConfig, ValidationConfig
from fedrag_cli.trainers.huggingface import HuggingFaceTrainerForLSR, HuggingFaceTrainerForRALT
from fedrag_cli.trainers.huggingface.base import HuggingFaceTrainer

NEVER = ValidationConfig(every="never")


def _system(write_config: Callable[..., Path], *overrides: str) -> RAGSystem:
    return build_rag_system(load_config(write_config(), overrides))


def test_the_python_api_runs_as_printed(write_config: Callable[..., Path]) -> None:
    rag_system = build_rag_system(load_config(write_config()))
    train_dataset = Dataset.from_dict(
        {"query": ["what is the colour of the cat ?", "where is the dog ?"], "response": ["red", "blue"]}
    )
    retriever_trainer = HuggingFaceTrainerForLSR(rag_system, train_dataset=train_dataset)
    generator_trainer = HuggingFaceTrainerForRALT(rag_system, train_dataset=train_dataset)
    manager = HuggingFaceRAGTrainerManager(
        mode="retriever", retriever_trainer=retriever_trainer, generator_trainer=generator_trainer
    )
    encoder = rag_system.retriever.query_fingerprint()
    generator = rag_system.require_generator().fingerprint()
    result = manager.train()
    assert result.loss > 0
    assert result.steps == 2
    assert result.metrics["scored_pairs"] >= 8
    assert rag_system.retriever.query_fingerprint() != encoder
    assert rag_system.require_generator().fingerprint() == generator
    manager.mode = "generator"
    assert manager.train().loss > 0
    assert rag_system.require_generator().fingerprint() != generator


def test_trainers_take_data_and_settings_from_the_config(write_config: Callable[..., Path]) -> None:
    rag_system = _system(write_config)
    trainer = HuggingFaceTrainerForLSR(rag_system)
    assert (len(trainer.train_examples), len(trainer.validation_examples)) == (14, 4)
    assert (trainer.config.top_k, trainer.config.learning_rate, trainer.seed) == (4, 1e-3, 42)


def test_a_mode_needs_its_trainer(write_config: Callable[..., Path]) -> None:
    trainer = HuggingFaceTrainerForLSR(_system(write_config))
    with pytest.raises(ConfigError, match="The mode 'alternating' needs a generator_trainer"):
        HuggingFaceRAGTrainerManager("alternating", retriever_trainer=trainer)
    manager = HuggingFaceRAGTrainerManager("retriever", retriever_trainer=trainer)
    with pytest.raises(ConfigError, match="There is no mode 'both'"):
        manager.mode = "both"  # type: ignore[assignment]
    assert manager.mode == "retriever"


def _manager(config: Config, rag_system: RAGSystem) -> HuggingFaceRAGTrainerManager:
    from fedrag_cli.commands.run_data import load_run_data

    data = load_run_data(config)
    return build_manager(config, rag_system, train=data.train, validation=data.validation)


def test_alternating_uses_the_other_sides_newest_weights(write_config: Callable[..., Path]) -> None:
    """Each phase starts with the fingerprints that the phase before it ended with."""
    never = [f"trainer.{side}.validation.every=never" for side in ("retriever", "generator")]
    rag_system = _system(write_config, "trainer.mode=alternating", "trainer.cycles=2", *never)
    assert rag_system.config is not None
    manager = _manager(rag_system.config, rag_system)
    seen: list[tuple[str, str, str]] = []

    def watch(trainer: HuggingFaceTrainer) -> None:
        prepare = trainer._prepare

        def recording(*arguments: Any) -> Any:
            state = (rag_system.retriever.query_fingerprint(), rag_system.require_generator().fingerprint())
            seen.append((trainer.side, *state))
            return prepare(*arguments)

        trainer._prepare = recording  # type: ignore[method-assign]

    for trainer in manager.trainers.values():
        assert trainer is not None
        watch(trainer)
    result = manager.train()
    assert [side for side, _, _ in seen] == ["retriever", "generator", "retriever", "generator"]
    assert set(result.metrics) == {"1-retriever", "2-generator", "3-retriever", "4-generator"}
    for earlier, later in itertools.pairwise(seen):
        changed = 1 if earlier[0] == "retriever" else 2
        assert later[changed] != earlier[changed]
        assert later[3 - changed] == earlier[3 - changed]
    assert result.steps == sum([8, 7, 8, 7])


def test_likelihoods_follow_the_tuned_generator(write_config: Callable[..., Path]) -> None:
    rag_system = _system(write_config, "trainer.mode=alternating")
    assert rag_system.config is not None
    manager = _manager(rag_system.config, rag_system)
    trainer = manager.trainers["retriever"]
    assert isinstance(trainer, HuggingFaceTrainerForLSR)
    pair = [(trainer.train_examples[0], [rag_system.knowledge_store.nodes[0]])]
    old, loss = trainer._scoring().score(pair)[0], trainer.validate()["loss"]
    manager.train()
    assert not torch.equal(trainer._scoring().score(pair)[0], old)
    assert trainer.validate()["loss"] != loss


@pytest.mark.parametrize(("side", "metric"), [("retriever", "mrr"), ("retriever", "recall@1"), ("generator", "f1")])
def test_validation_by_a_metric_of_the_whole_system(write_config: Callable[..., Path], side: str, metric: str) -> None:
    rag_system = _system(write_config, f"trainer.mode={side}", f"trainer.{side}.validation.metric={metric}")
    assert rag_system.config is not None
    manager = _manager(rag_system.config, rag_system)
    result: TrainResult = manager.train()
    trainer = manager.trainers[side]
    assert trainer is not None
    assert set(result.metrics["validation"]) == {"loss", metric}
    assert trainer.validate()[metric] == pytest.approx(result.metrics["validation"][metric], abs=1e-9)


def test_a_ranking_metric_needs_judged_validation_examples(write_config: Callable[..., Path]) -> None:
    rag_system = _system(write_config)
    config = LSRConfig(top_k=4, validation=ValidationConfig(metric="mrr"))
    data = [{"query": "what ?", "response": "red"}]
    trainer = HuggingFaceTrainerForLSR(rag_system, data, data, config)
    with pytest.raises(DataError, match="The validation metric 'mrr' needs relevant ids"):
        HuggingFaceRAGTrainerManager("retriever", trainer)


def test_the_loss_of_alternating_training_is_the_mean_over_the_steps_of_all_phases(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three phases of 1, 4 and 3 steps with the losses 8, 2 and 4: (8 + 8 + 12) / 8."""
    given = iter([TrainResult(8.0, 1), TrainResult(2.0, 4), TrainResult(4.0, 3), TrainResult(0.0, 0)])
    monkeypatch.setattr(HuggingFaceTrainer, "train", lambda self, **_: next(given))
    rag_system = _system(write_config)
    trainers = HuggingFaceTrainerForLSR(rag_system), HuggingFaceTrainerForRALT(rag_system)
    result = HuggingFaceRAGTrainerManager("alternating", *trainers, cycles=2).train()
    assert (result.loss, result.steps) == (28 / 8, 8)
    losses = {phase: (part["loss"], part["steps"]) for phase, part in result.metrics.items()}
    names = ("1-retriever", "2-generator", "3-retriever", "4-generator")
    assert losses == dict(zip(names, [(8.0, 1), (2.0, 4), (4.0, 3), (0.0, 0)], strict=True))


def test_a_finished_phase_is_not_run_again(write_config: Callable[..., Path], tmp_path: Path) -> None:
    def manage() -> HuggingFaceRAGTrainerManager:
        rag_system = _system(write_config)
        settings = RALTConfig(learning_rate=1e-2, batch_size=4, validation=NEVER)
        return HuggingFaceRAGTrainerManager("generator", None, HuggingFaceTrainerForRALT(rag_system, config=settings))

    first = manage()
    result = first.train(tmp_path / "checkpoints")
    again = manage()
    trainer, other = first.trainers["generator"], again.trainers["generator"]
    assert trainer is not None
    assert other is not None
    other.train = None  # type: ignore[assignment, method-assign]
    assert again.train(tmp_path / "checkpoints") == result
    weights = other.trained_weights()
    assert all(torch.equal(weights[name], tensor) for name, tensor in trainer.trained_weights().items())
