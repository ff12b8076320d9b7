"""EMDR2: retriever and reader are trained on the likelihood of the answer, summed over the passages."""

from __future__ import annotations

import torch
from torch import Tensor

from fedrag_cli.errors import TrainingError


def emdr2_loss(retrieval_scores: Tensor, answer_log_probs: Tensor, retriever_temperature: float = 1.0) -> Tensor:
    """Compute -log sum_d P_R(d|x) p(y|d,x) for each example.

    Source: Singh et al., "End-to-End Training of Multi-Document Reader and Retriever" (arXiv 2106.05346); the
    retriever's part as Atlas (arXiv 2208.03299, section 2.2) states it. The gradient reaches the retrieval scores only:
    it is P_R minus the posterior of the passages given the answer, divided by the temperature.

    Args:
        retrieval_scores: Scores s(d, x), shape (batch, k).
        answer_log_probs: Log-likelihoods log p(y|d,x), shape (batch, k). They get no gradient.
        retriever_temperature: Temperature of the retriever's softmax, above 0.

    Returns:
        The loss of each example, shape (batch,).

    Raises:
        TrainingError: If shapes differ or the temperature is not above 0.
    """
    if retrieval_scores.shape != answer_log_probs.shape:
        raise TrainingError(
            f"retrieval_scores have the shape {tuple(retrieval_scores.shape)}, "
            f"answer_log_probs {tuple(answer_log_probs.shape)}; they must be equal."
        )
    if retriever_temperature <= 0:
        raise TrainingError(f"retriever_temperature is {retriever_temperature}; it must be above 0.")
    log_retriever = torch.log_softmax(retrieval_scores / retriever_temperature, dim=-1)
    return -torch.logsumexp(log_retriever + answer_log_probs.detach(), dim=-1)
