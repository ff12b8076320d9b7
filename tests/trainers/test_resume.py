"""A training that goes on from a checkpoint ends with the weights of one that was not interrupted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedrag_cli.config import load_config
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.trainers import huggingface
from fedrag_cli.trainers.config import (
    ContrastiveConfig,
    LOOPConfig,
    LSRConfig,
    PDistConfig,
    RAFTConfig,
    RALTConfig,
    ValidationConfig,
)

COMMON: dict[str, Any] = {
    "batch_size": 4,
    "epochs": 2,
    "save_every": 1,
    "keep_checkpoints": 20,
    "validation": ValidationConfig(every="never"),
}


@pytest.mark.parametrize(
    ("trainer_class", "config"),
    [
        (huggingface.HuggingFaceTrainerForContrastive, ContrastiveConfig(learning_rate=1e-3, **COMMON)),
        (huggingface.HuggingFaceTrainerForContrastive, ContrastiveConfig(learning_rate=1e-3, train="both", **COMMON)),
        (huggingface.HuggingFaceTrainerForPDist, PDistConfig(learning_rate=1e-3, train="both", top_k=4, **COMMON)),
        (huggingface.HuggingFaceTrainerForLOOP, LOOPConfig(learning_rate=1e-3, top_k=3, **COMMON)),
        (huggingface.HuggingFaceTrainerForRAFT, RAFTConfig(learning_rate=1e-2, top_k=2, **COMMON)),
        (
            huggingface.HuggingFaceTrainerForRALT,
            RALTConfig(learning_rate=1e-2, top_k=2, passage_weights="retriever", **COMMON),
        ),
    ],
)
def test_a_resumed_training_ends_with_the_same_weights(
    write_config: Callable[..., Path], tmp_path: Path, trainer_class: Any, config: Any
) -> None:
    def train(checkpoints: Path) -> tuple[dict[str, torch.Tensor], int]:
        trainer = trainer_class(build_rag_system(load_config(write_config())), config=config)
        result = trainer.train(checkpoints=checkpoints)
        return trainer.trained_weights(), result.steps

    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    expected, steps = train(whole)
    interrupted.mkdir()
    shutil.copy(whole / "start.json", interrupted)
    shutil.copytree(whole / "checkpoint-3", interrupted / "checkpoint-3")
    for cache in whole.glob("likelihoods-*"):
        shutil.copy(cache, interrupted)
    resumed, resumed_steps = train(interrupted)
    assert resumed_steps == steps
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 3},
        {"learning_rate": 5e-2, "epochs": 10, "validation": ValidationConfig(every="epoch", patience=1)},
    ],
)
def test_a_run_at_its_end_is_not_trained_further(
    write_config: Callable[..., Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = LSRConfig(**{"top_k": 4, "batch_size": 4, "learning_rate": 1e-3, **settings})
    folder = tmp_path / "checkpoints"
    trainer = huggingface.HuggingFaceTrainerForLSR(build_rag_system(load_config(write_config())), config=config)
    result = trainer.train(checkpoints=folder)
    # The folder may have moved in the meantime, too.
    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    again = huggingface.HuggingFaceTrainerForLSR(build_rag_system(load_config(write_config())), config=config)
    resumed = again.train(checkpoints=moved)
    assert (resumed.steps, resumed.loss, resumed.metrics) == (result.steps, result.loss, result.metrics)
    weights = again.trained_weights()
    assert all(torch.equal(weights[name], tensor) for name, tensor in trainer.trained_weights().items())
