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
    if not trained:
        raise TrainingError("There is no trained tensor to keep near the global weights.")
    hint = "Use the same base model and the same LoRA settings on the server and on every client."
    names = (
        ("the global weights lack", sorted(set(trained) - set(reference))),
        ("the client does not train", sorted(set(reference) - set(trained))),
    )
    if problems := [f"{what} {', '.join(found)}" for what, found in names if found]:
        raise TrainingError(f"The client's weights and the global weights differ: {'; '.join(problems)}.", hint)
    distances = []
    for name, tensor in trained.items():
        if tensor.shape != reference[name].shape:
            shapes = f"the shape {tuple(tensor.shape)}, but {tuple(reference[name].shape)} in the global weights"
            raise TrainingError(f"'{name}' has {shapes}.", hint)
        # Squares of small differences vanish in half precision.
        exact = tensor if tensor.dtype == torch.float64 else tensor.float()
        distances.append((exact - reference[name].detach().to(exact)).square().sum())
    return mu / 2 * torch.stack(distances).sum()
