"""Benchmarks whose answer is one of a few: BoolQ, FEVER, HellaSwag, MMLU and PubMedQA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedrag_cli.data.benchmarks.config import FeverExamplesConfig
from fedrag_cli.data.benchmarks.loading import (
    Benchmark,
    HubSplit,
    MissingLabelError,
    kept_metadata,
    label_value,
    map_rows,
    passage_id,
    texts_value,
)
from fedrag_cli.data.columns import answers_value, checked_text, get_value, id_value, text_value
from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.readers import kind_of
from fedrag_cli.data.row_problems import BadValueError, Problems

YES_OR_NO = ("yes", "no")
VERDICTS = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")
ENDINGS = ("0", "1", "2", "3")
LETTERS = ("A", "B", "C", "D")
DECISIONS = ("yes", "no", "maybe")
LABELLED_CLAIMS = {"v1.0": ("train", "labelled_dev", "paper_dev", "paper_test"), "v2.0": ("validation",)}


def _boolq_example(values: Mapping[str, Any]) -> Example:
    answer = get_value(values, "answer")
    if answer is None:
        raise MissingLabelError("answer is empty")
    if not isinstance(answer, bool):
        raise BadValueError(f"answer is {kind_of(answer)}, not a boolean")
    (passage,) = _boolq_passages(values)
    return Example("", text_value(values, "question"), ("yes" if answer else "no",), (passage.id,), {}, YES_OR_NO)


def _boolq_passages(values: Mapping[str, Any]) -> list[KnowledgeNode]:
    passage = text_value(values, "passage")
    return [KnowledgeNode(passage_id(passage), passage)]


BOOLQ = Benchmark("google/boolq", _boolq_example, _boolq_passages, ("train", "validation"))
"""Clark et al., "BoolQ: Exploring the Surprising Difficulty of Natural Yes/No Questions", arXiv 1905.10044.

The authors give question and passage, and report the accuracy.
"""


def _claim(values: Mapping[str, Any]) -> tuple[Example, str]:
    label = label_value(values, "label", VERDICTS)
    claim = Example(id_value(values, "id"), text_value(values, "claim"), (label,), choices=VERDICTS)
    page = get_value(values, "evidence_wiki_url")
    if page is not None and not isinstance(page, str):
        raise BadValueError(f"evidence_wiki_url is {kind_of(page)}, not a text")
    return claim, (page or "").strip()


def load_fever_examples(config: FeverExamplesConfig) -> list[Example]:
    """Load the claims of FEVER; the pages with evidence are in `evidence_pages` of the metadata.

    Thorne et al., "FEVER: a Large-scale Dataset for Fact Extraction and VERification", arXiv 1803.05355. The hub has
    one row for each sentence of evidence. The authors report the accuracy of the label, and the FEVER score, which asks
    for the evidence too. Wikipedia itself is not part of the benchmark here; the corpus of BEIR's FEVER has the same
    page names as ids.

    Raises:
        ConfigError: A revision is given for a local copy.
        DataError: The split is missing or bad, or has no labels.
    """
    folders = (config.name,)
    source = HubSplit("fever/fever", config.name, config.split, config.path, config.revision, folders, converted=True)
    problems = Problems(source.label)
    claims: dict[str, Example] = {}
    pages: dict[str, dict[str, None]] = {}
    # The limit counts claims, and nothing promises that the rows of a claim follow each other.
    for number, (claim, page) in map_rows(source, None, _claim, LABELLED_CLAIMS[config.name]):
        if claims.setdefault(claim.id, claim) != claim:
            problems.add(f"row {number}", f"claim {claim.id} has another text or label than in a row before it")
        pages.setdefault(claim.id, {}).update({page: None} if page else {})
    problems.raise_if_any()
    return [
        Example(
            claim.id,
            claim.query,
            claim.responses,
            tuple(pages[claim.id]) if config.relevant_pages else (),
            {"evidence_pages": list(pages[claim.id])},
            VERDICTS,
        )
        for claim in list(claims.values())[: config.limit]
    ]


def _hellaswag_example(values: Mapping[str, Any]) -> Example:
    label = label_value(values, "label", ENDINGS)
    query = f"{text_value(values, 'activity_label')}: {text_value(values, 'ctx')}"
    endings = texts_value(values, "endings")
    if len(endings) != len(ENDINGS):
        raise BadValueError(f"endings has {len(endings)} texts, not {len(ENDINGS)}")
    metadata = kept_metadata(values, "activity_label", "split_type", "source_id")
    return Example("", query, (endings[int(label)],), (), metadata, answers_value(values, "endings"))


HELLASWAG = Benchmark("Rowan/hellaswag", _hellaswag_example, labelled=("train", "validation"))
"""Zellers et al., "HellaSwag: Can a Machine Really Finish Your Sentence?", arXiv 1905.07830.

The authors report the accuracy, overall and for activities that are in the training data (`split_type` indomain) or are
not (zeroshot). Language models are compared by the likelihood of each ending after the context, so the query does not
list the endings.
"""


def _mmlu_example(values: Mapping[str, Any]) -> Example:
    question = text_value(values, "question")
    options = texts_value(values, "choices")
    if len(options) != len(LETTERS):
        raise BadValueError(f"choices has {len(options)} options, not {len(LETTERS)}")
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    answer = get_value(values, "answer")
    if answer is None or answer == -1:
        raise MissingLabelError("answer is empty")
    if isinstance(answer, bool) or answer not in range(len(LETTERS)):
        raise BadValueError(f"answer is '{answer}', not a number from 0 to {len(LETTERS) - 1}")
    query = "\n".join([question, *lines])
    return Example("", query, (LETTERS[int(answer)],), (), kept_metadata(values, "subject"), LETTERS)


MMLU = Benchmark("cais/mmlu", _mmlu_example, labelled=("test", "validation", "dev", "auxiliary_train"))
"""Hendrycks et al., "Measuring Massive Multitask Language Understanding", arXiv 2009.03300.

The authors show the question with its four options, lettered, and take the letter that the model finds most likely;
they report the accuracy by subject and overall.
"""


def _pubmed_qa_example(values: Mapping[str, Any]) -> Example:
    publication = id_value(values, "pubid")
    decision = label_value(values, "final_decision", DECISIONS)
    metadata = kept_metadata(values, "long_answer")
    return Example(publication, text_value(values, "question"), (decision,), (publication,), metadata, DECISIONS)


def _abstracts(values: Mapping[str, Any]) -> list[KnowledgeNode]:
    text = checked_text("\n".join(texts_value(values, "context.contexts")), "context.contexts")
    return [KnowledgeNode(id_value(values, "pubid"), text)]


PUBMED_QA = Benchmark("qiaojin/PubMedQA", _pubmed_qa_example, _abstracts, ("train",))
"""Jin et al., "PubMedQA: A Dataset for Biomedical Research Question Answering", arXiv 1909.06146.

The authors give the question and the abstract without its conclusion, and report the accuracy and the macro F1 of yes,
no and maybe. They do so on 500 of the 1,000 labelled questions, which the hub does not tell apart from the others.
"""
