"""HotpotQA: questions whose answers need two paragraphs of Wikipedia.

Source: Yang et al., "HotpotQA: A Dataset for Diverse, Explainable Multi-hop Question Answering", arXiv 1809.09600;
`hotpotqa/hotpot_qa` on the hub, configuration distractor, where each question has its two paragraphs and eight others.
The authors report exact match and F1 of the answer and of the supporting facts, by `type` (bridge, comparison) and
`level` too. The configuration fullwiki is left out: its contexts are what a retriever found, which often lack the
supporting paragraphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedrag_cli.data.benchmarks.config import HotpotCorpusConfig, HotpotExamplesConfig
from fedrag_cli.data.benchmarks.loading import HubSplit, load_passages, map_rows
from fedrag_cli.data.benchmarks.values import kept_metadata, passage_id, texts_value
from fedrag_cli.data.columns import answers_value, checked_text, get_value, id_value, text_value
from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.readers import kind_of
from fedrag_cli.data.row_problems import BadValueError


def load_examples(config: HotpotExamplesConfig) -> list[Example]:
    """Load the questions; the relevant ids are those of the supporting paragraphs.

    Args:
        config: The split.

    Raises:
        ConfigError: A revision is given for a local copy.
        DataError: The split is missing or bad.
    """
    rows = map_rows(_source(config.split, config.path, config.revision), config.limit, _example)
    return [example for _, example in rows]


def load_corpus(config: HotpotCorpusConfig) -> list[KnowledgeNode]:
    """Load the paragraphs of all contexts, each one once.

    Args:
        config: The splits.

    Raises:
        ConfigError: A revision is given for a local copy, or the sizes of the split do not fit each other.
        DataError: A split is missing or bad.
    """
    return load_passages(config, lambda split: _source(split, config.path, config.revision), _paragraphs)


def _source(split: str, path: str | None, revision: str | None) -> HubSplit:
    return HubSplit("hotpotqa/hotpot_qa", "distractor", split, path, revision, ("distractor",))


def _example(values: Mapping[str, Any]) -> Example:
    paragraphs = _paragraphs(values)
    titles = dict.fromkeys(texts_value(values, "supporting_facts.title"))
    absent = titles.keys() - {node.metadata["title"] for node in paragraphs}
    if absent:
        raise BadValueError(f"the supporting page '{min(absent)}' is not in its context")
    return Example(
        id_value(values, "id"),
        text_value(values, "question"),
        answers_value(values, "answer"),
        tuple(dict.fromkeys(node.id for node in paragraphs if node.metadata["title"] in titles)),
        kept_metadata(values, "type", "level"),
    )


def _paragraphs(values: Mapping[str, Any]) -> list[KnowledgeNode]:
    titles = texts_value(values, "context.title")
    contents = get_value(values, "context.sentences")
    if not isinstance(contents, list | tuple) or len(contents) != len(titles):
        raise BadValueError("context.sentences is no list of as many items as context.title")
    return [
        _paragraph(checked_text(title, "context.title"), content)
        for title, content in zip(titles, contents, strict=True)
    ]


def _paragraph(title: str, sentences: Any) -> KnowledgeNode:
    if not isinstance(sentences, list | tuple) or not all(isinstance(sentence, str) for sentence in sentences):
        raise BadValueError(f"context.sentences of '{title}' is {kind_of(sentences)}, not a list of texts")
    content = " ".join(sentence.strip() for sentence in sentences if sentence.strip())
    text = checked_text(f"{title}: {content}", "context.sentences")
    return KnowledgeNode(passage_id(text, title), text, {"title": title})
