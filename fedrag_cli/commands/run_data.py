"""The data of a run, read and checked, and the RAG system that fits them."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cached_property

from fedrag_cli.config import Config
from fedrag_cli.config.fields import generator_metrics_of
from fedrag_cli.config.validation import (
    evaluation_split,
    require_generator,
    trains_on_relevant_ids,
    trains_on_responses,
    trains_with_generator,
    tuned_sides,
)
from fedrag_cli.data.corpora import load_corpus
from fedrag_cli.data.examples import Example, load_examples
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.relevance import Overlap, find_overlaps, judged_examples, require_judged, resolve_relevant_ids
from fedrag_cli.data.row_problems import Problems
from fedrag_cli.errors import DataError
from fedrag_cli.evaluation.evaluator import choose_metrics, require_questions
from fedrag_cli.evaluation.generator_metrics import answer_candidate, require_prompts
from fedrag_cli.rag.build import build_rag_system, corpus_fingerprint
from fedrag_cli.rag.lengths import Lengths
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.runs.reporter import Reporter

MOST_MEASURED = 10_000
"""Passages whose length is looked at before training; `fedrag index` looks at all."""


@dataclass(frozen=True)
class RunData:
    """All data of a run, read and checked before any weight is loaded."""

    nodes: list[KnowledgeNode]
    train: list[Example]
    validation: list[Example]
    evaluation: list[Example]
    split: str | None

    @cached_property
    def corpus_fingerprint(self) -> str:
        """A hash over the passages."""
        return corpus_fingerprint(self.nodes)

    def counts(self) -> dict[str, int]:
        """Return the number of rows of each part."""
        counts = {"passages": len(self.nodes), "train": len(self.train), "validation": len(self.validation)}
        return {**counts, self.split: len(self.evaluation)} if self.split else counts

    def overlaps(self) -> list[Overlap]:
        """Return which splits share questions, so that what is measured flatters."""
        splits = {"train": self.train, "validation": self.validation}
        return find_overlaps(splits | ({self.split: self.evaluation} if self.split else {}), self.split)

    def fingerprints(self) -> dict[str, str]:
        """Return a hash of each part."""
        splits = {"train": self.train, "validation": self.validation}
        if self.split is not None:
            splits[self.split] = self.evaluation
        hashes = {name: corpus_fingerprint([_as_node(example) for example in rows]) for name, rows in splits.items()}
        return {"passages": self.corpus_fingerprint, **hashes}


def _as_node(example: Example) -> KnowledgeNode:
    """Put all of an example that training or evaluation looks at into what can be hashed."""
    known = {"relevant_ids": list(example.relevant_ids), "choices": list(example.choices)}
    return KnowledgeNode(example.query, "|".join(example.responses), known)


def load_run_data(config: Config) -> RunData:
    """Read corpus and examples and check that they fit each other; raise DataError where anything is missing or bad."""
    nodes = load_corpus(config.dataset.corpus)
    dataset, split = config.dataset, evaluation_split(config)
    on_answers = trains_on_responses(config)
    questions = resolve_relevant_ids(load_questions(config, split), nodes) if split is not None else []
    validation: list[Example] = []
    if dataset.validation is not None:
        # What clients report of a federation is measured on their validation split.
        reported = generator_metrics_of(config.federated.metrics) if config.federated is not None else []
        validation = load_examples(dataset.validation, needs_responses=on_answers or bool(reported))
        validation = resolve_relevant_ids(validation, nodes)
    train = load_examples(dataset.train, needs_responses=on_answers) if dataset.train is not None else []
    if trains_on_relevant_ids(config):
        judged_examples(train, nodes, "dataset.train")
        require_judged(validation, "dataset.validation")
    return RunData(nodes, train, validation, questions[: config.evaluation.limit], split)


def load_questions(config: Config, split: str) -> list[Example]:
    """Read the examples of a split to evaluate on; each must have an answer where a metric looks at answers."""
    source, settings = getattr(config.dataset, split), config.evaluation
    examples = load_examples(source, needs_responses=False)
    if all(example.responses for example in examples):
        return examples
    asked = examples[: settings.limit]
    chosen = choose_metrics(None, tuned_sides(config), asked, settings.context)
    wanted = chosen if settings.metrics is None else settings.metrics
    return load_examples(source) if generator_metrics_of(wanted) else examples


def load_rag_system(config: Config, data: RunData, reporter: Reporter) -> RAGSystem:
    """Build the RAG system of a run, with the generator where training or evaluation uses it, and check the data by it.

    Raises:
        DataError: A question and its answer do not fit into the generator's context window even without passages, an
            answer has no tokens, or a passage does not fit the prompt's template.
    """
    with_generator = uses_generator(config, data)
    rag_system = build_rag_system(
        config,
        nodes=data.nodes,
        fingerprint=data.corpus_fingerprint,
        with_generator=with_generator,
        reporter=reporter,
    )
    if with_generator and rag_system.generator is not None:
        _require_prompts(config, data, rag_system)
    # Every training collects garbage, every round and client of a simulation anew, and the libraries' objects, which
    # all live on, are most of what it would look through.
    gc.collect()
    gc.freeze()
    return rag_system


def measured_lengths(rag_system: RAGSystem, data: RunData) -> list[Lengths]:
    """Return how long passages and questions are beside the retriever's limit; of very many passages some are read."""
    passages = [node.text for node in data.nodes[:: -(-len(data.nodes) // MOST_MEASURED) or 1]]
    some = len(passages) < len(data.nodes)
    queries = [example.query for example in (*data.train, *data.validation, *data.evaluation)]
    return [
        rag_system.retriever.measure(passages, "passages" + " that were looked at" * some, queries=False),
        rag_system.retriever.measure(queries, "questions", queries=True),
    ]


def uses_generator(config: Config, data: RunData) -> bool:
    """Return whether training or evaluation uses the generator; raises as `chosen_metrics`."""
    return trains_with_generator(config) or bool(generator_metrics_of(chosen_metrics(config, data)))


def _require_prompts(config: Config, data: RunData, rag_system: RAGSystem) -> None:
    """Raise DataError with every row that cannot be asked, answered or learnt from, whatever is retrieved for it."""
    generator = rag_system.require_generator()
    for node in data.nodes:
        generator.context([node])
    validated = [getattr(config.trainer, side).validation.metric for side in tuned_sides(config)]
    validated += list(config.federated.metrics) if config.federated is not None else []
    checked = [
        ("train", data.train, trains_with_generator(config), []),
        ("validation", data.validation, trains_with_generator(config), [name for name in validated if name]),
    ]
    if data.split is not None:
        checked.append((data.split, data.evaluation, False, chosen_metrics(config, data)))
    problems = Problems("the data")
    hints: dict[str, None] = {}
    for split, examples, learns, metrics in checked:
        for example in examples:
            try:
                if learns:
                    answer_candidate(rag_system, example, [])
                require_prompts(rag_system, example, metrics)
            except DataError as error:
                where = example.place or f"example '{example.id}'"
                problems.add(where, f"dataset.{split}: {error.message}")
                hints[error.hint] = None
    problems.raise_if_any(" ".join(hints))


def chosen_metrics(config: Config, data: RunData) -> list[str]:
    """Return the metrics of the evaluation before and after; none where there is nothing to evaluate on.

    Raises:
        ConfigError: A metric needs a generator that is not there.
        DataError: A metric, the context or the groups need what the questions do not have.
    """
    if data.split is None:
        return []
    settings = config.evaluation
    metrics = choose_metrics(settings.metrics, tuned_sides(config), data.evaluation, settings.context)
    require_questions(data.evaluation, metrics, settings)
    answering = generator_metrics_of(metrics)
    if answering:
        require_generator(config, f"computing {' and '.join(answering)}")
    return metrics
