"""Answers from several passages in parallel: one prompt a passage, next-token probabilities summed by weight.

Source: Shi et al., "REPLUG" (arXiv 2301.12652, equation 2), and Lin et al., "RA-DIT" (arXiv 2310.01352, equation 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from fedrag_cli.errors import ModelError
from fedrag_cli.losses import ensemble_log_probs
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.generators.likelihood import base_model, length_sorted_batches

MOST_SAMPLED = 50


class EnsembleChooser(LogitsProcessor):
    """Chooses the next token of each group of rows by the weighted sum of their probabilities.

    Args:
        log_weights: For each group, the log-weights of its rows, which follow one another in the batch.
        temperature: 0 takes the likeliest token; above 0 samples among the 50 likeliest.
    """

    def __init__(self, log_weights: Sequence[Tensor], temperature: float = 0.0) -> None:
        """Keep what the choice needs."""
        self.log_weights = log_weights
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores that leave each row the token of its group alone.

        Args:
            input_ids: The rows so far, of shape (rows, tokens).
            scores: Logits of the next tokens, of shape (rows, vocabulary).
        """
        log_probs = torch.log_softmax(scores.float(), dim=-1)
        chosen = torch.full_like(scores, -torch.inf)
        start = 0
        for weights in self.log_weights:
            rows = slice(start, start + len(weights))
            mixture = ensemble_log_probs(weights.to(scores.device), log_probs[rows])
            chosen[rows, self._choose(mixture)] = 0.0
            start += len(weights)
        return chosen

    def _choose(self, mixture: Tensor) -> int:
        if self.temperature == 0:
            return int(mixture.argmax())
        best = torch.topk(mixture, min(MOST_SAMPLED, len(mixture)))
        drawn = torch.multinomial(torch.softmax(best.values / self.temperature, dim=-1), 1)
        return int(best.indices[drawn])


def generate_ensemble(
    generator: CausalLMGenerator,
    prompts: Sequence[Sequence[list[int]]],
    log_weights: Sequence[Tensor],
    on_batch: Callable[[list[int], list[str]], None] | None = None,
) -> list[str]:
    """Answer questions, each from several prompts at once.

    Args:
        generator: The language model.
        prompts: For each question its prompts as token ids, one a passage.
        log_weights: For each question the log-weights of its prompts, of shape (prompts,).
        on_batch: Called after each batch with positions of questions and their answers.

    Returns:
        The answers, in the order of the questions.

    Raises:
        DataError: A prompt is empty or leaves no room for an answer.
        ModelError: The model cannot answer prompts of different lengths together.
    """
    generator.require_room([prompt for group in prompts for prompt in group])
    room = generator.config.max_new_tokens
    _require_together(generator, prompts)
    sizes = [len(group) * (max(map(len, group)) + room) for group in prompts]
    answers = [""] * len(prompts)
    temperature = generator.config.temperature
    with torch.random.fork_rng(enabled=temperature > 0):
        if temperature > 0:
            torch.manual_seed(generator.seed)
        for batch in length_sorted_batches(sizes, generator.config.batch_tokens):
            rows = [prompt for position in batch for prompt in prompts[position]]
            chooser = EnsembleChooser([log_weights[position] for position in batch], temperature)
            texts = _first_of_each(generator.generate_batch(rows, chooser), [len(prompts[i]) for i in batch])
            for position, text in zip(batch, texts, strict=True):
                answers[position] = text
            if on_batch is not None:
                on_batch(batch, texts)
    return answers


def _require_together(generator: CausalLMGenerator, prompts: Sequence[Sequence[list[int]]]) -> None:
    """Raise ModelError where a model would answer the prompts of a question in another way than each alone."""
    lengths = [{len(prompt) for prompt in group} for group in prompts if len(group) > 1]
    if not lengths:
        return
    together = generator.generates_together(max(map(max, lengths)) + generator.config.max_new_tokens)
    if together == "single" or (together == "equal" and any(len(group) > 1 for group in lengths)):
        raise ModelError(
            f"The generator {type(base_model(generator.model)).__name__} cannot answer from several prompts at once: "
            "they change each other's answers.",
            "Set rag_system.inference: concat, or use another generator.",
        )


def _first_of_each(texts: Sequence[str], sizes: Sequence[int]) -> list[str]:
    """Return the answer of each group; all rows of a group have the same."""
    firsts, start = [], 0
    for size in sizes:
        firsts.append(texts[start])
        start += size
    return firsts
