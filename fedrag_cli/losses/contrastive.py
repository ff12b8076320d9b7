"""Contrastive learning with in-batch negatives and mined hard negatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fedrag_cli.errors import TrainingError


def contrastive_loss(
    similarities: Tensor,
    hard_negatives: Tensor | None = None,
    scale: float = 20.0,
    excluded: Tensor | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """Compute the multiple-negatives ranking loss of each query.

    Source: Henderson et al. (arXiv 1705.00652, section 4.4); van den Oord et al. (arXiv 1807.03748, equation 4). By
    default query i's own passage is column i; all other columns are negatives.

    Args:
        similarities: Cosines of queries and passages, shape (batch, batch), own passages on the diagonal; any shape
            (batch, passages) where `own` says which column belongs to which query.
        hard_negatives: Cosines of queries and mined negatives, shape (batch, negatives), which become further columns.
        scale: Factor of the cosines before the softmax, above 0; the inverse of a temperature.
        excluded: Boolean, shape (batch, passages + negatives): True where a column is no negative of a query, because
            its passage is relevant to it. A query's own column is never excluded. None excludes nothing.
        own: Column of each query's own passage, shape (batch,); the diagonal by default.

    Returns:
        The cross-entropy of each query, shape (batch,).

    Raises:
        TrainingError: If shapes do not fit, or a query's own passage is excluded.
    """
    batch = similarities.shape[0]
    if similarities.ndim != 2 or (own is None and similarities.shape[1] != batch):
        raise TrainingError(f"similarities have the shape {tuple(similarities.shape)}; expected (batch, batch).")
    if own is not None and tuple(own.shape) != (batch,):
        raise TrainingError(f"own has the shape {tuple(own.shape)}; expected ({batch},).")
    if hard_negatives is not None and (hard_negatives.ndim != 2 or hard_negatives.shape[0] != batch):
        raise TrainingError(
            f"hard_negatives have the shape {tuple(hard_negatives.shape)}; expected ({batch}, negatives)."
        )
    columns = similarities if hard_negatives is None else torch.cat([similarities, hard_negatives], dim=1)
    targets = torch.arange(len(columns), device=columns.device) if own is None else own.to(columns.device)
    logits = columns * scale
    if excluded is not None:
        if excluded.shape != columns.shape or excluded.dtype != torch.bool:
            raise TrainingError(
                f"excluded has the shape {tuple(excluded.shape)} and the type {excluded.dtype}; "
                f"it must be {tuple(columns.shape)} and boolean."
            )
        if bool(excluded.gather(1, targets[:, None]).any()):
            raise TrainingError("A query's own passage is excluded, so there is nothing to learn from it.")
        logits = logits.masked_fill(excluded, -torch.inf)
    return functional.cross_entropy(logits, targets, reduction="none")
