"""Log-likelihoods of answers under a causal language model, for ragged batches.

Padding goes to the right: no token of a causal model sees what comes after it, whether it attends to what came before,
keeps it in a state, or counts its positions in a way of its own. Padding on the left, as in generation, is right for
some models only, which is tried.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn

from fedrag_cli.errors import ModelError
from fedrag_cli.rag.generators.base import TokenPair


@dataclass(frozen=True)
class PaddingRule:
    """How a model takes rows that are padded on the left.

    Args:
        on_left: Whether each row gets what it gets alone.
        first_position: Where the model's own positions begin; None where they are not given to it.
    """

    on_left: bool
    first_position: int | None

    def positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Return the model's argument for the positions of padded rows, if any, from their mask."""
        if self.first_position is None:
            return {}
        return {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0) + self.first_position}


@torch.no_grad()
def padding_rule(model: nn.Module, pad_id: int) -> PaddingRule:
    """Find out how a model takes padding, from four or a few more forward passes of 16 tokens in eval mode.

    Raises:
        ModelError: The model needs more than token ids, or its predictions depend on tokens that come after.
    """
    name = type(base_model(model)).__name__
    config: Any = base_model(model).config
    long = trial_ids(model)
    # Five tokens of padding shift the blocks that some models compress, which must be whole to be seen.
    short = long[:11]
    try:
        alone = {
            len(row): all_log_probs(model, ids, attention_mask=torch.ones_like(ids))[0]
            for row in (short, long)
            for ids in [torch.tensor([row])]
        }
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(
            f"The generator {name} cannot read a text by itself: {reason}",
            "Use a causal language model that takes token ids alone.",
        ) from error
    if _chooses_blocks(model) or not alike(model, alone[len(long)][: len(short)], alone[len(short)], slack=3):
        raise ModelError(
            f"The generator {name} is not causal: what it predicts depends on the tokens that come after, so the "
            "likelihood of an answer has no meaning.",
            "Use a causal language model; where this one was trained as such, set is_decoder: true in its config.json, "
            "and attention_type: original_full where it has blocks.",
        )
    pairs: list[TokenPair] = [(short, []), (long, [])]
    if not _pads_alike(model, pairs, pad_id, "right", None, alone, slack=3):
        raise ModelError(
            f"The generator {name} predicts something else for texts of different lengths together than for each.",
            "Use another causal language model.",
        )
    # Positions begin at 0, or, in RoBERTa and its kin, after the one of the padding.
    firsts = [0, (getattr(config, "pad_token_id", None) or 0) + 1, None]
    for first in firsts if "position_ids" in accepted_arguments(model) else [None]:
        if _pads_alike(model, pairs, pad_id, "left", first, alone):
            return PaddingRule(True, first)
    return PaddingRule(False, None)


def _pads_alike(
    model: nn.Module,
    pairs: Sequence[TokenPair],
    pad_id: int,
    padding_side: Literal["left", "right"],
    first_position: int | None,
    alone: Mapping[int, Tensor],
    slack: float = 1,
) -> bool:
    """Return whether rows that are padded get what they get alone, by their length."""
    ids, mask, starts = padded(pairs, pad_id, padding_side)
    positions = PaddingRule(True, first_position).positions(mask)
    try:
        rows = all_log_probs(model, ids, attention_mask=mask, **positions)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError):
        return False
    spans = [row[start : start + len(prompt)] for row, start, (prompt, _) in zip(rows, starts, pairs, strict=True)]
    return all(alike(model, span, alone[len(span)], slack) for span in spans)


def trial_ids(model: nn.Module) -> list[int]:
    """Return some token ids for trials of a model, from a place in the vocabulary where no special tokens are."""
    start = text_config(model).vocab_size // 4
    return [start + number for number in (0, 5, 12, 7, 1, 14, 6, 3, 9, 2, 15, 4, 11, 8, 13, 10)]


def stretched_beyond(model: nn.Module) -> int | None:
    """Return the tokens beyond which a model's positions depend on the longest row of a batch; None where never.

    Dynamic NTK scaling and LongRoPE choose the frequencies of all rotary positions by the length of the input.
    """
    config = text_config(model)
    parameters = getattr(config, "rope_parameters", None) or {}
    # Some models have one set of parameters, others one for each kind of layer.
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    stretching = [kind for kind in kinds if kind.get("rope_type") in ("dynamic", "longrope")]
    known = [kind.get("original_max_position_embeddings") or config.max_position_embeddings for kind in stretching]
    return min(known) if known else None


def _chooses_blocks(model: nn.Module) -> bool:
    """Return whether a model attends to blocks that it chooses by a whole text of more than a few, as two do."""
    sparse = any(getattr(module, "attention_type", None) == "block_sparse" for module in base_model(model).modules())
    return sparse or "lsh" in getattr(base_model(model).config, "attn_layers", ())


def alike(model: nn.Module, found: Tensor, expected: Tensor, slack: float = 1) -> bool:
    """Return whether log-probabilities are as expected but for `slack` times the rounding of the number format."""
    # In bfloat16 a model of 30 layers differs from itself by some hundredths; a wrong position or state by far more.
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 1e-1
    difference = (found - expected).square().mean().sqrt()
    return bool(difference <= slack * tolerance * expected.std())


def all_log_probs(model: nn.Module, input_ids: Tensor, **arguments: Tensor) -> Tensor:
    """Return the log-probabilities of all tokens of the vocabulary at each position, of a plain forward pass."""
    device = next(model.parameters()).device
    placed = {name: value.to(device) for name, value in arguments.items()}
    with torch.autocast(device.type, enabled=False):
        logits: Tensor = model(input_ids=input_ids.to(device), use_cache=False, **placed).logits
    if logits.shape[:2] != input_ids.shape:
        raise ValueError(f"its logits have the shape {tuple(logits.shape)} for {tuple(input_ids.shape)} tokens")
    return torch.log_softmax(logits.float(), dim=-1)


def length_sorted_batches(lengths: Sequence[int], token_budget: int, *, equal: bool = False) -> Iterator[list[int]]:
    """Yield positions into `lengths`, each once, in batches of similar length (`equal`: the same), longest first.

    A batch has at most as many tokens as the budget, padding included; a longer sequence is a batch by itself.
    """
    batch: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        longest = lengths[batch[0]] if batch else 0
        if batch and (longest * (len(batch) + 1) > token_budget or (equal and lengths[position] != longest)):
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


def token_log_probs(model: nn.Module, pairs: Sequence[TokenPair], *, pad_id: int) -> list[Tensor]:
    """Return the log-probability of each token of each target after its prompt, in one forward pass in eval mode.

    Args:
        model: A causal language model of transformers.
        pairs: (prompt ids, target ids), neither of them empty.
        pad_id: Any token id; padding never reaches a result.

    Returns:
        For each pair a float32 tensor of shape (target tokens,) on the model's device, each value at most 0.
    """
    device = next(model.parameters()).device
    input_ids, mask, _ = padded(pairs, pad_id, "right")
    # The logits at a position predict the token after it, and those before the first target are of no use.
    first = min(len(prompt) for prompt, _ in pairs) - 1
    keep = input_ids.shape[1] - first
    options = {"logits_to_keep": keep} if "logits_to_keep" in accepted_arguments(model) else {}
    outputs = model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False, **options)
    logits = outputs.logits[:, -keep:]
    found = []
    for row, (prompt, target) in enumerate(pairs):
        begin = len(prompt) - 1 - first
        log_probs = torch.log_softmax(logits[row, begin : begin + len(target)].float(), dim=-1)
        found.append(log_probs.gather(1, torch.tensor(target, device=device)[:, None]).squeeze(1))
    return found


def padded(
    pairs: Sequence[TokenPair], pad_id: int, padding_side: Literal["left", "right"]
) -> tuple[Tensor, Tensor, list[int]]:
    """Put prompts with their targets into the rows of one tensor.

    Returns:
        Token ids and mask, of shape (len(pairs), tokens), and the column in which each row starts. The mask comes from
        the lengths, never from the id, because padding is often the end token.
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


def text_config(model: nn.Module) -> Any:
    """Return the config of a language model, that of its text part where it has others."""
    config: Any = base_model(model).config
    return config.get_text_config()


def accepted_arguments(model: nn.Module) -> frozenset[str]:
    """Return the names that a language model's `forward` takes, that of the model inside where it has an adapter."""
    return frozenset(inspect.signature(base_model(model).forward).parameters)


PACK_TOKENS = 512
"""Tokens of a pack. In smaller ones matrix products are less efficient; in larger ones attention looks at more tokens
of other branches: 0.47 of single forwards at 128 tokens, 0.33 at 384 and 512, 0.36 at 1024 with SmolLM2-135M."""

STEP_OF_LENGTHS = 8
"""Packs are filled up to a multiple of it, because oneDNN keeps compiled products for each length that it meets: 81 MB
from step 100 to 500 of a training with SmolLM2-135M without the filler, 10 MB with it."""

# Each model's forward as it was tried, and whether it gives the same in packs.
_trials: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()


def packs(pairs: Sequence[TokenPair], token_budget: int) -> Iterator[list[int]]:
    """Yield positions into `pairs`, each once, in groups of pairs whose prompts begin alike.

    The packs come in the order of their tokens, so that what a killed run has left forms the same packs again. A pair
    that is longer than the budget is a pack by itself.
    """
    sequences = [_sequence(pair) for pair in pairs]
    pack: list[int] = []
    tokens = 0
    for position in sorted(range(len(pairs)), key=lambda position: (sequences[position], position)):
        shared = common_length(sequences[pack[-1]], sequences[position]) if pack else 0
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
    """Return what `token_log_probs` does, in one row, where `can_pack` holds: neighbours share how they begin."""
    device = next(model.parameters()).device
    ids, depths, paths = _tree([_sequence(pair) for pair in pairs])
    # A target's token is predicted by the token before it, so the rows begin with the last one of the prompt.
    rows = [column for path, (prompt, _) in zip(paths, pairs, strict=True) for column in path[len(prompt) - 1 :]]
    targets = torch.tensor([token for _, target in pairs for token in target], device=device)
    filler = -len(ids) % STEP_OF_LENGTHS
    logits = model(
        input_ids=torch.tensor([ids + ids[:1] * filler], device=device),
        attention_mask=_visible(len(ids) + filler, paths).to(device)[None, None],
        position_ids=torch.tensor([depths + [0] * filler], device=device) + first_position,
        logits_to_keep=torch.tensor(rows + rows[-1:] * (-len(rows) % STEP_OF_LENGTHS), device=device),
        use_cache=False,
    ).logits[0, : len(rows)]
    log_probs = torch.log_softmax(logits.float(), dim=-1).gather(1, targets[:, None]).squeeze(1)
    return list(log_probs.split([len(target) for _, target in pairs]))


def can_pack(model: nn.Module, longest: int, first_position: int | None = 0) -> bool:
    """Return whether a model computes sequences of `longest` tokens the same in packs: by its config, then by a trial.

    The trial is made once for a model, because a step of training may ask for the likelihoods of a few new pairs only.
    """
    config = text_config(model)
    if first_position is None or not {"position_ids", "logits_to_keep"} <= accepted_arguments(model):
        return False
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return False
    if longest > (getattr(config, "sliding_window", None) or longest) or stretched_beyond(model) is not None:
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
        shared = common_length(sequences[number - 1], sequence) if number else 0
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


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many ids two sequences begin with alike."""
    for number, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return number
    return min(len(first), len(second))
