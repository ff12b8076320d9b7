"""Metrics of the generator: of the answers it writes, and of its likelihoods of given answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedrag_cli.config.fields import ANSWER_METRICS
from fedrag_cli.config.schema import EvaluationConfig
from fedrag_cli.data.examples import Example
from fedrag_cli.evaluation.answers import ROUGE_METRICS, exact_match, f1, rouge
from fedrag_cli.evaluation.result import EvaluationMemory, Values
from fedrag_cli.losses import token_log_prob
from fedrag_cli.rag.generators.base import Generator, TokenPair
from fedrag_cli.rag.knowledge_stores.base import ScoredNode
from fedrag_cli.rag.lengths import Lengths, TruncationCount
from fedrag_cli.rag.system import RAGAnswer, RAGSystem
from fedrag_cli.runs.reporter import Reporter

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
    generator: Generator,
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
    generator = rag_system.require_generator()
    encoded = [
        generator.encode_pair(query, [scored.node for scored in context], text, with_end=with_end)
        for context in rag_system.contexts(found)
    ]
    # All prompts of an ensemble are continued by the same tokens.
    pairs = [(prompt.ids, encoded[0].answer) for prompt in encoded]
    dropped = sum(prompt.dropped_tokens for prompt in encoded)
    return Candidate(key, text, rag_system.passage_log_weights(found), pairs, dropped)


def _together(candidate: Candidate, memory: EvaluationMemory) -> float:
    rows = torch.tensor([memory.get(KIND, f"{candidate.key} under {n}") for n in range(len(candidate.pairs))])
    return float(token_log_prob(candidate.log_weights, rows))


ANSWERS = "answers"
BARE_PROMPTS = "contexts cut to nothing"


def is_scored(example: Example, name: str) -> bool:
    """Return whether a metric of likelihoods applies to a question: to its choices, or to its first accepted answer."""
    if name == "accuracy":
        return bool(example.choices and example.responses)
    return any(text.strip() for text in example.responses[:1])


def require_prompts(rag_system: RAGSystem, example: Example, names: Sequence[str]) -> None:
    """Write all prompts that metrics need for a question, without passages.

    Raises:
        DataError: The question, with its answer or choices, does not fit into the context window, or has no tokens.
    """
    if set(names) & set(ANSWER_METRICS):
        rag_system.require_generator().encode_prompt(example.query, [])
    if any(name in names and is_scored(example, name) for name in ("negative_log_likelihood", "perplexity")):
        answer_candidate(rag_system, example, [])
    if "accuracy" in names:
        choice_candidates(rag_system, example, [])


def answer_values(
    rag_system: RAGSystem,
    examples: Sequence[Example],
    sources: Sequence[list[ScoredNode]],
    names: Sequence[str],
    predictions: list[dict[str, Any]],
    memory: EvaluationMemory,
    reporter: Reporter,
) -> tuple[dict[str, Values], dict[str, int], Lengths]:
    """Let the generator answer, and compare its answers with the accepted ones.

    Args:
        rag_system: What answers.
        examples: The questions; those without accepted answers are answered, but not counted.
        sources: The passages of each answer.
        names: Metrics of answers.
        predictions: Get the answers.
        memory: Knows the answers of an evaluation that was stopped.
        reporter: Shows the progress.

    Returns:
        The metrics; how many prompts were cut, also how many of them to nothing where there are such; and how much of
        them was.

    """
    missing = [position for position, example in enumerate(examples) if memory.get(ANSWERS, example.id) is None]

    def keep(positions: list[int], answers: list[RAGAnswer]) -> None:
        rows = zip(positions, answers, strict=True)
        kept = {n: [row.text, row.dropped_tokens, row.is_bare, row.prompt_tokens] for n, row in rows}
        memory.put(ANSWERS, {examples[missing[n]].id: values for n, values in kept.items()})

    with reporter.task("Answering", len(missing), "question") as advance:
        queries = [examples[position].query for position in missing]
        rag_system.answer(queries, [sources[position] for position in missing], advance, keep)
    answers = [
        RAGAnswer(example.query, text, found, dropped, *bare)
        for example, found in zip(examples, sources, strict=True)
        for text, dropped, *bare in [memory.get(ANSWERS, example.id)]
    ]
    values: dict[str, Values] = {name: {} for name in names}
    for position, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        predictions[position]["answer"] = answer.text
        for name in names if example.responses else ():
            values[name][position] = _answer_metric(name, answer.text, example.responses)
    truncation = TruncationCount()
    for answer in answers:
        truncation.add(answer.prompt_tokens, answer.dropped_tokens)
    cut = {"prompts": truncation.truncated}
    if bare_prompts := sum(answer.is_bare for answer in answers):
        cut[BARE_PROMPTS] = bare_prompts
    return values, cut, rag_system.require_generator().measure("evaluation prompts", truncation.to_dict())


def likelihood_values(
    rag_system: RAGSystem,
    examples: Sequence[Example],
    sources: Sequence[list[ScoredNode]],
    names: Sequence[str],
    settings: EvaluationConfig,
    predictions: list[dict[str, Any]],
    memory: EvaluationMemory,
    reporter: Reporter,
) -> tuple[dict[str, Values], Lengths]:
    """Score the accepted answers and the choices; return the metrics of these likelihoods, and how much was cut.

    - `negative_log_likelihood`: of the first accepted answer with its end token, mean over its tokens, in nats.
    - `perplexity`: its exponential.
    - `accuracy`: 1 where the choice with the best score is an accepted answer, else 0.

    Arguments as for `answer_values`; `settings.choice_score` says how choices are compared.
    """
    answered = [p for p, example in enumerate(examples) if is_scored(example, "negative_log_likelihood")]
    choosing = [p for p, example in enumerate(examples) if is_scored(example, "accuracy")]
    answers: dict[int, Candidate] = {}
    if set(names) & {"negative_log_likelihood", "perplexity"}:
        answers = {p: answer_candidate(rag_system, examples[p], sources[p]) for p in answered}
    choices: dict[int, list[Candidate]] = {}
    priors: list[Candidate] = []
    if "accuracy" in names:
        choices = {p: choice_candidates(rag_system, examples[p], sources[p]) for p in choosing}
    if choices and settings.choice_score == "prior":
        texts = dict.fromkeys(text for p in choosing for text in examples[p].choices)
        priors = [prior_candidate(rag_system, text) for text in texts]
    candidates = [*answers.values(), *(item for group in choices.values() for item in group), *priors]
    found = score_candidates(rag_system.require_generator(), candidates, memory, reporter)
    prior_scores = {prior.text: found[prior.key] for prior in priors}
    values: dict[str, Values] = {name: {} for name in names}
    for position, candidate in answers.items():
        loss = -found[candidate.key] / candidate.tokens
        for name, value in (("negative_log_likelihood", loss), ("perplexity", math.exp(min(loss, 700.0)))):
            if name in values:
                values[name][position] = value
    for position, group in choices.items():
        example = examples[position]
        chosen, scores = choose(example, group, found, settings, prior_scores)
        predictions[position] |= {"chosen": chosen, "choices": list(example.choices), "choice_scores": scores}
        values["accuracy"][position] = float(chosen in example.responses)
    count = TruncationCount()
    for candidate in candidates:
        read = sum(len(prompt) for prompt, _ in candidate.pairs)
        count.add(read + candidate.dropped_tokens, candidate.dropped_tokens)
    return values, rag_system.require_generator().measure("evaluation answers that are scored", count.to_dict())


def _answer_metric(name: str, answer: str, golds: Sequence[str]) -> float:
    if name in ROUGE_METRICS:
        return rouge(name, answer, golds)
    return exact_match(answer, golds) if name == "exact_match" else f1(answer, golds)
