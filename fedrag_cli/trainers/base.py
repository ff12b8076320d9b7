"""What every trainer offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TrainResult:
    """What a training ended with.

    Args:
        loss: Mean training loss over the steps.
        steps: Optimizer steps.
        metrics: Last validation metrics, and counts such as truncated prompts.
        seconds: Wall time of this call.
    """

    loss: float
    steps: int
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return {"loss": self.loss, "steps": self.steps, "metrics": self.metrics, "seconds": self.seconds}


class BaseTrainer(ABC):
    """Tunes one side of a RAG system."""

    side: str
    """`retriever` or `generator`."""

    @abstractmethod
    def train(self, *, phase: str | None = None, checkpoints: Path | None = None) -> TrainResult:
        """Tune on the training examples.

        Args:
            phase: Name for records, such as `1-retriever`; the side by default.
            checkpoints: Folder for checkpoints; where it holds one already, training goes on from there.
        """

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Return validation metrics, `loss` among them, on the validation examples."""

    @abstractmethod
    def trained_weights(self) -> dict[str, Tensor]:
        """Return the tensors that training changes, by name."""

    @abstractmethod
    def load_trained_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put tensors back that `trained_weights` gave; raises ModelError where names or shapes differ."""
