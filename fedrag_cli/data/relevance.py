"""Relevant ids of examples against the passages of a corpus, and what is the same under another id or spelling."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.row_problems import Problems
from fedrag_cli.errors import DataError

# Between digits a mark belongs to the number, and these signs to formulas and names such as C#.
_MARKS = re.compile(r"(?<!\d)[^\w\s]+|[^\w\s]+(?!\d)")
_KEPT_MARKS = frozenset("#%&*/@\\")
# Characters that keyboards and word processors put in the place of one another, and those that only vary a form.
_ALIKE = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u2032\u00b4`", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        **dict.fromkeys(map(chr, range(0xFE00, 0xFE10))),
    }
)
_MINUS = re.compile(r"(?<!\w)-(?=\d)")


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Questions of one split that stand in another one too.

    Args:
        split: The split that is measured on.
        other: The split that shares questions with it.
        questions: Number of the questions of `split` that `other` has.
        of: Number of all questions of `split`.
        is_measured: Whether the difference that training made is measured on `split`.
    """

    split: str
    other: str
    questions: int
    of: int
    is_measured: bool

    @property
    def message(self) -> str:
        """What was found and what follows from it, in a sentence without its full stop."""
        if not self.is_measured:
            consequence = "what validates best may be what was learnt by heart"
        elif self.other != "train":
            consequence = "they chose the best checkpoint, so the difference flatters"
        elif self.questions == self.of:
            consequence = "the difference says nothing"
        else:
            consequence = "part of the difference may be what was learnt by heart"
        verb = "is" if self.questions == 1 else "are"
        return f"{self.questions} of {self.of} {self.split} questions {verb} also in {self.other}: {consequence}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, the sentence among them."""
        known = {"split": self.split, "other": self.other, "questions": self.questions, "of": self.of}
        return {**known, "message": self.message}


def find_overlaps(splits: Mapping[str, Sequence[Example]], measured: str | None) -> list[Overlap]:
    """Find splits that share questions, which makes what is measured on one of them look better than it is.

    Questions are the same where `question_key` is.

    Args:
        splits: The examples by split: `train`, `validation`, and what the evaluation measures on.
        measured: The split that the evaluation before and after training measures on, if any.
    """
    keys = {name: [question_key(example) for example in examples] for name, examples in splits.items()}
    pairs = [(name, other) for name, other in ((measured, "train"), (measured, "validation"), ("validation", "train"))]
    found = []
    for name, other in dict.fromkeys(pairs):
        if name is None or name == other or not keys.get(name) or not keys.get(other):
            continue
        known = set(keys[other])
        shared = sum(key in known for key in keys[name])
        if shared:
            found.append(Overlap(name, other, shared, len(keys[name]), is_measured=name == measured))
    return found


def question_key(example: Example) -> tuple[str, frozenset[str]]:
    """Return what two examples share that ask the same question.

    That is the question apart from case, white space, punctuation and Unicode form, and with multiple choice the
    choices, because "Which of these is true?" is another question with each set of them.
    """
    return normalized_question(example.query), frozenset(map(normalized_question, example.choices))


def normalized_question(text: str) -> str:
    """Return a question without what does not change it: case, white space, punctuation, Unicode form.

    Marks between digits, the sign of a number and # % & * / @ stay: 1.5 is not 15, -5 is not 5, and C# is not C.
    """
    plain = _MINUS.sub("\u2212", normalized_text(text))
    bare = _MARKS.sub(lambda found: "".join(_kept(character) for character in found[0]), plain)
    return " ".join(bare.split()) or plain


def normalized_text(text: str) -> str:
    """Return a text in one Unicode form (NFKC) and kind of quotes and dashes, without what does not change it.

    That is case, invisible characters and runs of white space.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.translate(_ALIKE)).casefold())
    if not folded.isascii():
        folded = "".join(character for character in folded if unicodedata.category(character) != "Cf")
    return " ".join(folded.split())


def first_ids(nodes: Iterable[KnowledgeNode]) -> dict[str, str]:
    """Return for each passage the id of the first one with the same text (see `normalized_text`), by its id.

    Passages are the same by their text alone, which is all that a retriever reads; titles and owners may differ.
    """
    first: dict[str, str] = {}
    return {node.id: first.setdefault(normalized_text(node.text), node.id) for node in nodes}


def _kept(mark: str) -> str:
    if mark in _KEPT_MARKS or not unicodedata.category(mark).startswith("P"):
        return mark
    return " " if unicodedata.category(mark) == "Pd" else ""


def resolve_relevant_ids(examples: Sequence[Example], nodes: Iterable[KnowledgeNode]) -> list[Example]:
    """Return the examples with relevant ids that all name passages.

    An id that names a document which was split becomes the ids of those of its passages that contain an accepted
    answer, whatever its case; of all its passages, where none does.

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


def distinct_ids(ids: Iterable[str], same: Mapping[str, str]) -> list[str]:
    """Return ids of passages without those whose text one before them has; `same` is what `first_ids` gives."""
    kept: dict[str, str] = {}
    for name in ids:
        kept.setdefault(same[name], name)
    return list(kept.values())


def not_negatives(
    examples: Sequence[Example], known: Iterable[Example], same: Mapping[str, str]
) -> list[frozenset[str]]:
    """Return for each example the ids of the passages that must not be its negatives or distractors.

    These are its relevant passages, those of any known example that asks the same question (see `question_key`), and
    all passages with the text of one of these.

    Args:
        examples: The examples, with relevant ids that name passages.
        known: Further examples whose relevant passages are known.
        same: What `first_ids` gives for all passages that negatives are taken from.
    """
    with_text: dict[str, list[str]] = {}
    for name, first in same.items():
        with_text.setdefault(first, []).append(name)
    of_question: dict[Any, dict[str, None]] = {}
    for example in (*examples, *known):
        found = of_question.setdefault(question_key(example), {})
        found.update(dict.fromkeys(same[name] for name in example.relevant_ids))
    return [
        frozenset(name for first in of_question[question_key(example)] for name in with_text[first])
        for example in examples
    ]


def judged_examples(examples: Sequence[Example], nodes: Iterable[KnowledgeNode], split: str) -> list[Example]:
    """Return the examples whose relevant passages are known, with ids that all name passages.

    Args:
        examples: The examples; none stay none.
        nodes: The passages of the corpus.
        split: Where the examples come from, for the message.

    Raises:
        DataError: No example has relevant ids, or ids name neither a passage nor a document.
    """
    return require_judged(resolve_relevant_ids(examples, nodes), split)


def require_judged(examples: Sequence[Example], split: str) -> list[Example]:
    """Return those of the examples that have relevant ids; raise DataError where none of them has any."""
    judged = [example for example in examples if example.relevant_ids]
    if examples and not judged:
        raise DataError(
            f"None of the {len(examples)} examples of {split} has relevant ids, which this objective needs.",
            "Add a relevant_ids column (columns.relevant_ids names it), or choose an objective that learns from the "
            "answers alone.",
        )
    return judged


def _passages_with_answer(example: Example, passages: Sequence[KnowledgeNode]) -> list[str]:
    answers = [normalized_text(answer) for answer in example.responses]
    found = [node.id for node in passages if any(answer in normalized_text(node.text) for answer in answers)]
    return found or [node.id for node in passages]
