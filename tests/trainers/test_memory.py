"""What a training keeps from step to step: no tensors beyond those of its first steps."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedrag_cli.config import load_config
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.trainers.config import LSRConfig, RALTConfig, ValidationConfig
from fedrag_cli.trainers.huggingface import HuggingFaceTrainerForLSR, HuggingFaceTrainerForRALT
from fedrag_cli.trainers.huggingface.base import HuggingFaceTrainer

STEPS = 60
NEVER = ValidationConfig(every="never")


def _alive() -> int:
    """Return the bytes of all tensors that something refers to, each storage once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        # Looking at a lazy module's attributes would import it.
        if type(found) in (torch.Tensor, torch.nn.Parameter):
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _trainer(kind: str, config: Path) -> HuggingFaceTrainer:
    rag_system = build_rag_system(load_config(config))
    if kind == "lsr":
        lsr = LSRConfig(max_steps=STEPS, batch_size=4, top_k=3, learning_rate=1e-4, validation=NEVER)
        return HuggingFaceTrainerForLSR(rag_system, config=lsr)
    ralt = RALTConfig(max_steps=STEPS, batch_size=2, top_k=1, learning_rate=1e-4, validation=NEVER)
    return HuggingFaceTrainerForRALT(rag_system, config=ralt)


@pytest.mark.parametrize("kind", ["lsr", "ralt"])
def test_no_tensor_is_kept_from_one_step_to_the_next(
    write_config: Callable[..., Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(kind, write_config())
    alive: dict[int, int] = {}

    def on_step(step: int, last: bool) -> None:
        if step % 15 == 0:
            alive[step] = _alive()

    monkeypatch.setattr(trainer, "_on_step", on_step)
    trainer.train()
    assert list(alive) == [15, 30, 45, 60]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in trainer.trained_weights().values())
    # Batches differ in length by some tokens; one kept gradient, or the activations of one step, would be far more.
    assert max(alive.values()) - min(alive.values()) < 0.05 * weights
