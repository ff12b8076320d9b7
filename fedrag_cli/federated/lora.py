"""Aggregating LoRA adapters: what is learned is the product B A, and the mean of products is not the product of means.

Two clients with (B, A) and (-B, -A) have learned the same, but their factors average to nothing. Two ways out keep the
rank: the best approximation of the mean product (`best_of_rank`), and adapters whose A is the same everywhere and is
not trained, so that averaging B is exact (`freeze_a`; FFA-LoRA, arXiv 2403.12313).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LORA_A, LORA_B = ".lora_A.", ".lora_B."
SEED_OF_FROZEN_A = 0
LARGEST_CONDITION = 1e4


@dataclass(frozen=True)
class Factors:
    """An adapter of one layer, as one client has it.

    Args:
        b: Shape (outputs, rank).
        a: Shape (rank, inputs).
        weight: How much the client counts; those of all clients add up to 1.
        scaling: alpha / rank, by which the product is multiplied.
    """

    b: Tensor
    a: Tensor
    weight: float
    scaling: float = 1.0


def adapter_pairs(names: Sequence[str] | Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield the names of the factors B and A of each layer whose both factors are trained."""
    known = set(names)
    for name in names:
        if LORA_B in name and (other := name.replace(LORA_B, LORA_A)) in known:
            yield name, other


def stacked(clients: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """Return factors of the mean product, exact, whose rank is the sum of the clients' (FLoRA, arXiv 2409.05976).

    Args:
        clients: At least one; ranks and scalings may differ.

    Returns:
        B of shape (outputs, sum of ranks) and A of shape (sum of ranks, inputs), in float64, with sum_k weight_k
        scaling_k B_k A_k as their product.
    """
    b = torch.cat([client.weight * client.scaling * client.b.double() for client in clients], dim=1)
    a = torch.cat([client.a.double() for client in clients])
    return b, a


def residual(clients: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """Return factors of what averaging B and A apart misses of the mean product (FedEx-LoRA, arXiv 2410.09432).

    Args:
        clients: At least one, all of the same rank and scaling.

    Returns:
        B and A in float64, whose product is the mean product minus the product of the means.
    """
    b, a = stacked(clients)
    mean_b = torch.stack([client.weight * client.b.double() for client in clients]).sum(0)
    mean_a = torch.stack([client.weight * client.a.double() for client in clients]).sum(0)
    return torch.cat([b, -clients[0].scaling * mean_b], dim=1), torch.cat([a, mean_a])


def norm_of_product(b: Tensor, a: Tensor) -> float:
    """Return the L2 norm of B A without computing the product: that of a matrix as small as the rank."""
    return float(torch.linalg.matrix_norm(torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T))


def best_of_rank(clients: Sequence[Factors], scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the adapter whose product is closest to the mean product in the L2 norm (Eckart and Young, 1936).

    Of all factors with this product, those are taken whose A is the mean of the clients' A where that is possible: one
    client is the identity, and what the next round trains is scaled as before.

    Args:
        clients: At least one.
        scaling: alpha / rank of the adapter that is wanted; its rank is that of the first client.

    Returns:
        B of shape (outputs, rank) and A of shape (rank, inputs), in float64.
    """
    rank = clients[0].a.shape[0]
    stacked_b, stacked_a = stacked(clients)
    q_b, r_b = torch.linalg.qr(stacked_b / scaling)
    q_a, r_a = torch.linalg.qr(stacked_a.T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    missing = max(0, rank - len(values))
    b = nn.functional.pad(q_b @ (left * values)[:, :rank], (0, missing))
    rows = nn.functional.pad(right[:rank] @ q_a.T, (0, 0, 0, missing))
    turn = _turn(rows, clients)
    return torch.linalg.solve(turn.T, b.T).T, turn @ rows


def _turn(rows: Tensor, clients: Sequence[Factors]) -> Tensor:
    """Return what makes the mean of the clients' A of orthonormal rows, or else keeps the size of their A."""
    rank = rows.shape[0]
    same = [client for client in clients if client.a.shape == rows.shape]
    mean = torch.stack([client.weight * client.a.double() for client in same]).sum(0)
    turn = mean @ rows.T / sum(client.weight for client in same)
    if float(torch.linalg.cond(turn)) <= LARGEST_CONDITION:
        return turn
    size = float(same[0].a.double().norm()) / rank**0.5
    return torch.eye(rank, dtype=torch.float64) * (size or 1.0)


def freeze_a(model: nn.Module) -> None:
    """Freeze the factors A of a model's adapter, from now on.

    Where the adapter has not been trained, they are drawn from a seed that is the same at every site.
    """
    parameters = dict(model.named_parameters())
    is_fresh = not any(bool(parameter.any()) for name, parameter in parameters.items() if LORA_B in name)
    generator = torch.Generator().manual_seed(SEED_OF_FROZEN_A)
    for name, parameter in parameters.items():
        if LORA_A not in name:
            continue
        parameter.requires_grad_(False)
        if is_fresh:
            drawn = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
            with torch.no_grad():
                parameter.copy_(drawn)
