"""Answers from several passages at once: probabilities under single passages, weighted by the retriever and summed.

Source: Lewis et al., "Retrieval-Augmented Generation" (arXiv 2005.11401, section 2.1), for RAG-sequence and RAG-token;
REPLUG (arXiv 2301.12652, equation 2) for the ensemble of next-token distributions. All in log space.
"""

from __future__ import annotations

import torch
from torch import Tensor


def passage_log_weights(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log lambda, the log-softmax of retrieval scores.

    Args:
        scores: Scores of the passages, shape (..., k).
        temperature: Temperature of the softmax, above 0.
    """
    return torch.log_softmax(scores / temperature, dim=-1)


def ensemble_log_probs(log_weights: Tensor, log_probs: Tensor) -> Tensor:
    """Return log sum_j lambda_j p(token | passage j) for every token of the vocabulary.

    Args:
        log_weights: Log-weights of the passages, shape (..., k).
        log_probs: Next-token log-probabilities under each passage, shape (..., k, vocabulary).

    Returns:
        Log-probabilities, shape (..., vocabulary).
    """
    return torch.logsumexp(log_weights.unsqueeze(-1) + log_probs, dim=-2)


def sequence_log_prob(log_weights: Tensor, token_log_probs: Tensor) -> Tensor:
    """Return log sum_j lambda_j prod_t p(y_t | passage j): one passage answers the whole question (RAG-sequence).

    Args:
        log_weights: Log-weights of the passages, shape (..., k).
        token_log_probs: Log-probabilities of the answer's tokens, shape (..., k, tokens).

    Returns:
        Log-probability of the answer, shape (...).
    """
    return torch.logsumexp(log_weights + token_log_probs.sum(dim=-1), dim=-1)


def token_log_prob(log_weights: Tensor, token_log_probs: Tensor) -> Tensor:
    """Return log prod_t sum_j lambda_j p(y_t | passage j): each token has passages of its own (RAG-token).

    Arguments and result as `sequence_log_prob`.
    """
    return torch.logsumexp(log_weights.unsqueeze(-1) + token_log_probs, dim=-2).sum(dim=-1)
