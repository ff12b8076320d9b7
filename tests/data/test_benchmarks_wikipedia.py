"""Benchmarks with several pages of Wikipedia a question, read from local copies of their hub repositories."""

import datasets
import pytest
from benchmarks import relevant_texts, summary, write_parquet

from fedrag_cli.data.benchmarks.config import (
    FeverExamplesConfig,
    HotpotCorpusConfig,
    HotpotExamplesConfig,
    TriviaCorpusConfig,
    TriviaExamplesConfig,
)
from fedrag_cli.data.config import SplitConfig
from fedrag_cli.data.corpora import load_corpus
from fedrag_cli.data.examples import Example, load_examples
from fedrag_cli.data.relevance import resolve_relevant_ids
from fedrag_cli.errors import DataError


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def hotpot_row(number, supporting, context):
    return {
        "id": f"h{number}",
        "question": f"Q{number}?",
        "answer": "yes",
        "type": "comparison",
        "level": "hard",
        "supporting_facts": {"title": supporting, "sent_id": [0] * len(supporting)},
        "context": {"title": list(context), "sentences": list(context.values())},
    }


def test_hotpot_qa(tmp_path):
    first = hotpot_row(1, ["Ann", "Bob", "Ann"], {"Bob": ["Is old."], "Ann": ["Is ", " Bob's."], "Eve": ["Left."]})
    second = hotpot_row(2, ["Ann", "Eve"], {"Ann": ["Is someone else."], "Eve": ["Left."]})
    path = write_parquet(tmp_path, "distractor/validation-00000-of-00001.parquet", "hotpot_qa", first, second)
    examples, nodes = load_examples(HotpotExamplesConfig(path=path)), load_corpus(HotpotCorpusConfig(path=path))
    assert summary(examples) == [("Q1?", ("yes",), ()), ("Q2?", ("yes",), ())]
    assert examples[0].metadata == {"type": "comparison", "level": "hard"}
    assert [node.text for node in nodes] == ["Bob: Is old.", "Ann: Is Bob's.", "Eve: Left.", "Ann: Is someone else."]
    assert relevant_texts(examples, nodes) == [
        ["Bob: Is old.", "Ann: Is Bob's."],
        ["Ann: Is someone else.", "Eve: Left."],
    ]
    write_parquet(tmp_path, "distractor/train-00000-of-00001.parquet", "hotpot_qa", hotpot_row(1, ["Al"], {"Bo": []}))
    with pytest.raises(DataError, match="distractor train:\nrow 1: the supporting page 'Al' is not in its context"):
        load_examples(HotpotExamplesConfig(path=path, split="train"))


def trivia_row(number, value, aliases, pages):
    return {
        "question": f"Q{number}?",
        "question_id": f"tc_{number}",
        "question_source": "http://quiz.example",
        "entity_pages": {
            "doc_source": ["TagMe"] * len(pages),
            "filename": [f"{page}.txt" for page in pages],
            "title": [page.replace("_", " ") for page in pages],
            "wiki_context": list(pages.values()),
        },
        "search_results": {name: [] for name in ("description", "filename", "rank", "title", "url", "search_context")},
        "answer": {"aliases": aliases, "normalized_aliases": aliases, "type": "WikipediaEntity", "value": value},
    }


def test_trivia_qa(tmp_path):
    page = "Nobody knows. " * 20
    first = trivia_row(1, "The sun", ["Sun", "The sun", ""], {"The_Sun": "It is the Sun. " + page, "Moon": page})
    second = trivia_row(2, "Moon", ["Luna"], {"Moon": page})
    path = write_parquet(tmp_path, "rc.wikipedia/validation-00000-of-00001.parquet", "trivia_qa", first, second)
    examples = load_examples(TriviaExamplesConfig(path=path))
    assert summary(examples) == [("Q1?", ("The sun", "Sun"), ()), ("Q2?", ("Moon", "Luna"), ())]
    assert [item.relevant_ids for item in examples] == [("The_Sun", "Moon"), ("Moon",)]
    whole = load_corpus(TriviaCorpusConfig(path=path, split=None))
    assert [(node.id, node.metadata) for node in whole] == [
        ("The_Sun", {"title": "The Sun"}),
        ("Moon", {"title": "Moon"}),
    ]
    passages = load_corpus(TriviaCorpusConfig(path=path, split=SplitConfig(size=20, overlap=0)))
    resolved = resolve_relevant_ids(examples, passages)
    assert resolved[0].relevant_ids[0] == "The_Sun#0"
    assert resolved[1].relevant_ids == ("Moon#0", "Moon#1")


def test_trivia_qa_without_labels(tmp_path):
    row = trivia_row(1, "<unk>", [], {"Moon": "x"})
    path = write_parquet(tmp_path, "rc.wikipedia/test-00000-of-00001.parquet", "trivia_qa", row)
    with pytest.raises(DataError, match=r"rc.wikipedia test row 1: answer.value is '<unk>'") as caught:
        load_examples(TriviaExamplesConfig(path=path, split="test"))
    assert caught.value.hint == "The splits with labels are: train, validation."
    assert len(load_corpus(TriviaCorpusConfig(path=path, data_splits=("test",)))) == 1
    rows = [trivia_row(1, "a", [], {"Moon": "x"}), trivia_row(2, "a", [], {"Moon": "y"})]
    write_parquet(tmp_path, "rc.wikipedia/train-00000-of-00001.parquet", "trivia_qa", *rows)
    with pytest.raises(DataError, match="row 2: the passage 'Moon' has another text than in a row before it"):
        load_corpus(TriviaCorpusConfig(path=path, data_splits=("train",)))


def fever_row(number, label, page="", claim="C."):
    return {
        "id": number,
        "label": label,
        "claim": claim,
        "evidence_annotation_id": 1,
        "evidence_id": 1 if page else -1,
        "evidence_wiki_url": page,
        "evidence_sentence_id": 0 if page else -1,
    }


def test_fever(tmp_path):
    rows = [
        fever_row(7, "SUPPORTS", "Ann_-LRB-film-RRB-"),
        fever_row(8, "NOT ENOUGH INFO"),
        fever_row(7, "SUPPORTS", "Bob"),
        fever_row(7, "SUPPORTS", "Bob"),
        fever_row(9, "REFUTES", "Bob"),
    ]
    path = write_parquet(tmp_path, "v1.0/labelled_dev/0000.parquet", "fever", *rows)
    choices = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")
    examples = load_examples(FeverExamplesConfig(path=path, limit=2))
    assert examples == [
        Example("7", "C.", ("SUPPORTS",), (), {"evidence_pages": ["Ann_-LRB-film-RRB-", "Bob"]}, choices),
        Example("8", "C.", ("NOT ENOUGH INFO",), (), {"evidence_pages": []}, choices),
    ]
    judged = load_examples(FeverExamplesConfig(path=path, relevant_pages=True))
    assert [item.relevant_ids for item in judged] == [("Ann_-LRB-film-RRB-", "Bob"), (), ("Bob",)]


def test_bad_fever(tmp_path):
    path = write_parquet(tmp_path, "v1.0/unlabelled_dev/0000.parquet", "fever", fever_row(7, ""))
    with pytest.raises(DataError, match=r"fever/fever v1.0 unlabelled_dev row 1: label is empty") as caught:
        load_examples(FeverExamplesConfig(path=path, split="unlabelled_dev"))
    assert caught.value.hint == "The splits with labels are: train, labelled_dev, paper_dev, paper_test."
    rows = [fever_row(7, "SUPPORTS", "Bob"), fever_row(7, "REFUTES", "Bob")]
    write_parquet(tmp_path, "v1.0/labelled_dev/0000.parquet", "fever", *rows)
    with pytest.raises(DataError, match="row 2: claim 7 has another text or label than in a row before it"):
        load_examples(FeverExamplesConfig(path=path))
