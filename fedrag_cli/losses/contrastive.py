"""Contrastive learning with in-batch negatives and mined hard negatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fedrag_cli.errors import TrainingError


def contrastive_loss(similarities: Tensor, hard_negatives: Tensor | None = None, scale: float = 20.0) -> Tensor:
    """Compute the multiple-negatives ranking loss of each query.

    Source: Henderson et al. (arXiv 1705.00652, section 4.4); van den Oord et al. (arXiv 1807.03748, equation 4). Query
    i's own passage is column i; all other columns are negatives.

    Args:
        similarities: Cosines of queries and passages, shape (batch, batch), own passages on the diagonal.
        hard_negatives: Cosines of queries and mined negatives, shape (batch, negatives), which become further columns.
        scale: Factor of the cosines before the softmax, above 0; the inverse of a temperature.

    Returns:
        The cross-entropy of each query, shape (batch,).

    Raises:
        TrainingError: If `similarities` is not square, or the rows of `hard_negatives` do not fit.
    """
    batch = similarities.shape[0]
    if similarities.ndim != 2 or similarities.shape[1] != batch:
        raise TrainingError(f"similarities have the shape {tuple(similarities.shape)}; expected (batch, batch).")
    columns = similarities
    if hard_negatives is not None:
        if hard_negatives.ndim != 2 or hard_negatives.shape[0] != batch:
            raise TrainingError(
                f"hard_negatives have the shape {tuple(hard_negatives.shape)}; expected ({batch}, negatives)."
            )
        columns = torch.cat([similarities, hard_negatives], dim=1)
    own = torch.arange(batch, device=columns.device)
    return functional.cross_entropy(columns * scale, own, reduction="none")
