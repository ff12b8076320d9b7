"""How far a phase moved the weights: its first ones, kept until its end, and distances by module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save
from torch import Tensor, nn

from fedrag_cli.rag.models import tensors_fingerprint
from fedrag_cli.runs.atomic import write_bytes_atomically, write_json_atomically
from fedrag_cli.trainers.huggingface.checks import trainable

START_FILE = "start.json"
START_WEIGHTS_FILE = "start.safetensors"
# What stands around the layers in the names of transformers, sentence-transformers and peft.
_WRAPPERS = frozenset(
    {"query_encoder", "passage_encoder", "base_model", "model", "auto_model", "transformer", "encoder", "bert"}
)


class PhaseStart:
    """The trained weights from before a phase's first step.

    A process that takes a run up again builds the same models anew, so the weights are those of now until a checkpoint
    is loaded. Where the models have moved since, because training goes on in the process that was interrupted, the
    weights come from the file that `keep` wrote.

    Args:
        model: The model, before any checkpoint is loaded into it.
        directory: The folder of the phase's checkpoints.
        writes: Whether to write into the folder; one of several processes does.
    """

    def __init__(self, model: nn.Module, directory: Path, *, writes: bool = True) -> None:
        """Copy the trained weights, and note or compare their fingerprint."""
        self._directory = directory
        self._writes = writes
        now = tensors_fingerprint(trainable(model))
        file = directory / START_FILE
        if file.is_file():
            self.fingerprint = str(json.loads(file.read_text(encoding="utf-8"))["trained_weights"])
        else:
            self.fingerprint = now
        if writes and not file.is_file():
            write_json_atomically(file, {"trained_weights": now})
        kept = directory / START_WEIGHTS_FILE
        self._weights: dict[str, Tensor] | None = None
        if now == self.fingerprint:
            self._weights = {name: tensor.detach().cpu().clone() for name, tensor in trainable(model).items()}
        elif kept.is_file():
            self._weights = load_file(kept)

    def keep(self) -> None:
        """Write the weights beside the fingerprint, for a training that goes on in the same process."""
        path = self._directory / START_WEIGHTS_FILE
        if self._writes and self._weights is not None and not path.is_file():
            write_bytes_atomically(path, save(self._weights))

    def movement(self, model: nn.Module) -> dict[str, dict[str, float | None]]:
        """Return how far each module has moved; empty where the first weights are not known.

        Returns:
            By module, in the order of the model: `distance` is the L2 norm of the difference over all its trained
            tensors, `relative` the same divided by the norm of the first weights (None where that is 0).
        """
        return movement(self._weights, trainable(model)) if self._weights is not None else {}


def movement(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, dict[str, float | None]]:
    """Return the L2 distance of each module's tensors, absolute and relative; see `PhaseStart.movement`.

    Args:
        before: Tensors by name.
        after: Tensors of the same names and shapes.
    """
    encoders = {name.split(".")[0] for name in after} & {"query_encoder", "passage_encoder"}
    squares: dict[str, list[float]] = {}
    for name, tensor in after.items():
        module = module_of(name)
        if len(encoders) > 1:
            module = f"{name.split('_')[0]} {module}"
        old = before[name].double()
        moved, norm = squares.setdefault(module, [0.0, 0.0])
        squares[module] = [
            moved + float((tensor.detach().cpu().double() - old).square().sum()),
            norm + float(old.square().sum()),
        ]
    return {
        module: {"distance": moved**0.5, "relative": (moved / norm) ** 0.5 if norm else None}
        for module, (moved, norm) in squares.items()
    }


def module_of(name: str) -> str:
    """Return the part of a model that a tensor belongs to, such as `layers.3` or `embeddings`.

    Args:
        name: Name of the tensor, such as `query_encoder.0.model.encoder.layer.3.attention.self.query.weight`.
    """
    parts = name.split(".")
    while len(parts) > 1 and (parts[0] in _WRAPPERS or parts[0].isdigit()):
        parts = parts[1:]
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]
