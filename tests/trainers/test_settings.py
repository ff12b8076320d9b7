"""Settings that both trainers share: each one changes what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fedrag_cli.config import load_config
from fedrag_cli.errors import ModelError, TrainingError
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.trainers.config import LSRConfig, RALTConfig, ValidationConfig
from fedrag_cli.trainers.huggingface import HuggingFaceTrainerForLSR, HuggingFaceTrainerForRALT
from fedrag_cli.trainers.huggingface.base import HuggingFaceTrainer, training_arguments
from fedrag_cli.trainers.huggingface.training_loop import TrainingLoop

NEVER = ValidationConfig(every="never")
Weights = dict[str, torch.Tensor]


def _train(write_config: Callable[..., Path], folder: str, side: str, **settings: Any) -> tuple[Weights, Weights]:
    """Train one side with settings, and return its weights before and after."""
    rag_system = build_rag_system(load_config(write_config(folder)))
    trainer: HuggingFaceTrainer
    if side == "retriever":
        defaults = {
            "top_k": 4,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "max_steps": 2,
            "optimizer": "sgd",
            "validation": NEVER,
        }
        trainer = HuggingFaceTrainerForLSR(rag_system, config=LSRConfig(**{**defaults, **settings}))
    else:
        defaults = {
            "top_k": 2,
            "batch_size": 4,
            "learning_rate": 1e-1,
            "max_steps": 2,
            "optimizer": "sgd",
            "validation": NEVER,
        }
        trainer = HuggingFaceTrainerForRALT(rag_system, config=RALTConfig(**{**defaults, **settings}))
    before = trainer.trained_weights()
    trainer.train()
    return before, trainer.trained_weights()


def _distance(one: Weights, other: Weights) -> float:
    return sum((other[name] - tensor).pow(2).sum().item() for name, tensor in one.items()) ** 0.5


@pytest.mark.parametrize("side", ["retriever", "generator"])
def test_gradient_checkpointing_gives_the_same_weights(write_config: Callable[..., Path], side: str) -> None:
    before, plain = _train(write_config, "plain", side)
    _, checkpointed = _train(write_config, "checkpointed", side, gradient_checkpointing=True)
    assert _distance(before, plain) > 0
    assert _distance(plain, checkpointed) < 1e-5 * _distance(before, plain) + 1e-7


@pytest.mark.parametrize("side", ["retriever", "generator"])
def test_bfloat16_moves_the_weights_about_as_far(write_config: Callable[..., Path], side: str) -> None:
    before, plain = _train(write_config, "plain", side)
    _, mixed = _train(write_config, "mixed", side, precision="bfloat16")
    assert 0 < _distance(plain, mixed) < 0.6 * _distance(before, plain)
    assert all(tensor.dtype == torch.float32 for tensor in mixed.values())


def test_float16_needs_a_gpu(write_config: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="float16 needs a cuda device"):
        _train(write_config, "half", "generator", precision="float16")


@pytest.mark.parametrize("side", ["retriever", "generator"])
def test_max_grad_norm_bounds_the_step(write_config: Callable[..., Path], side: str) -> None:
    before, after = _train(write_config, "clipped", side, max_grad_norm=1e-3, max_steps=1, learning_rate=1.0)
    assert _distance(before, after) == pytest.approx(1e-3, rel=1e-2)


def test_weight_decay_shrinks_and_warmup_delays(write_config: Callable[..., Path]) -> None:
    before, plain = _train(write_config, "plain", "retriever", scheduler="constant")
    _, decayed = _train(write_config, "decayed", "retriever", scheduler="constant", weight_decay=0.5)
    norm = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    assert _distance(norm, decayed) < _distance(norm, plain)
    _, warm = _train(write_config, "warm", "retriever", scheduler="constant_with_warmup", warmup=0.9)
    # The first of the two steps has a learning rate of 0 and the second half of 1e-2, its gradient clipped to 1.
    assert _distance(before, warm) <= 0.5e-2 * 1.001 < _distance(before, plain)


@pytest.mark.parametrize("setting", ["retriever_temperature", "lm_temperature"])
def test_temperatures_change_the_gradient(write_config: Callable[..., Path], setting: str) -> None:
    _, plain = _train(write_config, "plain", "retriever")
    _, changed = _train(write_config, "changed", "retriever", **{setting: 1.0})
    assert _distance(plain, changed) > 1e-6


def test_likelihood_and_divergence_change_the_gradient(write_config: Callable[..., Path]) -> None:
    _, plain = _train(write_config, "plain", "retriever")
    for number, settings in enumerate(({"likelihood": "sum"}, {"divergence": "reverse"})):
        _, changed = _train(write_config, f"changed{number}", "retriever", **settings)
        assert _distance(plain, changed) > 1e-6, settings


def test_dropout_is_off_unless_asked_for(tmp_path: Path, write_config: Callable[..., Path]) -> None:
    from conftest import make_retriever

    model = str(make_retriever(tmp_path / "dropout", dropout=0.5))

    def train(folder: str, **settings: Any) -> Weights:
        config = load_config(write_config(folder), [f"rag_system.retriever.model={model}"])
        trainer = HuggingFaceTrainerForLSR(
            build_rag_system(config),
            config=LSRConfig(top_k=4, max_steps=1, optimizer="sgd", learning_rate=1.0, **settings),
        )
        trainer.train()
        return trainer.trained_weights()

    assert _distance(train("one"), train("two")) == 0
    assert _distance(train("three"), train("four", dropout=True)) > 1e-4


def test_training_is_placed_on_the_gpu_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed: what transformers and accelerate have chosen is what they would move model and batches to."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    second = torch.device("cuda:1")
    config = LSRConfig(precision="float32")
    arguments = training_arguments(config, directory=tmp_path, seed=0, device=second)
    assert arguments.device == second
    assert Accelerator().device == second
    assert current == [second]
    assert arguments.n_gpu <= 1
    # The next training of the same process, on another device, starts from nothing.
    on_cpu = training_arguments(config, directory=tmp_path, seed=0, device=torch.device("cpu"))
    assert on_cpu.device == Accelerator(cpu=True).device == torch.device("cpu")
    assert current == [second]


def test_the_trainer_moves_its_model_to_the_device_of_its_arguments(tmp_path: Path) -> None:
    """`meta` stands for a device that is not the first one: the model must end up there, and nowhere else."""
    arguments = training_arguments(
        LSRConfig(precision="float32"), directory=tmp_path, seed=0, device=torch.device("cpu")
    )
    vars(arguments)["_setup_devices"] = torch.device("meta")
    model = torch.nn.Linear(2, 2)
    TrainingLoop(model=model, args=arguments, validate=dict, on_batches=lambda batches: None)
    assert model.weight.device.type == "meta"


def test_rare_records_change_neither_loss_nor_checks(write_config: Callable[..., Path]) -> None:
    settings: dict[str, Any] = {"top_k": 4, "batch_size": 2, "learning_rate": 1e-3, "validation": NEVER}
    often = HuggingFaceTrainerForLSR(
        build_rag_system(load_config(write_config())), config=LSRConfig(**settings)
    ).train()
    rarely = HuggingFaceTrainerForLSR(
        build_rag_system(load_config(write_config())), config=LSRConfig(log_every=100, **settings)
    ).train()
    assert rarely.loss == often.loss > 0
    settings = {"log_every": 100, "learning_rate": 1e30, "batch_size": 4, "validation": NEVER}
    trainer = HuggingFaceTrainerForRALT(build_rag_system(load_config(write_config())), config=RALTConfig(**settings))
    with pytest.raises(TrainingError, match="not finite"):
        trainer.train()
