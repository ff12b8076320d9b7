"""XQuAD: 240 paragraphs and 1,190 questions of SQuAD 1.1, translated by professionals into eleven languages.

Source: Artetxe et al., "On the Cross-lingual Transferability of Monolingual Representations", arXiv 1910.11856;
`google/xquad` on the hub. The authors report exact match and F1 by language, on models that were trained on English.
"""

from __future__ import annotations

from fedrag_cli.data.benchmarks.config import XquadCorpusConfig, XquadExamplesConfig
from fedrag_cli.data.benchmarks.loading import load_passages, map_rows, named_split
from fedrag_cli.data.benchmarks.squad_v2 import answerable_example, paragraphs
from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode

REPOSITORY = "google/xquad"


def load_examples(config: XquadExamplesConfig) -> list[Example]:
    """Load the questions; the relevant id is that of the paragraph.

    Args:
        config: The language and the split.

    Raises:
        ConfigError: A revision is given for a local copy.
        DataError: The split is missing or bad.
    """
    source = named_split(REPOSITORY, config, config.split)
    return [example for _, example in map_rows(source, config.limit, answerable_example)]


def load_corpus(config: XquadCorpusConfig) -> list[KnowledgeNode]:
    """Load the paragraphs, each one once.

    Args:
        config: The language and the splits.

    Raises:
        ConfigError: A revision is given for a local copy, or the sizes of the split do not fit each other.
        DataError: A split is missing or bad.
    """
    return load_passages(config, lambda split: named_split(REPOSITORY, config, split), paragraphs)
