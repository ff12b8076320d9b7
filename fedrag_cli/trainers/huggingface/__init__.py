"""Trainers that run on transformers.Trainer."""

from fedrag_cli.trainers.huggingface.generator import HuggingFaceTrainerForRAFT, HuggingFaceTrainerForRALT
from fedrag_cli.trainers.huggingface.lm_supervision import (
    HuggingFaceTrainerForEMDR2,
    HuggingFaceTrainerForLOOP,
    HuggingFaceTrainerForLSR,
    HuggingFaceTrainerForPDist,
)
from fedrag_cli.trainers.huggingface.retriever import HuggingFaceTrainerForContrastive

__all__ = [
    "HuggingFaceTrainerForContrastive",
    "HuggingFaceTrainerForEMDR2",
    "HuggingFaceTrainerForLOOP",
    "HuggingFaceTrainerForLSR",
    "HuggingFaceTrainerForPDist",
    "HuggingFaceTrainerForRAFT",
    "HuggingFaceTrainerForRALT",
]
