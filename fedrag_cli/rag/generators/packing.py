"""Scoring many answers in one sequence: what their prompts begin with alike is computed once, with next to no padding.

Many questions are asked of the same passage, and all choices of a question follow the same prompt. The sequences of a
pack form a tree, in which a common beginning is one branch. The tree's tokens are given to the model as one row, with
a mask that lets each token see the tokens on its own way to the root, and with its depth as its position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedrag_cli.rag.generators.likelihood import (
    TokenPair,
    accepted_arguments,
    base_model,
    stretched_beyond,
    text_config,
    token_log_probs,
    trial_ids,
)

PACK_TOKENS = 512
"""Tokens of a pack. In smaller ones matrix products are less efficient; in larger ones attention looks at more tokens
of other branches: 0.47 of single forwards at 128 tokens, 0.33 at 384 and 512, 0.36 at 1024 with SmolLM2-135M."""

STEP_OF_LENGTHS = 8
"""Packs are filled up to a multiple of it, because oneDNN keeps compiled products for each length that it meets: 81 MB
from step 100 to 500 of a training with SmolLM2-135M without the filler, 10 MB with it."""

Pack = list[int]
# Each model's forward as it was tried, and whether it gives the same in packs.
_trials: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()


def packs(pairs: Sequence[TokenPair], token_budget: int) -> Iterator[Pack]:
    """Group pairs whose prompts begin alike.

    The packs come in the order of their tokens, so that what a killed run has left forms the same packs again.

    Args:
        pairs: (prompt ids, target ids).
        token_budget: Most tokens of a pack; a longer pair is a pack by itself.

    Yields:
        Lists of positions into `pairs`; every position occurs once.
    """
    sequences = [_sequence(pair) for pair in pairs]
    pack: Pack = []
    tokens = 0
    for position in sorted(range(len(pairs)), key=lambda position: (sequences[position], position)):
        shared = _common_length(sequences[pack[-1]], sequences[position]) if pack else 0
        added = len(sequences[position]) - shared
        # A long common beginning is worth a larger pack: each new pack computes it again.
        if pack and tokens + added > min(token_budget, max(PACK_TOKENS, 2 * shared)):
            yield pack
            pack, tokens, added = [], 0, len(sequences[position])
        pack.append(position)
        tokens += added
    if pack:
        yield pack


def packed_log_probs(model: nn.Module, pairs: Sequence[TokenPair], first_position: int = 0) -> list[Tensor]:
    """Return the log-probability of each token of each target after its prompt, in one forward pass of one row.

    Args:
        model: A causal language model of transformers for which `can_pack` holds, in eval mode.
        pairs: (prompt ids, target ids), neither of them empty; neighbours share what they begin with alike.
        first_position: Where the model's own positions begin.

    Returns:
        For each pair a float32 tensor of shape (target tokens,) on the model's device, each value at most 0.
    """
    device = next(model.parameters()).device
    ids, depths, paths = _tree([_sequence(pair) for pair in pairs])
    # A target's token is predicted by the token before it, so the rows begin with the last one of the prompt.
    rows = [column for path, (prompt, _) in zip(paths, pairs, strict=True) for column in path[len(prompt) - 1 :]]
    targets = torch.tensor([token for _, target in pairs for token in target], device=device)
    filler = _filler(len(ids))
    logits = model(
        input_ids=torch.tensor([ids + ids[:1] * filler], device=device),
        attention_mask=_visible(len(ids) + filler, paths).to(device)[None, None],
        position_ids=torch.tensor([depths + [0] * filler], device=device) + first_position,
        logits_to_keep=torch.tensor(rows + rows[-1:] * _filler(len(rows)), device=device),
        use_cache=False,
    ).logits[0, : len(rows)]
    log_probs = torch.log_softmax(logits.float(), dim=-1).gather(1, targets[:, None]).squeeze(1)
    return list(log_probs.split([len(target) for _, target in pairs]))


def can_pack(model: nn.Module, longest: int, first_position: int | None = 0) -> bool:
    """Return whether a model computes the same in packs: what its config says, and then a trial of three sequences.

    The trial is made once for a model, because a step of training may ask for the likelihoods of a few new pairs only.

    Args:
        model: A causal language model of transformers, in eval mode.
        longest: Tokens of the longest sequence to come.
        first_position: Where the model's own positions begin; None where they cannot be given to it.
    """
    config = text_config(model)
    if first_position is None or not {"position_ids", "logits_to_keep"} <= accepted_arguments(model):
        return False
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return False
    if longest > (getattr(config, "sliding_window", None) or longest):
        return False
    if stretched_beyond(model) is not None:
        return False
    forward = type(base_model(model)).forward
    if model not in _trials or _trials[model][0] is not forward:
        _trials[model] = (forward, _packs_alike(model, first_position))
    return _trials[model][1]


def _packs_alike(model: nn.Module, first_position: int) -> bool:
    """Try whether packing gives what single forwards give."""
    a, b, c, d, *_ = trial_ids(model)
    pairs: list[TokenPair] = [([a, b, c], [d, c]), ([a, b, c, c], [b, a, d]), ([b, d], [c])]
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        packed = torch.cat(packed_log_probs(model, pairs, first_position))
        apart = torch.cat([row for pair in pairs for row in token_log_probs(model, [pair], pad_id=0)])
    tolerance = 1e-4 if next(model.parameters()).dtype == torch.float32 else 5e-2
    return bool(torch.allclose(packed, apart, rtol=tolerance, atol=tolerance))


def _sequence(pair: TokenPair) -> list[int]:
    """Return what the model must read of a pair: after the last token of the target nothing is asked."""
    prompt, target = pair
    return prompt + target[:-1]


def _tree(sequences: Sequence[list[int]]) -> tuple[list[int], list[int], list[list[int]]]:
    """Merge what neighbours begin with alike.

    Returns:
        The tree's token ids, the depth of each, and for each sequence the columns of its tokens.
    """
    ids: list[int] = []
    depths: list[int] = []
    paths: list[list[int]] = []
    for number, sequence in enumerate(sequences):
        shared = _common_length(sequences[number - 1], sequence) if number else 0
        beginning = paths[-1][:shared] if paths else []
        paths.append(beginning + list(range(len(ids), len(ids) + len(sequence) - shared)))
        ids += sequence[shared:]
        depths += range(shared, len(sequence))
    return ids, depths, paths


def _visible(tokens: int, paths: Sequence[list[int]]) -> Tensor:
    """Return which tokens (columns) each token (row) sees: those of its path up to itself; fillers see themselves."""
    visible = torch.eye(tokens, dtype=torch.bool)
    for path in paths:
        columns = torch.tensor(path)
        visible[columns[:, None], columns] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
    return visible


def _filler(count: int) -> int:
    return -count % STEP_OF_LENGTHS


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    for number, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return number
    return min(len(first), len(second))
