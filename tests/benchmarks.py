"""Files of benchmarks as the hub has them: same schema, same layout, few rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Sequence, Value

from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.relevance import resolve_relevant_ids

TEXT, NUMBER = Value("string"), Value("int32")
ANSWERS = Sequence({"text": TEXT, "answer_start": NUMBER})
XQUAD = Features({"id": TEXT, "context": TEXT, "question": TEXT, "answers": ANSWERS})
FEATURES = {
    "mmlu": Features(
        {
            "question": TEXT,
            "subject": TEXT,
            "choices": Sequence(TEXT),
            "answer": ClassLabel(names=["A", "B", "C", "D"]),
        }
    ),
    "boolq": Features({"question": TEXT, "answer": Value("bool"), "passage": TEXT}),
    "hellaswag": Features(
        {
            "ind": NUMBER,
            **dict.fromkeys(("activity_label", "ctx_a", "ctx_b", "ctx"), TEXT),
            "endings": Sequence(TEXT),
            **dict.fromkeys(("source_id", "split", "split_type", "label"), TEXT),
        }
    ),
    "nq_open": Features({"question": TEXT, "answer": Sequence(TEXT)}),
    "pubmed_qa": Features(
        {
            "pubid": NUMBER,
            "question": TEXT,
            "context": Sequence(
                dict.fromkeys(("contexts", "labels", "meshes", "reasoning_required_pred", "reasoning_free_pred"), TEXT)
            ),
            "long_answer": TEXT,
            "final_decision": TEXT,
        }
    ),
    "xquad": XQUAD,
    "squad_v2": Features({"id": TEXT, "title": TEXT, "context": TEXT, "question": TEXT, "answers": ANSWERS}),
    "hotpot_qa": Features(
        {
            **dict.fromkeys(("id", "question", "answer", "type", "level"), TEXT),
            "supporting_facts": Sequence({"title": TEXT, "sent_id": NUMBER}),
            "context": Sequence({"title": TEXT, "sentences": Sequence(TEXT)}),
        }
    ),
    "trivia_qa": Features(
        {
            **dict.fromkeys(("question", "question_id", "question_source"), TEXT),
            "entity_pages": Sequence(
                dict.fromkeys(("doc_source", "filename", "title", "wiki_context"), TEXT),
            ),
            "search_results": Sequence(
                {
                    **dict.fromkeys(("description", "filename"), TEXT),
                    "rank": NUMBER,
                    **dict.fromkeys(("title", "url", "search_context"), TEXT),
                }
            ),
            "answer": {
                "aliases": Sequence(TEXT),
                "normalized_aliases": Sequence(TEXT),
                "matched_wiki_entity_name": TEXT,
                "normalized_matched_wiki_entity_name": TEXT,
                "normalized_value": TEXT,
                "type": TEXT,
                "value": TEXT,
            },
        }
    ),
    "fever": Features(
        {
            "id": NUMBER,
            "label": TEXT,
            "claim": TEXT,
            "evidence_annotation_id": NUMBER,
            "evidence_id": NUMBER,
            "evidence_wiki_url": TEXT,
            "evidence_sentence_id": NUMBER,
        }
    ),
    "beir_corpus": Features({"_id": TEXT, "title": TEXT, "text": TEXT}),
    "beir_qrels": Features({"query-id": TEXT, "corpus-id": TEXT, "score": NUMBER}),
}


def write_parquet(folder: Path, file: str, schema: str, *rows: dict[str, Any]) -> str:
    """Write rows in a benchmark's schema, and return the folder; columns that a row lacks are null."""
    features = FEATURES[schema]
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row.get(name) for row in rows] for name in features}
    Dataset.from_dict(columns, features=features).to_parquet(str(path))
    return str(folder)


def summary(examples: list[Example]) -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Return query, accepted answers and choices of each example."""
    return [(example.query, example.responses, example.choices) for example in examples]


def relevant_texts(examples: list[Example], nodes: list[KnowledgeNode]) -> list[list[str]]:
    """Return the texts of each example's relevant passages, after checking that all of them are in the corpus."""
    texts = {node.id: node.text for node in nodes}
    return [
        [texts[relevant_id] for relevant_id in example.relevant_ids]
        for example in resolve_relevant_ids(examples, nodes)
    ]
