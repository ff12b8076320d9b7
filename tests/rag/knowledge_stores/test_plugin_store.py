"""A store of a third party, with no more than it must have, serves every command as the built-in ones do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import data_rows, write_rows
from plugin_store import PlainStore
from plugins import installed
from stores import numbered, vectors

from fedrag_cli.cli.main import main
from fedrag_cli.config import load_config
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.index_convert import open_store
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore

WriteConfig = Callable[..., Path]
KEY = "rag_system.knowledge_store"
QUESTION = "what is the colour of the cat ?"


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path) -> Iterator[None]:
    with installed(tmp_path / "packages", "plain-store", entry_point="plugin_store_config:register"):
        yield


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return a function that runs a command and returns its JSON document."""

    def run(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main([*arguments, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return run


def test_a_store_that_is_kept_nowhere(write_config: WriteConfig, told: Callable[..., Any]) -> None:
    config = str(write_config(trainer={"mode": "retriever", "retriever": {"top_k": 4, "batch_size": 4}}))
    plain = f"{KEY}={{type: plain}}"
    assert main(["validate", config, plain, "--load"]) == 0
    assert isinstance(build_rag_system(load_config(config, [plain])).knowledge_store, PlainStore)
    for command in (["evaluate"], ["query", QUESTION]):
        name, *rest = command
        expected, found = (told(name, config, *rest, store) for store in (f"{KEY}={{type: memory}}", plain))
        if name == "evaluate":
            assert {metric: about["mean"] for metric, about in found["metrics"].items()} == pytest.approx(
                {metric: about["mean"] for metric, about in expected["metrics"].items()}
            )
        else:
            assert (found["answer"], [source["id"] for source in found["sources"]]) == (
                expected["answer"],
                [source["id"] for source in expected["sources"]],
            )
    assert "does not say where to save" in told("index", config, plain, code=2)["error"]["message"]
    run = told("train", config, plain)["run_dir"]
    assert not (Path(run) / "knowledge_store").exists()
    differences = json.loads((Path(run) / "summary.json").read_text())["differences"]
    expected = {about["metric"]: about["after"] for about in differences}
    assert {name: about["mean"] for name, about in told("evaluate", run)["metrics"].items()} == pytest.approx(expected)


def test_a_store_that_is_saved_in_a_folder(
    write_config: WriteConfig, told: Callable[..., Any], tmp_path: Path, encoded: list[int]
) -> None:
    trainer = {"top_k": 4, "batch_size": 4, "train": "both", "learning_rate": 1e-3}
    path = write_config(trainer={"mode": "retriever", "retriever": trainer})
    config, place = str(path), f"{KEY}={{type: plain_saved, path: {tmp_path / 'store'}}}"
    assert told("index", config, place)["encoded"] == 24
    write_rows(tmp_path / "corpus.jsonl", [*data_rows()["corpus"], {"id": "new", "text": "new"}])
    encoded.clear()
    report = told("index", config, place)
    assert (report["type"], report["kept"], sum(encoded)) == ("plain_saved", 24, 1)
    assert told("query", config, QUESTION, place)["sources"]
    run = told("train", config, place)["run_dir"]
    store = load_config(config, [place]).rag_system.knowledge_store.in_folder(Path(run) / "knowledge_store")
    assert isinstance(open_store(store), PlainStore)
    encoded.clear()
    told("evaluate", run, "evaluation.metrics=[recall@1]")
    assert sum(encoded) < 25
    (tmp_path / "store" / "thesis.txt").touch()
    assert "something other" in told("index", config, place, code=2)["error"]["message"]


@pytest.mark.parametrize("kind", ["memory", "faiss", "qdrant"])
def test_a_built_in_store_is_taken_over_and_given_back(
    write_config: WriteConfig, told: Callable[..., Any], tmp_path: Path, encoded: list[int], kind: str
) -> None:
    config, places = str(write_config()), [f"{KEY}={{type: {kind_of}, path: {tmp_path / 'store'}}}"
                                           for kind_of in (kind, "plain_saved", kind)]  # fmt: skip
    told("index", config, places[0])
    before = open_store(load_config(config, [places[0]]).rag_system.knowledge_store)
    nodes, embeddings = before.nodes, before.embeddings
    del before
    encoded.clear()
    for place in places[1:]:
        assert told("index", config, place)["kept"] == 24
        store = open_store(load_config(config, [place]).rag_system.knowledge_store)
        assert (store.nodes, isinstance(store, PlainStore)) == (nodes, "plain_saved" in place)
        assert torch.equal(store.embeddings, embeddings)
        del store
    assert not encoded


def test_what_a_store_need_not_write_works(tmp_path: Path) -> None:
    store = PlainStore()
    store.add(numbered(20), vectors(20, 4))
    store.encoder_fingerprint, store.corpus_fingerprint = "encoder", "corpus"
    store.save(tmp_path / "store")
    for again in (PlainStore.load(tmp_path / "store"), InMemoryKnowledgeStore.load(tmp_path / "store")):
        assert (again.nodes, again.encoder_fingerprint, again.corpus_fingerprint) == (store.nodes, "encoder", "corpus")
        assert torch.equal(again.embeddings, vectors(20, 4))
        assert again.search(vectors(3, 4, seed=1), 5) == store.search(vectors(3, 4, seed=1), 5)
    store.replace_embeddings(vectors(20, 4, seed=2))
    assert torch.equal(store.embeddings, vectors(20, 4, seed=2))
    assert (len(store), store.encoder_fingerprint, store.build_report()) == (20, "encoder", {})
    store.clear()
    assert (len(store), store.dimension, store.encoder_fingerprint) == (0, 0, None)


def test_rounding_in_a_saved_store_of_another_kind_is_remembered(tmp_path: Path) -> None:
    from fedrag_cli.rag.config import MemoryStoreConfig

    half = InMemoryKnowledgeStore(MemoryStoreConfig(dtype="float16"))
    half.add(numbered(20), vectors(20, 4))
    half.save(tmp_path / "store")
    store = PlainStore.load(tmp_path / "store")
    store.save(tmp_path / "store")
    assert PlainStore.load(tmp_path / "store").rounded_to == "float16"
