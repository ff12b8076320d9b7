"""What every trainer manager offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

from fedrag_cli.trainers.base import TrainResult

Mode = Literal["retriever", "generator", "alternating"]


class BaseRAGTrainerManager(ABC):
    """Decides which trainer runs when."""

    @property
    @abstractmethod
    def mode(self) -> Mode:
        """What is tuned: retriever, generator, or both in turn."""

    @abstractmethod
    def train(self, checkpoints: Path | None = None) -> TrainResult:
        """Tune what the mode says.

        Args:
            checkpoints: Folder for checkpoints and finished phases; where it holds some, training goes on from there.
        """
