"""Scoring answers whose prompts begin alike: the common beginning is computed once.

Many questions are asked of the same passage, and all choices of a question follow the same prompt. Where the context
comes first in the prompt, most of its tokens are in that common beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from fedrag_cli.rag.generators.likelihood import (
    TokenPair,
    accepted_arguments,
    length_sorted_batches,
    token_log_probs,
)

LEAST_SHARE = 0.5
"""Share of a prompt that its batch's common beginning must have; below it, a batch of whole prompts is as fast."""


@dataclass(frozen=True)
class ScoringBatch:
    """Pairs that are scored together.

    Args:
        positions: Which pairs.
        shared: Number of tokens that all their prompts begin with and that are computed once; 0 for none.
    """

    positions: list[int]
    shared: int = 0


def scoring_batches(pairs: Sequence[TokenPair], token_budget: int) -> Iterator[ScoringBatch]:
    """Group pairs whose prompts begin alike, and the rest by length.

    The groups come first, in the order of their tokens, so that what a killed run has left forms the same groups again.

    Args:
        pairs: (prompt ids, target ids).
        token_budget: Most tokens of a batch, padding included; a longer pair is a batch by itself.

    Yields:
        Batches; every position occurs once.
    """
    alone: list[int] = []
    for group in _groups(pairs, token_budget):
        if len(group.positions) > 1:
            yield group
        else:
            alone += group.positions
    lengths = [len(pairs[position][0]) + len(pairs[position][1]) for position in alone]
    for batch in length_sorted_batches(lengths, token_budget):
        yield ScoringBatch([alone[number] for number in batch])


def shared_prefix_log_probs(
    model: nn.Module, pairs: Sequence[TokenPair], *, shared: int, pad_id: int
) -> list[Tensor] | None:
    """Return the log-probability of each token of each target, with the prompts' common beginning computed once.

    Args:
        model: A causal language model of transformers, in eval mode.
        pairs: (prompt ids, target ids); the first `shared` ids of all prompts are equal, and no prompt ends with them.
        shared: Number of common ids, at least 1.
        pad_id: Any token id; padding never reaches a result.

    Returns:
        For each pair a float32 tensor of shape (target tokens,), or None where the model's memory of earlier tokens
        cannot be shared by several rows.
    """
    device = next(model.parameters()).device
    prefix = torch.tensor([pairs[0][0][:shared]], device=device)
    # Of the common beginning only what the model remembers is wanted.
    fewest_logits = {"logits_to_keep": 1} if "logits_to_keep" in accepted_arguments(model) else {}
    outputs: Any = model(input_ids=prefix, attention_mask=torch.ones_like(prefix), use_cache=True, **fewest_logits)
    # transformers 5.24 gave the field its new name.
    past = outputs.cache if "cache" in outputs else outputs.past_key_values
    if not isinstance(past, DynamicCache) or any(type(layer) is not DynamicLayer for layer in past.layers):
        return None
    past.batch_repeat_interleave(len(pairs))
    rests = [(prompt[shared:], target) for prompt, target in pairs]
    # Padded on the left, all answers end together, so that logits are needed of the last columns only.
    return token_log_probs(model, rests, pad_id=pad_id, padding_side="left", past_key_values=past, past_tokens=shared)


def _groups(pairs: Sequence[TokenPair], token_budget: int) -> Iterator[ScoringBatch]:
    """Walk through the pairs in the order of their prompts' ids, in which prompts that begin alike are neighbours."""
    order = sorted(range(len(pairs)), key=lambda position: (pairs[position][0], pairs[position][1], position))
    members: list[int] = []
    shared = longest = longest_prompt = 0
    for position in order:
        prompt, target = pairs[position]
        if members:
            common = min(shared, len(prompt) - 1, _common_length(pairs[members[0]][0], prompt))
            most, most_prompt = max(longest, len(prompt) + len(target)), max(longest_prompt, len(prompt))
            fits = common + (len(members) + 1) * (most - common) <= token_budget
            if fits and common >= max(1, LEAST_SHARE * most_prompt):
                members.append(position)
                shared, longest, longest_prompt = common, most, most_prompt
                continue
            yield ScoringBatch(members, shared)
        members, shared = [position], len(prompt) - 1
        longest, longest_prompt = len(prompt) + len(target), len(prompt)
    if members:
        yield ScoringBatch(members, shared)


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    for number, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return number
    return min(len(first), len(second))
