"""Trainers that run on transformers.Trainer."""

from fedrag_cli.trainers.huggingface.contrastive import HuggingFaceTrainerForContrastive
from fedrag_cli.trainers.huggingface.emdr2 import HuggingFaceTrainerForEMDR2
from fedrag_cli.trainers.huggingface.loop import HuggingFaceTrainerForLOOP
from fedrag_cli.trainers.huggingface.lsr import HuggingFaceTrainerForLSR
from fedrag_cli.trainers.huggingface.pdist import HuggingFaceTrainerForPDist
from fedrag_cli.trainers.huggingface.raft import HuggingFaceTrainerForRAFT
from fedrag_cli.trainers.huggingface.ralt import HuggingFaceTrainerForRALT

__all__ = [
    "HuggingFaceTrainerForContrastive",
    "HuggingFaceTrainerForEMDR2",
    "HuggingFaceTrainerForLOOP",
    "HuggingFaceTrainerForLSR",
    "HuggingFaceTrainerForPDist",
    "HuggingFaceTrainerForRAFT",
    "HuggingFaceTrainerForRALT",
]
