"""Grouping by length: each instance once, like with like, and the same order for the same seed and epoch."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedrag_cli.config import load_config
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.trainers.config import RALTConfig, ValidationConfig
from fedrag_cli.trainers.huggingface import HuggingFaceTrainerForRALT
from fedrag_cli.trainers.huggingface.training_loop import LengthGroupedOrder

LENGTHS = [random.Random(number).randrange(10, 400) for number in range(203)]
GROUP = 8


def _groups(order: list[int]) -> list[list[int]]:
    return [order[start : start + GROUP] for start in range(0, len(order), GROUP)]


def _padding(order: list[int]) -> int:
    return sum(max(LENGTHS[i] for i in group) * len(group) - sum(LENGTHS[i] for i in group) for group in _groups(order))


def test_every_instance_comes_once_and_steps_hold_similar_lengths() -> None:
    order = list(LengthGroupedOrder(LENGTHS, GROUP, seed=1))
    assert sorted(order) == list(range(203))
    shuffled = list(range(203))
    random.Random(1).shuffle(shuffled)
    assert _padding(order) < 0.4 * _padding(shuffled)
    # The one step that is not whole comes last, and the others neither from long to short nor from short to long.
    longest = [max(LENGTHS[i] for i in group) for group in _groups(order)[:-1]]
    rises = sum(after > before for before, after in itertools.pairwise(longest))
    assert 6 <= rises <= 18


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    first, again = LengthGroupedOrder(LENGTHS, GROUP, seed=1), LengthGroupedOrder(LENGTHS, GROUP, seed=1)
    order = list(first)
    torch.rand(7)
    assert list(again) == order
    again.set_epoch(3)
    later = list(again)
    assert later != order
    first.set_epoch(3)
    assert list(first) == later
    assert list(LengthGroupedOrder(LENGTHS, GROUP, seed=9)) != order
    # Which instances meet in a step changes too.
    assert {frozenset(group) for group in _groups(order)} & {frozenset(group) for group in _groups(later)} == set()


@pytest.mark.parametrize("count", [0, 1, 8, 9])
def test_few_instances(count: int) -> None:
    assert sorted(LengthGroupedOrder([5] * count, GROUP, seed=1)) == list(range(count))


def _widths(
    write_config: Callable[..., Path], **settings: Any
) -> tuple[list[list[list[int]]], dict[str, torch.Tensor]]:
    """Train on data with long and short prompts, and return the lengths of the rows of each batch of each step."""
    rows = [{"query": "what is the colour ?" + " of the cat" * (n % 7), "response": "red"} for n in range(28)]
    trainer = HuggingFaceTrainerForRALT(
        build_rag_system(load_config(write_config())),
        rows,
        config=RALTConfig(learning_rate=1e-2, top_k=1, validation=ValidationConfig(every="never"), **settings),
    )
    steps: list[list[list[int]]] = []
    see = trainer._on_batches

    def noted(batches: Any) -> None:
        steps.append([batch["attention_mask"].sum(dim=1).tolist() for batch in batches])
        see(batches)

    trainer._on_batches = noted  # type: ignore[method-assign]
    trainer.train()
    return steps, trainer.trained_weights()


def test_the_trainer_groups_the_batches_of_a_step(write_config: Callable[..., Path]) -> None:
    settings: dict[str, Any] = {"batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 2}
    steps, weights = _widths(write_config, **settings)
    assert [len(batches) for batches in steps] == [2] * 14

    def spread(found: list[list[list[int]]]) -> int:
        flat = [[length for batch in batches for length in batch] for batches in found]
        return sum(max(row) - min(row) for row in flat)

    plain, _ = _widths(write_config, group_by_length=False, **settings)
    assert spread(steps) < 0.5 * spread(plain)
    assert steps[:7] != steps[7:]
    again, same = _widths(write_config, **settings)
    assert again == steps
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())
