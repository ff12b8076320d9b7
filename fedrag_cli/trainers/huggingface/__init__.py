"""Trainers that run on transformers.Trainer."""

from fedrag_cli.trainers.huggingface.lsr import HuggingFaceTrainerForLSR
from fedrag_cli.trainers.huggingface.ralt import HuggingFaceTrainerForRALT

__all__ = ["HuggingFaceTrainerForLSR", "HuggingFaceTrainerForRALT"]
