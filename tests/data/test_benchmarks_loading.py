"""Where the rows of benchmarks come from: the hub, local copies of its repositories, and BEIR's files."""

import gzip
import json
import subprocess
import sys

import datasets
import pytest
from benchmarks import FEATURES, relevant_texts, summary, write_parquet
from datasets import Dataset

from fedrag_cli.data.benchmarks.config import (
    BeirHubCorpusConfig,
    BeirHubExamplesConfig,
    BoolqCorpusConfig,
    BoolqExamplesConfig,
    FeverExamplesConfig,
    MmluExamplesConfig,
    NqOpenExamplesConfig,
    XquadExamplesConfig,
)
from fedrag_cli.data.corpora import load_corpus
from fedrag_cli.data.examples import Example, load_examples
from fedrag_cli.errors import ConfigError, DataError
from fedrag_cli.registry import registry


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


@pytest.fixture
def hub(monkeypatch):
    """Answer `datasets.load_dataset` from tables by hub id and split, and record its calls."""
    tables, calls = {}, []

    def load_dataset(path, name, *, split, revision, data_files):
        calls.append((path, name, split, revision, data_files))
        return tables[path, split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return tables, calls


def test_hub(hub):
    tables, calls = hub
    rows = [{"question": "q", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 1}] * 3
    tables["cais/mmlu", "test"] = Dataset.from_list(rows, features=FEATURES["mmlu"])
    examples = load_examples(MmluExamplesConfig(name="anatomy", revision="v1", limit=2))
    assert [item.responses for item in examples] == [("B",), ("B",)]
    assert calls == [("cais/mmlu", "anatomy", "test", "v1", None)]


def test_hub_without_configurations(hub):
    tables, calls = hub
    rows = [{"question": "q", "answer": True, "passage": "p"}]
    tables["google/boolq", "validation"] = Dataset.from_list(rows, features=FEATURES["boolq"])
    assert len(load_corpus(BoolqCorpusConfig())) == 1
    assert calls == [("google/boolq", None, "validation", None, None)]


def test_converted_files_of_the_hub(hub):
    tables, calls = hub
    row = {"id": 1, "label": "REFUTES", "claim": "c", "evidence_wiki_url": "P", "evidence_id": 1}
    row |= {"evidence_annotation_id": 1, "evidence_sentence_id": 0}
    tables["fever/fever", "labelled_dev"] = Dataset.from_list([row], features=FEATURES["fever"])
    assert load_examples(FeverExamplesConfig())[0].metadata == {"evidence_pages": ["P"]}
    files = {"labelled_dev": "v1.0/labelled_dev/*.parquet"}
    assert calls == [("fever/fever", None, "labelled_dev", "refs/convert/parquet", files)]
    row = {"question": "q", "answer": ["a"]}
    tables["google-research-datasets/nq_open", "train"] = Dataset.from_list([row], features=FEATURES["nq_open"])
    load_examples(NqOpenExamplesConfig(split="train", revision="refs/convert/parquet"))
    assert calls[1][1:] == (None, "train", "refs/convert/parquet", {"train": "nq_open/train/*.parquet"})


def test_hub_that_cannot_be_reached(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="The data set 'fever/fever' cannot be loaded: no network") as caught:
        load_examples(FeverExamplesConfig())
    assert caught.value.hint == (
        "The hub cannot be reached: check the network, or run `hf download --repo-type dataset fever/fever --revision "
        "refs/convert/parquet --local-dir FOLDER` where there is one and set `path: FOLDER`."
    )


def nq_rows(*questions):
    return [{"question": question, "answer": ["a"]} for question in questions]


def test_layouts_of_copies(tmp_path):
    layouts = [
        "nq_open/validation-00000-of-00001.parquet",
        "nq_open/validation/0000.parquet",
        "validation-00000-of-00001.parquet",
        "data/validation-00000-of-00001-85693e1c669ad174.parquet",
    ]
    for number, file in enumerate(layouts):
        path = write_parquet(tmp_path / str(number), file, "nq_open", *nq_rows("q"))
        assert len(load_examples(NqOpenExamplesConfig(path=path))) == 1


def test_shards(tmp_path):
    for number in range(2):
        file = f"nq_open/train-0000{number}-of-00002.parquet"
        path = write_parquet(tmp_path, file, "nq_open", *nq_rows(f"a{number}", f"b{number}"))
    examples = load_examples(NqOpenExamplesConfig(path=path, split="train", limit=3))
    assert [(item.id, item.query) for item in examples] == [
        ("train-00001", "a0"),
        ("train-00002", "b0"),
        ("train-00003", "a1"),
    ]
    (tmp_path / "nq_open" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="has 1 of the 2 files of train-00000-of-00002"):
        load_examples(NqOpenExamplesConfig(path=path, split="train"))


def test_bad_copies(tmp_path):
    with pytest.raises(DataError, match=r"folder .*absent does not exist"):
        load_examples(NqOpenExamplesConfig(path=str(tmp_path / "absent")))
    with pytest.raises(DataError, match=r"has no files of google/xquad xquad.en validation") as caught:
        load_examples(XquadExamplesConfig(path=str(tmp_path)))
    assert "`hf download --repo-type dataset google/xquad --local-dir FOLDER`" in caught.value.hint
    with pytest.raises(ConfigError, match="`revision` is for the hub, but `path` names a local copy"):
        load_examples(NqOpenExamplesConfig(path=str(tmp_path), revision="main"))
    write_parquet(tmp_path, "nq_open/validation-00000-of-00001.parquet", "nq_open")
    with pytest.raises(DataError, match="nq_open validation has no rows"):
        load_examples(NqOpenExamplesConfig(path=str(tmp_path)))


def test_missing_column(tmp_path):
    path = write_parquet(tmp_path, "data/validation-00000-of-00001.parquet", "nq_open", *nq_rows("q"))
    with pytest.raises(DataError, match="1 problem in google/boolq validation:\nrow 1: has no 'passage'"):
        load_corpus(BoolqCorpusConfig(path=path))
    with pytest.raises(DataError, match="row 1: answer is a list, not a boolean"):
        load_examples(BoolqExamplesConfig(path=path))


def write_gzip(path, *rows):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def beir_rows():
    corpus = [{"_id": "4983", "title": "Cells", "text": "They grow."}, {"_id": "d2", "title": "", "text": "Other."}]
    queries = [{"_id": "0", "text": "Unjudged?"}, {"_id": "7", "text": "Growth?"}, {"_id": "8", "text": "More?"}]
    return corpus, queries


BEIR_EXAMPLES = [Example("7", "Growth?", (), ("4983",)), Example("8", "More?", (), ("d2",))]


def test_beir_hub_files(tmp_path):
    corpus, queries = beir_rows()
    write_gzip(tmp_path / "corpus.jsonl.gz", *corpus)
    write_gzip(tmp_path / "queries.jsonl.gz", *queries)
    (tmp_path / "test.tsv").write_text("query-id\tcorpus-id\tscore\n7\t4983\t1\n7\td2\t0\n8\td2\t2\n", encoding="utf-8")
    path = str(tmp_path)
    examples = load_examples(BeirHubExamplesConfig(path=path, name="scifact"))
    nodes = load_corpus(BeirHubCorpusConfig(path=path, name="scifact"))
    assert examples == BEIR_EXAMPLES
    assert [(node.id, node.text) for node in nodes] == [("4983", "Cells They grow."), ("d2", "Other.")]
    assert relevant_texts(examples, nodes) == [["Cells They grow."], ["Other."]]
    assert load_examples(BeirHubExamplesConfig(path=path, name="scifact", limit=1)) == BEIR_EXAMPLES[:1]
    with pytest.raises(DataError, match="has no files of BeIR/scifact-qrels dev") as caught:
        load_examples(BeirHubExamplesConfig(path=path, name="scifact", split="dev"))
    assert caught.value.hint == "Its splits are: corpus, queries, test."
    whole = (tmp_path / "corpus.jsonl.gz").read_bytes()
    (tmp_path / "corpus.jsonl.gz").write_bytes(whole[:-9])
    with pytest.raises(DataError, match=r"corpus\.jsonl\.gz is no complete gzip file"):
        load_corpus(BeirHubCorpusConfig(path=path, name="scifact"))


def test_beir_hub_parquet(tmp_path):
    corpus, queries = beir_rows()
    copy, qrels = tmp_path / "scifact", tmp_path / "scifact-qrels"
    write_parquet(copy, "corpus/corpus-00000-of-00001.parquet", "beir_corpus", *corpus)
    write_parquet(copy, "queries/queries-00000-of-00001.parquet", "beir_corpus", *queries)
    judgements = [{"query-id": "7", "corpus-id": "4983", "score": 1}, {"query-id": "8", "corpus-id": "d2", "score": 1}]
    write_parquet(qrels, "data/test-00000-of-00001.parquet", "beir_qrels", *judgements)
    config = BeirHubExamplesConfig(path=str(copy), qrels_path=str(qrels), name="scifact")
    assert load_examples(config) == BEIR_EXAMPLES
    assert len(load_corpus(BeirHubCorpusConfig(path=str(copy), name="scifact"))) == 2
    with pytest.raises(ConfigError, match="`qrels_path` is set without `path`"):
        load_examples(BeirHubExamplesConfig(qrels_path=str(qrels), name="scifact"))
    write_parquet(qrels, "data/test-00000-of-00001.parquet", "beir_qrels", {"query-id": "7", "corpus-id": "4983"})
    with pytest.raises(DataError, match="BeIR/scifact-qrels test row 1: score is no number: 'None'"):
        load_examples(config)


def test_beir_hub_from_the_hub(hub):
    tables, calls = hub
    corpus, queries = beir_rows()
    tables["BeIR/scifact", "corpus"] = Dataset.from_list(corpus)
    tables["BeIR/scifact", "queries"] = Dataset.from_list(queries)
    judgements = [{"query-id": 7, "corpus-id": "4983", "score": 1}, {"query-id": 8, "corpus-id": "d2", "score": 1}]
    tables["BeIR/scifact-qrels", "test"] = Dataset.from_list(judgements)
    examples = load_examples(BeirHubExamplesConfig(name="scifact", revision="a", qrels_revision="b"))
    assert summary(examples) == summary(BEIR_EXAMPLES)
    assert len(load_corpus(BeirHubCorpusConfig(name="scifact", limit=1))) == 1
    assert sorted(calls, key=str) == [
        ("BeIR/scifact", "corpus", "corpus", None, None),
        ("BeIR/scifact", "queries", "queries", "a", None),
        ("BeIR/scifact-qrels", None, "test", "b", None),
    ]


def test_importing_a_benchmark_imports_no_large_library():
    names = [component.builder for component in registry().all() if ".benchmarks." in component.builder]
    imports = ", ".join(sorted({name.partition(":")[0] for name in names}))
    code = f"import sys, {imports}; print(sorted({{'datasets', 'torch', 'pyarrow', 'numpy'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_commands_know_the_benchmarks(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "rag_system: {retriever: {model: org/r}, generator: {model: org/g}}\n"
        "dataset:\n"
        "  corpus: {type: squad_v2, data_splits: [train, validation], split: {size: 100}}\n"
        "  train: {type: squad_v2, split: train, answerable_only: true}\n"
        "  test: {type: squad_v2, limit: 1000}\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "fedrag_cli", "validate", str(config)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
