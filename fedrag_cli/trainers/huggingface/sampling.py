"""The order of training instances: random, with instances of similar length in the same optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

FEWEST_STEPS, MOST_STEPS = 4, 50
"""Optimizer steps whose instances are sorted together; transformers' `group_by_length` has the same upper bound."""


class LengthGroupedOrder(Sampler[int]):
    """Positions of instances, grouped by length, in an order that follows from the seed and the epoch alone.

    Instances are shuffled, those of several steps are sorted by length together and cut into steps, and the steps are
    shuffled. `transformers.trainer_pt_utils.LengthGroupedSampler` draws from torch's global state instead and leaves
    the steps sorted, so that an epoch goes from long to short.

    Args:
        lengths: Tokens of each instance.
        group_size: Instances of an optimizer step.
        seed: Seed of the order.
    """

    def __init__(self, lengths: Sequence[int], group_size: int, seed: int) -> None:
        """Start at the first epoch."""
        self._lengths = lengths
        self._group_size = group_size
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        """Return the number of instances."""
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; accelerate calls this by its name."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yield every position once, those of a step behind each other."""
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        shuffled = torch.randperm(len(self._lengths), generator=generator).tolist()
        # Four portions where there is enough, so that lengths alone do not settle which instances meet in a step.
        steps = max(FEWEST_STEPS, min(MOST_STEPS, len(shuffled) // (4 * self._group_size)))
        portion = steps * self._group_size
        groups = [
            group
            for start in range(0, len(shuffled), portion)
            for group in self._cut(sorted(shuffled[start : start + portion], key=self._lengths.__getitem__))
        ]
        # A smaller group among the others would shift the borders of the steps.
        whole = [group for group in groups if len(group) == self._group_size]
        rest = [group for group in groups if len(group) < self._group_size]
        for number in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[number]
        for group in rest:
            yield from group

    def _cut(self, portion: list[int]) -> list[list[int]]:
        return [portion[start : start + self._group_size] for start in range(0, len(portion), self._group_size)]
