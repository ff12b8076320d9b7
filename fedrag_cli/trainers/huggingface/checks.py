"""Checks that training can work and has worked, and what it tells beside its loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fedrag_cli.errors import ModelError, TrainingError
from fedrag_cli.rag.models import tensors_fingerprint
from fedrag_cli.runs.files import write_bytes_atomically, write_json_atomically
from fedrag_cli.runs.processes import Processes

FLAT = 1e-3


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that take a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def require_trainable(model: nn.Module, what: str) -> None:
    """Raise TrainingError where a model has no parameter that takes a gradient."""
    if not trainable(model):
        count = sum(1 for _ in model.parameters())
        raise TrainingError(
            f"The {what} is frozen: none of its {count} parameters takes a gradient, so training could not move it.",
            "Call requires_grad_(True) on the parameters that are to be tuned, or tune the other side.",
        )


def require_moved(before: str, after: str, what: str, log: list[dict[str, Any]]) -> None:
    """Raise TrainingError where training left every parameter as it was."""
    if before != after:
        return
    norms = [entry["grad_norm"] for entry in log if "grad_norm" in entry]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    if norms and not any(norms):
        cause, hint = (
            "its gradient was zero at every step",
            "The loss does not depend on it: look at the targets and at what is frozen.",
        )
    elif rates and not any(rates):
        cause, hint = "the learning rate was 0 at every step", "Raise learning_rate, or lower warmup."
    else:
        cause, hint = (
            "every step was smaller than the weights' rounding",
            "Raise learning_rate, or keep the weights in float32.",
        )
    raise TrainingError(f"Training did not move the {what}: {cause}.", hint)


def require_finite(model: nn.Module, what: str) -> None:
    """Raise TrainingError where a trained parameter is NaN or infinite."""
    broken = [name for name, parameter in trainable(model).items() if not bool(torch.isfinite(parameter).all())]
    if broken:
        raise TrainingError(
            f"Training left weights of the {what} that are not finite: {broken[0]}"
            + (f" and {len(broken) - 1} more." if len(broken) > 1 else "."),
            "Lower learning_rate, or set precision: float32.",
        )


def require_peaked_targets(targets: Tensor, lm_temperature: float | None) -> None:
    """Raise TrainingError where the language model prefers no passage for any example.

    Args:
        targets: Probabilities of shape (examples, top_k).
        lm_temperature: The temperature that made them, for the message; None where the objective has none.
    """
    spread = (targets.max(dim=1).values - targets.min(dim=1).values).max().item()
    if spread < FLAT:
        at = f" at lm_temperature {lm_temperature}" if lm_temperature is not None else ""
        lower = "; or lower lm_temperature" if lm_temperature is not None else ""
        raise TrainingError(
            "The language model's targets are flat: for no training example does it prefer one passage over another "
            f"(largest difference of probability {spread:.1e}{at}), so there is "
            "nothing to learn.",
            "Check that the passages reach the prompt ({context} in rag_system.prompt.template), that the responses "
            f"are real answers and the generator a trained model{lower}.",
        )


def copy_weights(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copy tensors into parameters by name.

    Raises:
        ModelError: A name is missing or unknown, or a shape differs.
    """
    problems = [f"{name} is missing" for name in parameters if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in parameters]
    problems += [
        f"{name} has the shape {tuple(weights[name].shape)}, not {tuple(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in weights and weights[name].shape != parameter.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(f"The weights do not fit the model: {'; '.join(problems[:5])}{more}.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


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
    """Return the L2 distance of each module's tensors, absolute and relative; see `PhaseStart.movement`."""
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


class StepDiagnostics:
    """Collects values of batches until the optimizer step is recorded.

    Args:
        processes: Those that compute the step; this one alone by default.
    """

    def __init__(self, processes: Processes | None = None) -> None:
        """Start empty."""
        self._processes = processes or Processes()
        self.is_counting = True
        """Whether `add` adds; not where a batch has only what fills it up."""
        self._totals: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(self, count: float, **means: float) -> None:
        """Add the means of one batch."""
        for name, mean in means.items() if self.is_counting else ():
            self._totals[name] = self._totals.get(name, 0.0) + count * mean
            self._counts[name] = self._counts.get(name, 0.0) + count

    def take(self) -> dict[str, float]:
        """Return the mean of each value over the batches of all processes since the last call, and start anew."""
        totals: dict[str, float] = {}
        counts: dict[str, float] = {}
        for of_one, counts_of_one in self._processes.all_gather((self._totals, self._counts)):
            for name, total in of_one.items():
                totals[name] = totals.get(name, 0.0) + total
                counts[name] = counts.get(name, 0.0) + counts_of_one[name]
        self._totals, self._counts = {}, {}
        return {name: total / counts[name] for name, total in totals.items()}
