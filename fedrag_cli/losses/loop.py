"""LOOP: a passage is worth what the likelihood of the answer loses when that passage is left out."""

from __future__ import annotations

from torch import Tensor

from fedrag_cli.losses.lsr import lsr_loss


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
