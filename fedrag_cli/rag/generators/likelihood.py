"""Log-likelihoods of answers under a causal language model, for ragged batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

TokenPair = tuple[list[int], list[int]]


def length_sorted_batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Group positions into batches of similar length, longest first.

    Args:
        lengths: Tokens of each sequence.
        token_budget: Most tokens of a batch, padding included; a longer sequence is a batch by itself.

    Yields:
        Lists of positions into `lengths`; every position occurs once.
    """
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    batch: list[int] = []
    for position in order:
        if batch and lengths[batch[0]] * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


def token_log_probs(
    model: nn.Module,
    pairs: Sequence[TokenPair],
    *,
    pad_id: int,
    padding_side: Literal["left", "right"] = "right",
) -> list[Tensor]:
    """Return the log-probability of each token of each target after its prompt, in one forward pass.

    Args:
        model: A causal language model of transformers, in eval mode.
        pairs: (prompt ids, target ids), neither of them empty.
        pad_id: Any token id; padding never reaches a result.
        padding_side: Where the padding goes. The results agree but for rounding.

    Returns:
        For each pair a float32 tensor of shape (target tokens,) on the model's device, each value at most 0.
    """
    device = next(model.parameters()).device
    input_ids, mask, starts = _padded(pairs, pad_id, padding_side)
    # The logits at a position predict the token after it.
    first = min(start + len(prompt) for (prompt, _), start in zip(pairs, starts, strict=True)) - 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    keep = input_ids.shape[1] - first
    logits = _tail_logits(model, input_ids.to(device), mask.to(device), positions.to(device), keep)
    found = []
    for row, ((prompt, target), start) in enumerate(zip(pairs, starts, strict=True)):
        begin = start + len(prompt) - 1 - first
        log_probs = torch.log_softmax(logits[row, begin : begin + len(target)].float(), dim=-1)
        found.append(log_probs.gather(1, torch.tensor(target, device=device)[:, None]).squeeze(1))
    return found


def _padded(
    pairs: Sequence[TokenPair], pad_id: int, padding_side: Literal["left", "right"]
) -> tuple[Tensor, Tensor, list[int]]:
    """Put prompts with their targets into the rows of one tensor.

    Args:
        pairs: (prompt ids, target ids).
        pad_id: Fills the shorter rows.
        padding_side: Where it does.

    Returns:
        Token ids and mask, of shape (len(pairs), tokens), and the column in which each row starts.
    """
    lengths = [len(prompt) + len(target) for prompt, target in pairs]
    width = max(lengths)
    input_ids = torch.full((len(pairs), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(pairs), width), dtype=torch.long)
    starts = [width - length if padding_side == "left" else 0 for length in lengths]
    for row, ((prompt, target), start, length) in enumerate(zip(pairs, starts, lengths, strict=True)):
        input_ids[row, start : start + length] = torch.tensor(prompt + target)
        mask[row, start : start + length] = 1
    return input_ids, mask, starts


def base_model(model: nn.Module) -> nn.Module:
    """Return the language model itself, which is the one inside where it has an adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def accepted_arguments(model: nn.Module) -> frozenset[str]:
    """Return the names that a language model's `forward` takes, that of the model inside where it has an adapter."""
    return frozenset(inspect.signature(base_model(model).forward).parameters)


def _tail_logits(model: nn.Module, input_ids: Tensor, mask: Tensor, positions: Tensor, keep: int) -> Tensor:
    """Run the model and return the logits of the last `keep` columns, computing no others where it can."""
    accepted = accepted_arguments(model)
    options: dict[str, object] = {"use_cache": False}
    if "position_ids" in accepted:
        options["position_ids"] = positions
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = keep
    logits: Tensor = model(input_ids=input_ids, attention_mask=mask, **options).logits
    return logits[:, -keep:]
