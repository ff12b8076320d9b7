"""Benchmarks that are read from local copies of their hub repositories."""

import datasets
import pytest
from benchmarks import relevant_texts, summary, write_parquet

from fedrag_cli.data.benchmarks.config import (
    BoolqCorpusConfig,
    BoolqExamplesConfig,
    HellaswagExamplesConfig,
    MmluExamplesConfig,
    NqOpenExamplesConfig,
    PubmedCorpusConfig,
    PubmedExamplesConfig,
    Squad2CorpusConfig,
    Squad2ExamplesConfig,
    XquadCorpusConfig,
    XquadExamplesConfig,
)
from fedrag_cli.data.corpora import load_corpus
from fedrag_cli.data.examples import Example, load_examples
from fedrag_cli.errors import DataError


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def test_mmlu(tmp_path):
    rows = [
        {"question": "2 + 2?\n", "subject": "arithmetic", "choices": ["1", "2", "3", "4"], "answer": 3},
        {"question": "Which?", "subject": "logic", "choices": ["this", "that", "that", " "], "answer": 0},
    ]
    path = write_parquet(tmp_path, "all/test-00000-of-00001.parquet", "mmlu", *rows)
    examples = load_examples(MmluExamplesConfig(path=path))
    letters = ("A", "B", "C", "D")
    assert summary(examples) == [
        ("2 + 2?\nA. 1\nB. 2\nC. 3\nD. 4", ("D",), letters),
        ("Which?\nA. this\nB. that\nC. that\nD. ", ("A",), letters),
    ]
    assert [(item.id, item.metadata) for item in examples] == [
        ("all-test-00001", {"subject": "arithmetic"}),
        ("all-test-00002", {"subject": "logic"}),
    ]
    assert len(load_examples(MmluExamplesConfig(path=path, limit=1))) == 1
    with pytest.raises(DataError, match="has no files of cais/mmlu anatomy test") as caught:
        load_examples(MmluExamplesConfig(path=path, name="anatomy"))
    assert caught.value.hint == "Its folders with data are: all."
    with pytest.raises(DataError, match="has no files of cais/mmlu all dev") as caught:
        load_examples(MmluExamplesConfig(path=path, split="dev"))
    assert caught.value.hint == "Its splits are: test."


def test_bad_rows_of_mmlu(tmp_path):
    row = {"question": "Q?", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 0}
    bad = [{**row, "choices": ["a"]}, {**row, "question": " "}, {**row, "choices": None}]
    path = write_parquet(tmp_path, "all/test-00000-of-00001.parquet", "mmlu", row, *bad)
    with pytest.raises(DataError) as caught:
        load_examples(MmluExamplesConfig(path=path))
    assert caught.value.message.splitlines() == [
        "3 problems in cais/mmlu all test:",
        "row 2: choices has 1 options, not 4",
        "row 3: question is blank",
        "row 4: choices is null, not a list of texts",
    ]
    write_parquet(tmp_path, "all/test-00000-of-00001.parquet", "mmlu", {**row, "answer": None})
    with pytest.raises(DataError, match="cais/mmlu all test row 1: answer is empty"):
        load_examples(MmluExamplesConfig(path=path))


def test_boolq(tmp_path):
    rows = [
        {"question": "is it", "answer": True, "passage": "It is. "},
        {"question": "was it", "answer": False, "passage": "It is."},
        {"question": "will it", "answer": False, "passage": "It may."},
    ]
    path = write_parquet(tmp_path, "data/validation-00000-of-00001.parquet", "boolq", *rows)
    examples, nodes = load_examples(BoolqExamplesConfig(path=path)), load_corpus(BoolqCorpusConfig(path=path))
    choices = ("yes", "no")
    assert summary(examples) == [
        ("is it", ("yes",), choices),
        ("was it", ("no",), choices),
        ("will it", ("no",), choices),
    ]
    assert [node.text for node in nodes] == ["It is.", "It may."]
    assert relevant_texts(examples, nodes) == [["It is."], ["It is."], ["It may."]]


def test_passages_of_several_splits(tmp_path):
    for split, passage in (("train", "One."), ("validation", "Two.")):
        row = {"question": "q", "answer": True, "passage": passage}
        write_parquet(tmp_path, f"data/{split}-00000-of-00001.parquet", "boolq", row)
    nodes = load_corpus(BoolqCorpusConfig(path=str(tmp_path), data_splits=("validation", "train")))
    assert [node.text for node in nodes] == ["Two.", "One."]
    train = load_examples(BoolqExamplesConfig(path=str(tmp_path), split="train"))
    assert relevant_texts(train, nodes) == [["One."]]


def hellaswag_row(label):
    return {
        "ind": 4,
        "activity_label": "Cooking",
        "ctx_a": "A man cuts.",
        "ctx_b": "he",
        "ctx": "A man cuts. he",
        "endings": ["stops.", "sings.", "sleeps.", "stops."],
        "source_id": "activitynet~v_1",
        "split": "val",
        "split_type": "indomain",
        "label": label,
    }


def test_hellaswag(tmp_path):
    path = write_parquet(tmp_path, "data/validation-00000-of-00001.parquet", "hellaswag", hellaswag_row("1"))
    metadata = {"activity_label": "Cooking", "split_type": "indomain", "source_id": "activitynet~v_1"}
    choices = ("stops.", "sings.", "sleeps.")
    assert load_examples(HellaswagExamplesConfig(path=path)) == [
        Example("validation-00001", "Cooking: A man cuts. he", ("sings.",), (), metadata, choices)
    ]
    write_parquet(tmp_path, "data/test-00000-of-00001.parquet", "hellaswag", hellaswag_row(""))
    with pytest.raises(DataError, match="Rowan/hellaswag test row 1: label is empty") as caught:
        load_examples(HellaswagExamplesConfig(path=path, split="test"))
    assert caught.value.hint == "The splits with labels are: train, validation."
    write_parquet(tmp_path, "data/train-00000-of-00001.parquet", "hellaswag", hellaswag_row("4"))
    with pytest.raises(DataError, match="row 1: label is '4', not one of: 0, 1, 2, 3"):
        load_examples(HellaswagExamplesConfig(path=path, split="train"))


def test_nq_open(tmp_path):
    row = {"question": "who is it", "answer": ["Ann", "Bob", "Ann"]}
    path = write_parquet(tmp_path, "nq_open/validation-00000-of-00001.parquet", "nq_open", row)
    expected = [Example("validation-00001", "who is it", ("Ann", "Bob"))]
    assert load_examples(NqOpenExamplesConfig(path=path)) == expected
    with pytest.raises(DataError, match="has no files of google-research-datasets/nq_open nq_open test"):
        load_examples(NqOpenExamplesConfig(path=path, split="test"))


def test_pubmed_qa(tmp_path):
    row = {
        "pubid": 21645374,
        "question": "Do they?",
        "context": {
            "contexts": ["They are.", "They were."],
            "labels": ["BACKGROUND", "RESULTS"],
            "meshes": ["Plants"],
            "reasoning_required_pred": ["y"],
            "reasoning_free_pred": ["y"],
        },
        "long_answer": "They do.",
        "final_decision": "maybe",
    }
    path = write_parquet(tmp_path, "pqa_labeled/train-00000-of-00001.parquet", "pubmed_qa", row)
    examples = load_examples(PubmedExamplesConfig(path=path))
    choices = ("yes", "no", "maybe")
    metadata = {"long_answer": "They do."}
    assert examples == [Example("21645374", "Do they?", ("maybe",), ("21645374",), metadata, choices)]
    assert relevant_texts(examples, load_corpus(PubmedCorpusConfig(path=path))) == [["They are.\nThey were."]]
    write_parquet(tmp_path, "pqa_labeled/train-00000-of-00001.parquet", "pubmed_qa", {**row, "final_decision": "so"})
    with pytest.raises(DataError, match="final_decision is 'so', not one of: yes, no, maybe"):
        load_examples(PubmedExamplesConfig(path=path))


def squad_row(number, context, *answers):
    return {
        "id": f"q{number}",
        "title": "Normans",
        "context": context,
        "question": f" Q{number}?",
        "answers": {"text": list(answers), "answer_start": [0] * len(answers)},
    }


def test_squad_v2(tmp_path):
    rows = [squad_row(1, "In France.", "France", "in France", "France"), squad_row(2, "In France."), squad_row(3, "X")]
    path = write_parquet(tmp_path, "squad_v2/validation-00000-of-00001.parquet", "squad_v2", *rows)
    examples, nodes = load_examples(Squad2ExamplesConfig(path=path)), load_corpus(Squad2CorpusConfig(path=path))
    assert summary(examples) == [("Q1?", ("France", "in France"), ()), ("Q2?", ("",), ()), ("Q3?", ("",), ())]
    assert examples[1].metadata == {"title": "Normans", "answerable": False}
    assert [(node.text, node.metadata) for node in nodes] == [
        ("In France.", {"title": "Normans"}),
        ("X", {"title": "Normans"}),
    ]
    assert nodes[0].id.startswith("Normans-")
    assert relevant_texts(examples, nodes) == [["In France."], [], []]
    answerable = load_examples(Squad2ExamplesConfig(path=path, answerable_only=True))
    assert [(item.id, item.metadata["answerable"]) for item in answerable] == [("q1", True)]


def test_squad_v2_without_answerable_questions(tmp_path):
    path = write_parquet(tmp_path, "squad_v2/validation-00000-of-00001.parquet", "squad_v2", squad_row(1, "X"))
    with pytest.raises(DataError, match="None of the questions that were read of the split 'validation' is answ"):
        load_examples(Squad2ExamplesConfig(path=path, answerable_only=True))


def test_xquad(tmp_path):
    path = write_parquet(tmp_path, "xquad.de/validation-00000-of-00001.parquet", "xquad", squad_row(1, "Köln.", "Köln"))
    examples = load_examples(XquadExamplesConfig(path=path, name="xquad.de"))
    assert [(item.id, item.query, item.responses, item.metadata) for item in examples] == [("q1", "Q1?", ("Köln",), {})]
    assert relevant_texts(examples, load_corpus(XquadCorpusConfig(path=path, name="xquad.de"))) == [["Köln."]]
    write_parquet(tmp_path, "xquad.en/validation-00000-of-00001.parquet", "xquad", squad_row(1, "Köln."))
    with pytest.raises(DataError, match=r"google/xquad xquad.en validation:\nrow 1: answers.text is an empty list"):
        load_examples(XquadExamplesConfig(path=path))
