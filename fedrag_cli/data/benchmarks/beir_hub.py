"""BEIR: retrieval benchmarks of many fields, from the hub.

Source: Thakur et al., "BEIR: A Heterogenous Benchmark for Zero-shot Evaluation of Information Retrieval Models", arXiv
2104.08663; on the hub, `BeIR/<name>` has documents and queries, and `BeIR/<name>-qrels` the judgements. The authors
join title and text of a document, and report nDCG@10.
"""

from __future__ import annotations

from fedrag_cli.data.benchmarks.config import BeirHubCorpusConfig, BeirHubExamplesConfig
from fedrag_cli.data.benchmarks.loading import HubSplit, table_of
from fedrag_cli.data.corpora import nodes_of_beir_table, split_nodes
from fedrag_cli.data.examples import Example, judged_examples
from fedrag_cli.data.formats import judgements_of_table, queries_of_table
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ConfigError


def load_examples(config: BeirHubExamplesConfig) -> list[Example]:
    """Load the judged queries; they have relevant ids and no answers.

    Raises:
        ConfigError: A revision is given for a local copy, or only the judgements have a local copy.
        DataError: The queries or the judgements are missing or bad.
    """
    if config.path is None and config.qrels_path is not None:
        raise ConfigError("`qrels_path` is set without `path`.", "Set `path` to the copy of the queries.")
    queries = _source(config.name, "queries", config.path, config.revision)
    judgements = HubSplit(
        f"BeIR/{config.name}-qrels",
        None,
        config.split,
        config.qrels_path or config.path,
        config.qrels_revision,
        (".", "qrels", "data", "default"),
    )
    relevant = judgements_of_table(table_of(judgements))
    examples = judged_examples(queries_of_table(table_of(queries)), relevant, judgements.label, queries.label)
    return examples[: config.limit]


def load_corpus(config: BeirHubCorpusConfig) -> list[KnowledgeNode]:
    """Load the documents; title and text are joined.

    Raises:
        ConfigError: A revision is given for a local copy, or the sizes of the split do not fit each other.
        DataError: The documents are missing or bad.
    """
    table = table_of(_source(config.name, "corpus", config.path, config.revision), config.limit)
    return split_nodes(nodes_of_beir_table(table), config.split)


def _source(name: str, part: str, path: str | None, revision: str | None) -> HubSplit:
    return HubSplit(f"BeIR/{name}", part, part, path, revision, (part, "."))
