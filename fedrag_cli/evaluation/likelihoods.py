"""What the generator believes of given answers: likelihood of the accepted answer, and choice among several.

With several prompts a question (`inference: ensemble`) each token's probability is the weighted sum over the prompts,
as in decoding; see `losses/marginal.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedrag_cli.config.schema import EvaluationConfig
from fedrag_cli.data.examples import Example
from fedrag_cli.evaluation.memory import EvaluationMemory
from fedrag_cli.losses import token_log_prob
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.generators.likelihood import TokenPair
from fedrag_cli.rag.knowledge_stores.base import ScoredNode
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.runs.reporting import Reporter

KIND = "token_log_probs"


@dataclass
class Candidate:
    """One answer that is scored.

    Args:
        key: Unique name of the candidate in the evaluation.
        text: The answer.
        log_weights: Log-weights of the prompts it is scored under, of shape (prompts,).
        pairs: (prompt ids, answer ids), one a prompt.
        dropped_tokens: Tokens of its prompts that did not fit.
    """

    key: str
    text: str
    log_weights: Tensor
    pairs: list[TokenPair] = field(default_factory=list)
    dropped_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Number of the answer's tokens."""
        return len(self.pairs[0][1])


def answer_candidate(rag_system: RAGSystem, example: Example, found: Sequence[ScoredNode]) -> Candidate:
    """Return the first accepted answer of a question with its end token, to be scored under the question's prompts."""
    return _candidate(rag_system, f"{example.id} answer", example.query, found, example.response, with_end=True)


def choice_candidates(rag_system: RAGSystem, example: Example, found: Sequence[ScoredNode]) -> list[Candidate]:
    """Return the choices of a question, without end token, to be scored under the question's prompts."""
    return [
        _candidate(rag_system, f"{example.id} choice {number}", example.query, found, text, with_end=False)
        for number, text in enumerate(example.choices)
    ]


def prior_candidate(rag_system: RAGSystem, text: str) -> Candidate:
    """Return a choice, to be scored under a prompt without question and passages, whichever question has it.

    Source: Brown et al., "Language Models are Few-Shot Learners" (arXiv 2005.14165, section 2.4), for the comparison
    of a choice's likelihood with that under an empty prompt.
    """
    return _candidate(rag_system, f"prior of {text}", "", (), text, with_end=False)


def score_candidates(
    generator: CausalLMGenerator,
    candidates: Sequence[Candidate],
    memory: EvaluationMemory,
    reporter: Reporter,
) -> dict[str, float]:
    """Return the log-likelihood of each candidate by its key, under all its prompts together.

    Args:
        generator: The language model.
        candidates: What is scored; those that the memory knows are not computed again.
        memory: Keeps each prompt's token log-probabilities.
        reporter: Shows the progress.
    """
    pairs = {
        f"{candidate.key} under {number}": pair
        for candidate in candidates
        for number, pair in enumerate(candidate.pairs)
    }
    missing = [key for key in pairs if memory.get(KIND, key) is None]

    def keep(positions: list[int], rows: list[Tensor]) -> None:
        memory.put(KIND, {missing[position]: row.tolist() for position, row in zip(positions, rows, strict=True)})
        advance(len(positions))

    with reporter.task("Scoring answers", len(missing), "prompt") as advance:
        generator.token_log_probs_of_ids([pairs[key] for key in missing], keep)
    return {candidate.key: _together(candidate, memory) for candidate in candidates}


def choose(
    example: Example,
    candidates: Sequence[Candidate],
    log_likelihoods: Mapping[str, float],
    settings: EvaluationConfig,
    priors: Mapping[str, float],
) -> tuple[str, list[float]]:
    """Return the choice with the best score, and all scores in the order of the choices.

    Args:
        example: A question with choices.
        candidates: Its choices.
        log_likelihoods: Of the candidates, by key.
        settings: `choice_score` says what is compared.
        priors: Log-likelihoods of the choices without the question, by text; needed for `choice_score: prior`.
    """
    totals = [log_likelihoods[candidate.key] for candidate in candidates]
    if settings.choice_score == "token":
        scores = [total / candidate.tokens for total, candidate in zip(totals, candidates, strict=True)]
    elif settings.choice_score == "character":
        scores = [total / len(candidate.text) for total, candidate in zip(totals, candidates, strict=True)]
    elif settings.choice_score == "prior":
        scores = [total - priors[candidate.text] for total, candidate in zip(totals, candidates, strict=True)]
    else:
        scores = totals
    best = max(range(len(scores)), key=lambda number: (scores[number], -number))
    return example.choices[best], scores


def _candidate(
    rag_system: RAGSystem, key: str, query: str, found: Sequence[ScoredNode], text: str, *, with_end: bool
) -> Candidate:
    prompts = rag_system.require_generator().prompts
    encoded = [
        prompts.encode_pair(query, [scored.node for scored in context], text, with_end=with_end)
        for context in rag_system.contexts(found)
    ]
    # All prompts of an ensemble are continued by the same tokens.
    pairs = [(prompt.ids, encoded[0].answer) for prompt in encoded]
    dropped = sum(prompt.dropped_tokens for prompt in encoded)
    return Candidate(key, text, rag_system.passage_log_weights(found), pairs, dropped)


def _together(candidate: Candidate, memory: EvaluationMemory) -> float:
    rows = torch.tensor([memory.get(KIND, f"{candidate.key} under {n}") for n in range(len(candidate.pairs))])
    return float(token_log_prob(candidate.log_weights, rows))
