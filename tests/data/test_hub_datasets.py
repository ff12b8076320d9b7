import subprocess
import sys

import datasets
import pytest
from datasets import Dataset, DatasetDict

from fedrag_cli.data.config import HuggingFaceCorpusConfig, HuggingFaceExamplesConfig
from fedrag_cli.data.corpora import load_corpus
from fedrag_cli.data.examples import Example, examples_from_dataset, load_examples
from fedrag_cli.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def _quiet_and_local(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def dataset_of(*responses):
    return Dataset.from_dict({"query": ["q"] * len(responses), "response": list(responses)})


def test_examples_from_dataset():
    rows = dataset_of(["a", "b"], ["c"])
    expected = [Example("dataset-0001", "q", ("a", "b")), Example("dataset-0002", "q", ("c",))]
    assert examples_from_dataset(rows) == expected
    assert examples_from_dataset(rows.with_format("numpy")) == expected


def test_bad_rows_of_a_dataset():
    with pytest.raises(DataError, match=r"dataset row 2: response is missing \(null\)"):
        examples_from_dataset(dataset_of("a", None))
    with pytest.raises(DataError, match="The data set 'dataset' has no rows"):
        examples_from_dataset(dataset_of())
    with pytest.raises(DataError, match=r"A mapping is no data set: .* \(train, test\)"):
        examples_from_dataset(DatasetDict({"train": dataset_of("a"), "test": dataset_of("a")}))


def test_media_columns_are_left_out():
    rows = dataset_of("a").add_column("picture", [{"bytes": b"x", "path": None}])
    rows = rows.cast_column("picture", datasets.Image())
    assert examples_from_dataset(rows) == [Example("dataset-0001", "q", ("a",))]


def test_saved_dataset(tmp_path):
    path = str(tmp_path / "saved")
    dataset_of("a", "").save_to_disk(path)
    assert load_examples(HuggingFaceExamplesConfig(path=path, limit=1)) == [Example("saved-0001", "q", ("a",))]
    with pytest.raises(DataError, match="saved row 2: response is empty"):
        load_examples(HuggingFaceExamplesConfig(path=path))
    with pytest.raises(DataError, match="is a single one without a split 'train'"):
        load_examples(HuggingFaceExamplesConfig(path=path, split="train"))
    with pytest.raises(ConfigError, match="`revision` is for data sets of the hub"):
        load_examples(HuggingFaceExamplesConfig(path=path, revision="main"))


def test_saved_splits(tmp_path):
    path = str(tmp_path / "saved")
    DatasetDict({"train": dataset_of("a"), "test": dataset_of("b")}).save_to_disk(path)
    assert load_examples(HuggingFaceExamplesConfig(path=path, split="test"))[0].response == "b"
    with pytest.raises(DataError, match="has several splits: train, test"):
        load_examples(HuggingFaceExamplesConfig(path=path))
    with pytest.raises(DataError, match="has no split 'tset'; its splits are: train, test") as caught:
        load_examples(HuggingFaceExamplesConfig(path=path, split="tset"))
    assert caught.value.hint == "Did you mean 'test'?"


def test_one_saved_split_needs_no_name(tmp_path):
    path = str(tmp_path / "saved")
    DatasetDict({"train": dataset_of("a")}).save_to_disk(path)
    assert len(load_examples(HuggingFaceExamplesConfig(path=path))) == 1


def test_damaged_dataset(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_examples(HuggingFaceExamplesConfig(path=str(tmp_path)))


def test_folder_of_data_files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"query": "q", "response": "r"}\n', encoding="utf-8")
    assert len(load_examples(HuggingFaceExamplesConfig(path=str(folder)))) == 1
    with pytest.raises(DataError, match="cannot be loaded"):
        load_examples(HuggingFaceExamplesConfig(path=str(folder), split="validation"))
    with pytest.raises(DataError, match="is a file, but a directory or a hub id is expected"):
        load_examples(HuggingFaceExamplesConfig(path=str(folder / "train.jsonl")))


def test_folder_whose_name_looks_like_a_pattern(tmp_path):
    folder = tmp_path / "[x] *?" / "raw"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "test.jsonl").write_text('{"query": "q", "response": "r"}\n', encoding="utf-8")
    assert load_examples(HuggingFaceExamplesConfig(path=str(folder), split="test"))[0].response == "r"
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: own\n  data_files:\n  - split: test\n    path: data/*.jsonl\n---\n",
        encoding="utf-8",
    )
    assert load_examples(HuggingFaceExamplesConfig(path=str(folder), name="own", split="test"))[0].response == "r"
    Dataset.from_dict({"query": ["q"], "response": [84.0]}).save_to_disk(folder / "saved")
    assert load_examples(HuggingFaceExamplesConfig(path=str(folder / "saved")))[0].response == "84"


def test_labels_are_their_names():
    label = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"query": datasets.Value("string"), "response": label, "kind": label})
    columns = {"query": ["q", "q"], "response": [0, 1], "kind": [None, -1]}
    examples = examples_from_dataset(Dataset.from_dict(columns, features=features))
    assert examples == [Example("dataset-0001", "q", ("no",)), Example("dataset-0002", "q", ("yes",))]


def test_labels_in_lists_and_objects_become_their_names_too():
    label = datasets.ClassLabel(names=["no", "yes"])
    kinds = {"query": datasets.Value("string"), "response": datasets.List(label), "meta": {"kind": label}}
    columns = {"query": ["q", "q"], "response": [[1, 0], [1]], "meta": [{"kind": 0}, {"kind": -1}]}
    examples = examples_from_dataset(Dataset.from_dict(columns, features=datasets.Features(kinds)))
    assert [example.responses for example in examples] == [("yes", "no"), ("yes",)]
    assert [example.metadata for example in examples] == [{"meta": {"kind": "no"}}, {"meta": {"kind": None}}]


def test_short_floats_stay_what_was_written():
    features = datasets.Features({"query": datasets.Value("string"), "response": datasets.Value("float32")})
    rows = Dataset.from_dict({"query": ["q"], "response": [84.1]}, features=features)
    assert examples_from_dataset(rows)[0].responses == ("84.1",)
    features["response"] = datasets.List(datasets.Value("float32"))
    features["meta"] = {"years": datasets.List({"share": datasets.Value("float32")}, length=1)}
    columns = {"query": ["q"], "response": [[84.1, 0.1]], "meta": [{"years": [{"share": 0.1}]}]}
    [example] = examples_from_dataset(Dataset.from_dict(columns, features=features))
    assert (example.responses, example.metadata) == (("84.1", "0.1"), {"meta": {"years": [{"share": 0.1}]}})


def test_dataset_that_the_hub_cannot_give():
    with pytest.raises(DataError, match="The data set 'nobody/nothing-of-the-kind' cannot be loaded: ") as caught:
        load_examples(HuggingFaceExamplesConfig(path="nobody/nothing-of-the-kind"))
    assert caught.value.hint


def test_corpus(tmp_path):
    path = str(tmp_path / "saved")
    Dataset.from_dict({"text": ["One.", "Two."], "title": ["A", "B"]}).save_to_disk(path)
    nodes = load_corpus(HuggingFaceCorpusConfig(path=path))
    assert [(node.id, node.text, node.metadata["title"]) for node in nodes] == [
        ("saved-0001", "One.", "A"),
        ("saved-0002", "Two.", "B"),
    ]


def test_reading_files_imports_no_large_library():
    code = (
        "import sys, fedrag_cli.data.examples, fedrag_cli.data.corpora, fedrag_cli.data.relevance; "
        "print(sorted({'datasets', 'torch', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
