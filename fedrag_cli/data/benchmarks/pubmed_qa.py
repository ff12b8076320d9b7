"""PubMedQA: questions that are titles of biomedical papers, answered by the papers' abstracts.

Source: Jin et al., "PubMedQA: A Dataset for Biomedical Research Question Answering", arXiv 1909.06146;
`qiaojin/PubMedQA` on the hub. The authors give the question and the abstract without its conclusion, and report the
accuracy and the macro F1 of yes, no and maybe. They do so on 500 of the 1,000 labelled questions, which the hub does
not tell apart from the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedrag_cli.data.benchmarks.config import PubmedCorpusConfig, PubmedExamplesConfig
from fedrag_cli.data.benchmarks.loading import load_passages, map_rows, named_split
from fedrag_cli.data.benchmarks.values import kept_metadata, label_value, texts_value
from fedrag_cli.data.columns import checked_text, id_value, text_value
from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode

REPOSITORY = "qiaojin/PubMedQA"
CHOICES = ("yes", "no", "maybe")
LABELLED = ("train",)


def load_examples(config: PubmedExamplesConfig) -> list[Example]:
    """Load the questions; the relevant id is that of the abstract.

    Args:
        config: The configuration and the split.

    Raises:
        ConfigError: A revision is given for a local copy.
        DataError: The split is missing or bad.
    """
    source = named_split(REPOSITORY, config, config.split)
    return [example for _, example in map_rows(source, config.limit, _example, LABELLED)]


def load_corpus(config: PubmedCorpusConfig) -> list[KnowledgeNode]:
    """Load the abstracts.

    Args:
        config: The configuration and the splits.

    Raises:
        ConfigError: A revision is given for a local copy, or the sizes of the split do not fit each other.
        DataError: A split is missing or bad.
    """
    return load_passages(config, lambda split: named_split(REPOSITORY, config, split), _abstracts)


def _example(values: Mapping[str, Any]) -> Example:
    publication = id_value(values, "pubid")
    return Example(
        publication,
        text_value(values, "question"),
        (label_value(values, "final_decision", CHOICES),),
        (publication,),
        kept_metadata(values, "long_answer"),
        CHOICES,
    )


def _abstracts(values: Mapping[str, Any]) -> list[KnowledgeNode]:
    text = checked_text("\n".join(texts_value(values, "context.contexts")), "context.contexts")
    return [KnowledgeNode(id_value(values, "pubid"), text)]
