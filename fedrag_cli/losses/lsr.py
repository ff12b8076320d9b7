"""LM-supervised retrieval: the retriever learns to rank passages as the language model finds them useful."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedrag_cli.errors import TrainingError

Divergence = Literal["forward", "reverse"]


def lsr_loss(
    retrieval_scores: Tensor,
    lm_scores: Tensor,
    retriever_temperature: float = 0.05,
    lm_temperature: float = 0.1,
    divergence: Divergence = "forward",
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the divergence between the retriever's ranking and the language model's, for each example.

    What it is:
        Over the k passages d that were retrieved for a query x with the answer y,

        - P_R(d|x) = softmax(s(d, x) / retriever_temperature) is what the retriever believes;
        - Q(d|x,y) = softmax(l(d) / lm_temperature) is what helped the language model, with l(d) the log-likelihood of
          y given d and x.

        `forward` is KL(Q || P_R), `reverse` is KL(P_R || Q). The gradient reaches the retrieval scores only. With the
        forward direction it is (P_R - Q) / retriever_temperature.

    Which paper prints which direction:
        - REPLUG (arXiv 2301.12652) and RA-DIT (arXiv 2310.01352) print KL(P_R || Q), here `reverse`.
        - Atlas (arXiv 2208.03299) uses KL(Q || P_R), here `forward`; so does code that calls
          `torch.nn.functional.kl_div(log P_R, Q)`, whose arguments stand the other way round than in the formula.

    Recommendations:
        - Hand in log-likelihoods, not likelihoods. REPLUG prints a softmax of raw probabilities; those underflow, and
          the target becomes flat.
        - Take the mean log-likelihood over the answer's tokens with lm_temperature 0.1, or the sum with a larger one.
        - Cosine scores need a small retriever_temperature: at 1 and k = 10, P_R cannot exceed .451. Published values
          are 0.1 (REPLUG) and 0.01 (RA-DIT).
        - Take k of 8 to 20. With k = 1 the loss is 0 and teaches nothing.

    Args:
        retrieval_scores: Scores s(d, x), shape (batch, k).
        lm_scores: Log-likelihoods l(d), shape (batch, k). They get no gradient.
        retriever_temperature: Temperature of the retriever's softmax, above 0.
        lm_temperature: Temperature of the language model's softmax, above 0.
        divergence: `forward` for KL(Q || P_R), `reverse` for KL(P_R || Q).
        mask: Boolean, shape (batch, k): False where an example has fewer than k passages. Scores there are ignored and
            may be anything. None where all are present.

    Returns:
        The divergence of each example, summed over its passages, at least 0; shape (batch,). It is float64 where a
        score is, and float32 otherwise.

    Raises:
        TrainingError: If shapes differ, the batch or k is 0, a score is not finite, an example has no passage, or a
            temperature or the divergence is out of range.
    """
    _check_settings(retriever_temperature, lm_temperature, divergence)
    present = _check_inputs(retrieval_scores, lm_scores, mask)
    log_retriever = _masked_log_softmax(retrieval_scores, retriever_temperature, present)
    log_target = _masked_log_softmax(lm_scores.detach(), lm_temperature, present)
    if divergence == "forward":
        return (log_target.exp() * (log_target - log_retriever)).sum(dim=-1)
    return (log_retriever.exp() * (log_retriever - log_target)).sum(dim=-1)


class LSRLoss(torch.nn.Module):
    """The mean of `lsr_loss` over the batch.

    The mean is over examples: a passage more a query does not make the loss smaller, as it would with the default
    reduction of `torch.nn.KLDivLoss`, which divides by batch * k.

    Settings as `lsr_loss`; raises TrainingError where a temperature or the divergence is out of range.
    """

    def __init__(
        self,
        retriever_temperature: float = 0.05,
        lm_temperature: float = 0.1,
        divergence: Divergence = "forward",
    ) -> None:
        super().__init__()
        _check_settings(retriever_temperature, lm_temperature, divergence)
        self.retriever_temperature = retriever_temperature
        self.lm_temperature = lm_temperature
        self.divergence: Divergence = divergence

    def forward(self, retrieval_scores: Tensor, lm_scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean divergence over a batch, a scalar; arguments and errors as `lsr_loss`."""
        temperatures = (self.retriever_temperature, self.lm_temperature)
        return lsr_loss(retrieval_scores, lm_scores, *temperatures, self.divergence, mask).mean()

    def extra_repr(self) -> str:
        """Return the settings, for printing the module."""
        return (
            f"retriever_temperature={self.retriever_temperature}, lm_temperature={self.lm_temperature}, "
            f"divergence={self.divergence!r}"
        )


def _masked_log_softmax(scores: Tensor, temperature: float, present: Tensor) -> Tensor:
    # Half precision holds three digits, too few for a difference of logarithms.
    exact = scores if scores.dtype == torch.float64 else scores.float()
    logs = torch.log_softmax((exact / temperature).masked_fill(~present, -torch.inf), dim=-1)
    # Zeros on both sides make an absent passage add nothing; infinities would add NaN, to the gradient too.
    return logs.masked_fill(~present, 0.0)


def _check_settings(retriever_temperature: float, lm_temperature: float, divergence: str) -> None:
    for name, value in (("retriever_temperature", retriever_temperature), ("lm_temperature", lm_temperature)):
        if not value > 0:
            raise TrainingError(f"{name} is {value}.", "Set it above 0.")
    if divergence not in ("forward", "reverse"):
        raise TrainingError(f"The divergence '{divergence}' is unknown.", "Use forward or reverse.")


def _check_inputs(retrieval_scores: Tensor, lm_scores: Tensor, mask: Tensor | None) -> Tensor:
    """Check the inputs and return the mask, all True where there is none."""
    shape = tuple(retrieval_scores.shape)
    if retrieval_scores.dim() != 2 or 0 in shape:
        raise TrainingError(
            f"retrieval_scores has the shape {shape}; it must be (batch, k).",
            "LSR needs at least one example and one passage a query.",
        )
    if tuple(lm_scores.shape) != shape:
        raise TrainingError(f"lm_scores has the shape {tuple(lm_scores.shape)}, but retrieval_scores has {shape}.")
    present = torch.ones_like(retrieval_scores, dtype=torch.bool) if mask is None else mask
    if tuple(present.shape) != shape or present.dtype != torch.bool:
        raise TrainingError(
            f"mask has the shape {tuple(present.shape)} and the type {present.dtype}; it must be {shape} and boolean."
        )
    empty_rows = (~present.any(dim=-1)).nonzero().flatten().tolist()
    if empty_rows:
        raise TrainingError(
            f"The mask leaves no passage for the examples {empty_rows} of the batch.", "Leave such examples out."
        )
    for name, scores in (("retrieval_scores", retrieval_scores), ("lm_scores", lm_scores)):
        broken = (~torch.isfinite(scores) & present).any(dim=-1).nonzero().flatten().tolist()
        if broken:
            raise TrainingError(
                f"{name} holds NaN or infinity for the examples {broken} of the batch.",
                "Lower the learning rate, use float32 or bfloat16 instead of float16, or look at those examples.",
            )
    return present
