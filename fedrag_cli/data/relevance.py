"""Relevant ids of examples against the passages of a corpus."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.problems import Problems
from fedrag_cli.errors import DataError


def resolve_relevant_ids(examples: Sequence[Example], nodes: Iterable[KnowledgeNode]) -> list[Example]:
    """Return the examples with relevant ids that all name passages.

    An id that names a document which was split becomes the ids of those of its passages that contain an accepted
    answer, whatever its case; of all its passages, where none does.

    Args:
        examples: The examples.
        nodes: The passages of the corpus.

    Raises:
        DataError: Ids name neither a passage nor a document.
    """
    passage_ids = set()
    documents: dict[str, list[KnowledgeNode]] = {}
    for node in nodes:
        passage_ids.add(node.id)
        if "document_id" in node.metadata:
            documents.setdefault(str(node.metadata["document_id"]), []).append(node)
    problems = Problems("the relevant ids")
    resolved = []
    for example in examples:
        ids: dict[str, None] = {}
        for relevant_id in example.relevant_ids:
            if relevant_id in passage_ids:
                ids[relevant_id] = None
            elif relevant_id in documents:
                ids.update(dict.fromkeys(_passages_with_answer(example, documents[relevant_id])))
            else:
                where = example.place or f"example '{example.id}'"
                problems.add(where, f"the relevant id '{relevant_id}' is no passage and no document of the corpus")
        resolved.append(dataclasses.replace(example, relevant_ids=tuple(ids)))
    problems.raise_if_any("Check that examples and corpus belong together, and that no `limit` cuts the corpus short.")
    return resolved


def judged_examples(examples: Sequence[Example], nodes: Iterable[KnowledgeNode], split: str) -> list[Example]:
    """Return the examples whose relevant passages are known, with ids that all name passages.

    Args:
        examples: The examples; none stay none.
        nodes: The passages of the corpus.
        split: Where the examples come from, for the message.

    Raises:
        DataError: No example has relevant ids, or ids name neither a passage nor a document.
    """
    judged = [example for example in resolve_relevant_ids(examples, nodes) if example.relevant_ids]
    if examples and not judged:
        raise DataError(
            f"None of the {len(examples)} examples of {split} has relevant ids, which this objective needs.",
            "Add a relevant_ids column (columns.relevant_ids names it), or choose an objective that learns from the "
            "answers alone.",
        )
    return judged


def _passages_with_answer(example: Example, passages: Sequence[KnowledgeNode]) -> list[str]:
    answers = [_normalized(answer) for answer in example.responses]
    found = [node.id for node in passages if any(answer in _normalized(node.text) for answer in answers)]
    return found or [node.id for node in passages]


def _normalized(text: str) -> str:
    return " ".join(text.split()).casefold()
