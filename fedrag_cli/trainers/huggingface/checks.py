"""Checks that training can work and has worked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedrag_cli.errors import ModelError, TrainingError

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
    """Raise TrainingError where training left every parameter as it was.

    Args:
        before: Fingerprint of the trained parameters before training.
        after: The same after training.
        what: What was trained, for the message.
        log: The log history of transformers, to find the cause in.
    """
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
