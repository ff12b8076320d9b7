"""FedProx: a penalty that keeps a client's weights near the global ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedrag_cli.errors import TrainingError


def proximal_penalty(parameters: Iterable[tuple[str, Tensor]], reference: Mapping[str, Tensor], mu: float) -> Tensor:
    """Compute mu / 2 * sum of ||theta - theta_g||^2 over the trained tensors.

    Equation 2 of FedProx (Li et al., "Federated Optimization in Heterogeneous Networks", arXiv 1812.06127). A client
    adds it to its own loss. Its gradient is mu * (theta - theta_g): 0 at the start of a round, when the client holds
    the global weights.

    Args:
        parameters: Names and tensors that the client trains, such as the trainable ones of `model.named_parameters()`;
            at least one.
        reference: The global weights of this round, under the same names and with the same shapes. They get no
            gradient.
        mu: Strength of the penalty, at least 0. The paper tries 0.001, 0.01, 0.1 and 1.

    Returns:
        The penalty, a scalar, at least 0.

    Raises:
        TrainingError: If mu is negative, names or shapes differ, or there is no tensor.
    """
    if not mu >= 0:
        raise TrainingError(f"The proximal mu is {mu}.", "Set it to 0 or above.")
    trained = dict(parameters)
    _check_names(trained, reference)
    distances = [_squared_distance(name, tensor, reference[name]) for name, tensor in trained.items()]
    return mu / 2 * torch.stack(distances).sum()


def _squared_distance(name: str, tensor: Tensor, reference: Tensor) -> Tensor:
    if tensor.shape != reference.shape:
        raise TrainingError(
            f"'{name}' has the shape {tuple(tensor.shape)}, but {tuple(reference.shape)} in the global weights.",
            "Use the same base model and the same LoRA settings on the server and on every client.",
        )
    # Squares of small differences vanish in half precision.
    exact = tensor if tensor.dtype == torch.float64 else tensor.float()
    return (exact - reference.detach().to(exact)).square().sum()


def _check_names(trained: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> None:
    if not trained:
        raise TrainingError("There is no trained tensor to keep near the global weights.")
    problems = []
    missing = sorted(set(trained) - set(reference))
    if missing:
        problems.append(f"the global weights lack {', '.join(missing)}")
    unknown = sorted(set(reference) - set(trained))
    if unknown:
        problems.append(f"the client does not train {', '.join(unknown)}")
    if problems:
        raise TrainingError(
            f"The client's weights and the global weights differ: {'; '.join(problems)}.",
            "Use the same base model and the same LoRA settings on the server and on every client.",
        )
