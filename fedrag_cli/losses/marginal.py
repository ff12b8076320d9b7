"""Losses by the marginal likelihood of the answer over the passages: EMDR2 and LOOP."""

from __future__ import annotations

import torch
from torch import Tensor

from fedrag_cli.errors import TrainingError
from fedrag_cli.losses.lsr import lsr_loss


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


def loop_loss(
    retrieval_scores: Tensor,
    scores_without: Tensor,
    retriever_temperature: float = 0.05,
    lm_temperature: float = 0.01,
) -> Tensor:
    """Compute KL(Q || P_R) for each example, with Q(d) = softmax(-l(all passages but d) / lm_temperature).

    Source: Izacard et al., "Atlas" (arXiv 2208.03299, section 2.2, "leave-one-out perplexity distillation"). P_R is the
    softmax of the retrieval scores over retriever_temperature; the gradient reaches these scores only.

    Args:
        retrieval_scores: Scores s(d, x), shape (batch, k).
        scores_without: Log-likelihoods of the answer given all k passages but d, shape (batch, k).
        retriever_temperature: Temperature of the retriever's softmax, above 0.
        lm_temperature: Temperature of the language model's softmax, above 0.

    Returns:
        The divergence of each example, at least 0; shape (batch,).

    Raises:
        TrainingError: As `lsr_loss`.
    """
    return lsr_loss(retrieval_scores, -scores_without, retriever_temperature, lm_temperature, "forward")
