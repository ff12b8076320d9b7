"""What the stores of FAISS and Qdrant promise besides the contract, and how a config changes between types."""

from __future__ import annotations

import copy
import dataclasses
import http.server
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import nodes, numbered, publish, vectors

from fedrag_cli.cli.main import main
from fedrag_cli.config import Config, load_config, load_config_with_source
from fedrag_cli.config.problems import InvalidConfigError
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ConfigError, ConnectionFailedError, KnowledgeStoreError
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.config import FaissStoreConfig, QdrantStoreConfig
from fedrag_cli.rag.from_run import with_tuned_models
from fedrag_cli.rag.index_build import build_index
from fedrag_cli.rag.index_convert import move_index
from fedrag_cli.rag.knowledge_stores.faiss_store import FaissKnowledgeStore
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore
from fedrag_cli.rag.knowledge_stores.qdrant_collection import in_memory
from fedrag_cli.rag.knowledge_stores.qdrant_store import QdrantKnowledgeStore
from fedrag_cli.rag.system import refresh_store
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.reporter import SilentReporter

WriteConfig = Callable[..., Path]
TYPES: dict[str, dict[str, Any]] = {
    "memory": {},
    "faiss": {"type": "faiss"},
    "faiss ivf": {"type": "faiss", "index": "ivf"},
    "faiss hnsw mapped": {"type": "faiss", "index": "hnsw", "memory_map": True},
    "qdrant": {"type": "qdrant"},
}


def faiss_store(count: int, dimension: int = 16, **settings: Any) -> FaissKnowledgeStore:
    store = FaissKnowledgeStore(FaissStoreConfig(**settings))
    store.add(numbered(count), torch.nn.functional.normalize(vectors(count, dimension)))
    return store


# FAISS


def test_the_reported_recall_is_that_of_the_search() -> None:
    store = faiss_store(600, index="ivf", nlist=15, nprobe=2)
    embeddings = store.embeddings_at(torch.arange(600))
    sample = torch.randperm(600, generator=torch.Generator().manual_seed(0))[:200]
    found = store.search_positions(embeddings[sample], 11)[1]
    exact = (embeddings[sample] @ embeddings.T).topk(11).indices
    shares = [
        len(set(right) & set(got) - {own}) / 10
        for own, right, got in zip(sample.tolist(), exact.tolist(), found.tolist(), strict=True)
    ]
    told = store.build_report()
    assert told == {"index": "ivf", "nlist": 15, "recall@10": pytest.approx(sum(shares) / 200, abs=1e-4)}
    assert 0.3 < told["recall@10"] < 0.9
    assert faiss_store(600, index="ivf", nlist=15, nprobe=15).build_report()["recall@10"] == 1
    assert faiss_store(600).build_report() == {"index": "flat", "recall@10": 1}
    assert faiss_store(1).build_report() == {"index": "flat"}


def test_a_graph_of_few_neighbours_finds_less() -> None:
    poor = faiss_store(3000, 32, index="hnsw", m=2, ef_construction=2, ef_search=1).build_report()["recall@10"]
    good = faiss_store(3000, 32, index="hnsw").build_report()["recall@10"]
    assert poor < 0.8 < 0.95 < good <= 1


@pytest.mark.parametrize(("count", "wanted", "made"), [(10, None, 1), (100, None, 2), (4000, 7, 7), (4000, None, 102)])
def test_there_are_no_more_clusters_than_passages_suffice_for(count: int, wanted: int | None, made: int) -> None:
    assert faiss_store(count, index="ivf", nlist=wanted).build_report()["nlist"] == made


def test_clusters_are_made_anew_when_the_store_has_more_than_doubled() -> None:
    store = faiss_store(100, index="ivf", nlist=50)
    store.add(numbered(100, 100), vectors(100, 16, seed=1))
    assert store.build_report()["nlist"] == 2
    store.add(numbered(1, 200), vectors(1, 16, seed=2))
    assert store.build_report()["nlist"] == 5


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_the_same_passages_give_the_same_file(tmp_path: Path, index: str) -> None:
    for name in ("one", "two"):
        faiss_store(900, index=index).save(tmp_path / name)
    files = [(tmp_path / name / "index.faiss").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.parametrize("index", ["flat", "ivf", "hnsw"])
def test_a_mapped_store_can_be_saved_over_itself(tmp_path: Path, index: str) -> None:
    faiss_store(200, index=index).save(tmp_path / "store")
    config = FaissStoreConfig(path=str(tmp_path / "store"), index=index, memory_map=True)  # type: ignore[arg-type]
    mapped, queries = FaissKnowledgeStore.from_config(config), vectors(5, 16, seed=3)
    before = mapped.search(queries, 9)
    mapped.save(tmp_path / "store")
    assert mapped.search(queries, 9) == before
    again = FaissKnowledgeStore.from_config(dataclasses.replace(config, memory_map=False))
    assert again.search(queries, 9) == before


@pytest.mark.parametrize(("change", "told"), [({"index": "flat"}, "index ivf"), ({"nlist": 3}, "nlist 2")])
def test_a_store_that_was_built_otherwise_is_refused(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    config = FaissStoreConfig(path=str(tmp_path / "store"), index="ivf", nlist=2)
    faiss_store(100, index="ivf", nlist=2).save(tmp_path / "store")
    assert len(FaissKnowledgeStore.from_config(dataclasses.replace(config, nprobe=1))) == 100
    with pytest.raises(KnowledgeStoreError, match=told) as caught:
        FaissKnowledgeStore.from_config(dataclasses.replace(config, **change))
    assert "fedrag index" in caught.value.hint


# Qdrant


def owned() -> list[KnowledgeNode]:
    return [KnowledgeNode(f"p{n}", f"text {n}", {"owner": "ab"[n % 2], "year": n}) for n in range(10)]


def source_store(count: int = 10) -> InMemoryKnowledgeStore:
    store = InMemoryKnowledgeStore()
    store.add(owned()[:count], vectors(count, 4))
    store.encoder_fingerprint, store.corpus_fingerprint = "encoder", "corpus"
    return store


def test_a_filter_restricts_everything_to_the_passages_that_pass() -> None:
    server, embeddings = in_memory(), vectors(10, 4)
    publish(source_store(), QdrantStoreConfig(), server)
    store = QdrantKnowledgeStore(QdrantStoreConfig(filter={"owner": "b"}), client=server)
    assert [node.id for node in store.nodes] == ["p1", "p3", "p5", "p7", "p9"]
    queries = vectors(6, 4, seed=1)
    passing = embeddings[1::2]
    assert torch.equal(store.search_positions(queries, 5)[1], (queries @ passing.T).topk(5).indices)
    assert torch.equal(store.embeddings_at(torch.tensor([0, 4])), passing[[0, 4]])
    with pytest.raises(KnowledgeStoreError, match=r"top_k is 6, .* 5 passages that pass the filter {'owner': 'b'}"):
        store.search(queries, 6)
    narrow = QdrantKnowledgeStore(QdrantStoreConfig(filter={"owner": "b", "year": 7}), client=server)
    assert [node.id for node in narrow.nodes] == ["p7"]
    none = QdrantKnowledgeStore(QdrantStoreConfig(filter={"owner": "c"}), client=server)
    with pytest.raises(KnowledgeStoreError, match="no passages that pass") as caught:
        none.search(queries, 1)
    assert "filter" in caught.value.hint


def test_a_filter_holds_for_what_is_added_too() -> None:
    store = QdrantKnowledgeStore(QdrantStoreConfig(filter={"owner": "a"}))
    store.add(owned()[:6], vectors(6, 4))
    store.add(owned()[6:], vectors(4, 4, seed=1))
    assert [node.id for node in store.nodes] == ["p0", "p2", "p4", "p6", "p8"]
    assert torch.equal(store.embeddings_at(torch.arange(3)), vectors(6, 4)[::2])


def test_publishing_replaces_the_collection_behind_the_name() -> None:
    server, config = in_memory(), QdrantStoreConfig(collection="news")
    first = publish(source_store(4), config, server)
    assert (len(first), first.encoder_fingerprint, first.corpus_fingerprint) == (4, "encoder", "corpus")
    second = publish(source_store(10), config, server)
    assert second.nodes == owned()
    assert torch.equal(second.embeddings_at(torch.arange(10)), vectors(10, 4))
    assert len(server.get_collections().collections) == 1


def test_a_failure_while_publishing_leaves_the_old_collection_alone() -> None:
    server, config = in_memory(), QdrantStoreConfig()
    publish(source_store(4), config, server)
    broken = source_store(10)
    broken._passages.nodes[7] = None  # type: ignore[call-overload]
    with pytest.raises(AttributeError):
        publish(broken, config, server)
    assert len(server.get_collections().collections) == 1
    assert len(QdrantKnowledgeStore(config, client=server)) == 4


def test_a_collection_of_somebody_else_is_left_alone() -> None:
    from qdrant_client import models

    server = in_memory()
    server.create_collection("fedrag", vectors_config=models.VectorParams(size=4, distance=models.Distance.DOT))
    with pytest.raises(KnowledgeStoreError, match="not written by fedrag"):
        QdrantKnowledgeStore(client=server)
    with pytest.raises(KnowledgeStoreError, match="leaves alone"):
        publish(source_store(), QdrantStoreConfig(), server)
    assert [found.name for found in server.get_collections().collections] == ["fedrag"]


def test_changes_stay_in_the_process_and_the_server_keeps_its_passages() -> None:
    server = in_memory()
    store = publish(source_store(), QdrantStoreConfig(), server)
    assert store.is_kept_elsewhere
    assert not QdrantKnowledgeStore(client=server).is_kept_elsewhere
    store.replace_embeddings(torch.ones(10, 4))
    assert not store.is_kept_elsewhere
    store.delete(["p0"])
    store.add(nodes("new"), torch.zeros(1, 4))
    store.clear()
    again = QdrantKnowledgeStore(client=server)
    assert torch.equal(again.embeddings_at(torch.arange(10)), vectors(10, 4))


@pytest.mark.slow
def test_a_folder_serves_one_process_at_a_time(tmp_path: Path) -> None:
    store = QdrantKnowledgeStore()
    store.add(owned(), vectors(10, 4))
    store.save(tmp_path / "store")
    opened = QdrantKnowledgeStore.load(tmp_path / "store")
    assert len(QdrantKnowledgeStore.load(tmp_path / "store")) == 10
    code = (
        "import pathlib, sys\n"
        "from fedrag_cli.errors import KnowledgeStoreError\n"
        "from fedrag_cli.rag.knowledge_stores.qdrant_store import QdrantKnowledgeStore\n"
        "try:\n    store = QdrantKnowledgeStore.load(pathlib.Path(sys.argv[1]))\n    print(len(store))\n"
        "except KnowledgeStoreError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "already accessed" in told
    assert "one process at a time" in told
    del opened
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # The client must be closed before Python goes down, or it complains on stderr.
    assert (done.stdout, done.stderr) == ("10\n", "")


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers every request with the status in its server's attribute, and remembers the key that came."""

    def do_GET(self) -> None:
        self.server.keys.append(self.headers.get("api-key"))  # type: ignore[attr-defined]
        body = json.dumps({"status": {"error": "no"}}).encode()
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Stay silent."""


@pytest.fixture
def refusing_server() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    server.keys = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [(401, ConnectionFailedError, "refuses the API key"), (403, ConnectionFailedError, "refuses the API key"),
     (500, KnowledgeStoreError, "HTTP 500")],
)  # fmt: skip
def test_a_server_that_refuses(
    refusing_server: Any, status: int, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDRANT_API_KEY", "k")
    refusing_server.status = status
    config = QdrantStoreConfig(url=f"http://127.0.0.1:{refusing_server.server_port}")
    with pytest.raises(error, match=message) as caught:
        QdrantKnowledgeStore.from_config(config)
    assert refusing_server.keys == [None]
    if status != 500:
        assert "${oc.env:QDRANT_API_KEY}" in caught.value.hint  # type: ignore[attr-defined]


def test_the_key_is_sent(refusing_server: Any) -> None:
    refusing_server.status = 401
    config = QdrantStoreConfig(url=f"http://127.0.0.1:{refusing_server.server_port}", api_key="secret")
    with pytest.warns(UserWarning, match="insecure"), pytest.raises(ConnectionFailedError) as caught:
        QdrantKnowledgeStore.from_config(config)
    assert refusing_server.keys == ["secret"]
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_ends_with_the_exit_code_of_connections(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(rag_system={"knowledge_store": {"type": "qdrant", "url": "http://127.0.0.1:9"}})
    for command in (["index", str(config)], ["query", str(config), "where ?"], ["validate", str(config), "--load"]):
        assert main([*command, "--json"]) == 4
        assert "cannot be reached" in json.loads(capsys.readouterr().out)["error"]["message"]


# Configs


def with_store(write_config: WriteConfig, name: str = "fedrag.yaml", **store: Any) -> Config:
    path = write_config(rag_system={"knowledge_store": store, "top_k": 2})
    return load_config(path.rename(path.with_name(name)))


@pytest.mark.parametrize("kind", list(TYPES))
def test_one_line_changes_the_store(write_config: WriteConfig, tmp_path: Path, kind: str) -> None:
    expected = build_rag_system(with_store(write_config)).retrieve("where is the owl ?", 24)
    config = with_store(write_config, **TYPES[kind], path=str(tmp_path / "store"))
    for _ in range(2):
        told = build_index(config, SilentReporter())
        assert (told["passages"], told["path"]) == (24, str(tmp_path / "store"))
        assert told.get("recall@10", 1) == 1
    system = build_rag_system(config)
    found = system.retrieve("where is the owl ?", 24)
    assert [scored.node for scored in found] == [scored.node for scored in expected]
    assert [scored.score for scored in found] == pytest.approx([scored.score for scored in expected], abs=1e-5)
    refresh_store(system)
    assert system.retrieve("where is the owl ?", 24)[0].node == expected[0].node


@pytest.mark.parametrize("kind", list(TYPES))
def test_without_a_place_the_store_is_built_in_memory(write_config: WriteConfig, kind: str) -> None:
    settings = {name: value for name, value in TYPES[kind].items() if name != "memory_map"}
    system = build_rag_system(with_store(write_config, **settings))
    assert len(system.retrieve("where is the owl ?", 24)) == 24
    assert system.config is not None
    assert type(system.knowledge_store).__module__.rpartition(".")[2].startswith(settings.get("type", "memory"))


def test_a_built_store_moves_through_all_types_and_stays_the_same(write_config: WriteConfig, tmp_path: Path) -> None:
    configs = [
        with_store(write_config, f"{number}.yaml", **store, path=str(tmp_path / f"store{number}"))
        for number, store in enumerate([*TYPES.values(), {}])
    ]
    with pytest.raises(KnowledgeStoreError, match="no knowledge store at"):
        move_index(configs[0], configs[1], SilentReporter())
    build_index(configs[0], SilentReporter())
    for source, target in itertools.pairwise(configs):
        told = move_index(source, target, SilentReporter())
        assert (told["passages"], told["dimension"]) == (24, 32)
    first, last = (build_rag_system(config).knowledge_store for config in (configs[0], configs[-1]))
    everything = torch.arange(24)
    assert last.nodes == first.nodes
    assert torch.equal(last.embeddings_at(everything), first.embeddings_at(everything))
    assert last.encoder_fingerprint == first.encoder_fingerprint
    assert last.corpus_fingerprint == first.corpus_fingerprint
    with pytest.raises(ConfigError, match="the same"):
        move_index(configs[0], configs[0], SilentReporter())


def test_the_command_moves_a_store(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = write_config(rag_system={"knowledge_store": {"path": str(tmp_path / "old")}, "top_k": 2})
    new = tmp_path / "new.yaml"
    new.write_text(f"extends: {old.name}\nrag_system:\n  knowledge_store: {{type: faiss, path: new}}\n")
    assert main(["index", str(old), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["index", str(old), "--to", str(new), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["type"], told["path"], told["recall@10"]) == ("faiss", str(tmp_path / "new"), 1)
    assert main(["query", str(new), "where is the owl ?", "--json"]) == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    capsys.readouterr()
    assert main(["index", str(old), f"rag_system.knowledge_store.path={tmp_path / 'full'}", "--json"]) == 2
    assert "something other" in json.loads(capsys.readouterr().out)["error"]["message"]


@pytest.mark.parametrize("kind", ["faiss hnsw mapped", "qdrant"])
def test_training_both_encoders_refreshes_the_store_of_the_run_and_leaves_the_other(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    trainer = {"top_k": 4, "batch_size": 4, "learning_rate": 1e-3, "epochs": 2, "train": "both"}
    sections = {"mode": "retriever", "retriever": trainer}
    means = []
    for store in ({"type": "memory"}, {**TYPES[kind], "path": str(tmp_path / "store")}):
        config = write_config(rag_system={"knowledge_store": store, "top_k": 2}, trainer=sections)
        if "path" in store:
            assert main(["index", str(config), "--quiet"]) == 0
        before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
        capsys.readouterr()
        assert main(["train", str(config), "--json"]) == 0
        run = json.loads(capsys.readouterr().out)["run_dir"]
        assert all(path.read_bytes() == content for path, content in before.items())
        assert main(["evaluate", run, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        means.append({name: metric["mean"] for name, metric in told["metrics"].items()})
    assert means[0] == pytest.approx(means[1], abs=1e-6)


def test_sites_of_a_federation_copy_the_store_into_memory(write_config: WriteConfig) -> None:
    from fedrag_cli.commands.run_data import load_run_data
    from fedrag_cli.federated.task import FLTask
    from fedrag_cli.trainer_managers.build import build_manager

    settings = {"top_k": 4, "batch_size": 4, "train": "both", "validation": {"every": "never"}}
    sections = {"mode": "retriever", "retriever": settings}
    config = load_config(write_config(rag_system={"knowledge_store": {"type": "qdrant"}, "top_k": 2}, trainer=sections))
    system, data = build_rag_system(config), load_run_data(config)
    store, retriever = system.knowledge_store, system.require_trainable_retriever()
    trainer = build_manager(config, system, train=data.train, validation=[]).trainers["retriever"]
    task = FLTask(trainer).around(copy.deepcopy(retriever.query_encoder), None, None)
    own = task.trainer.rag_system.knowledge_store
    assert (type(store), type(own)) == (QdrantKnowledgeStore, InMemoryKnowledgeStore)
    assert (own.nodes, own.corpus_fingerprint) == (store.nodes, store.corpus_fingerprint)
    assert own.embeddings.sub(store.embeddings).abs().max() < 1e-6


def test_a_filter_restricts_searches_not_what_is_kept(write_config: WriteConfig, tmp_path: Path) -> None:
    settings = {"type": "qdrant", "path": str(tmp_path / "store")}
    config = with_store(write_config, **settings, filter={"title": "owl"})
    assert build_index(config, SilentReporter())["passages"] == 24
    system = build_rag_system(config, with_generator=False)
    (found,) = system.retrieve("where is the dog ?", 1)
    assert found.node.metadata == {"title": "owl"}
    with pytest.raises(KnowledgeStoreError, match="passages that pass the filter"):
        system.retrieve("where is the dog ?", 24)
    del system
    assert len(build_rag_system(with_store(write_config, **settings), with_generator=False).knowledge_store) == 24


def test_a_run_keeps_its_own_store_where_it_started_from_one_on_a_server(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "k")
    config = with_store(write_config, type="qdrant", url="http://h:1", api_key="${oc.env:MY_KEY}", collection="c")
    run = RunDirectory(tmp_path / "run")
    assert with_tuned_models(config, run) == config
    run.knowledge_store.mkdir(parents=True)
    store = with_tuned_models(config, run).rag_system.knowledge_store
    assert store == QdrantStoreConfig(path=str(run.knowledge_store), collection="c")


@pytest.mark.parametrize(
    ("store", "key", "message"),
    [
        ({"type": "faiss", "nlist": 4}, "nlist", "has no effect with index: flat"),
        ({"type": "faiss", "index": "ivf", "ef_search": 4}, "ef_search", "has no effect with index: ivf"),
        ({"type": "faiss", "memory_map": True}, "memory_map", "needs a path"),
        ({"type": "faiss", "nlist": 0}, "nlist", "greater than 0"),
        ({"type": "qdrant", "url": "localhost:6333"}, "url", "is no address of a server"),
        ({"type": "qdrant", "url": "http://user:pw@host"}, "url", "is no address of a server"),
        ({"type": "qdrant", "url": "http://h:1", "path": "x"}, "path", "stands beside url"),
        ({"type": "qdrant", "collection": "a/b"}, "collection", "is no name of a collection"),
        ({"type": "qdrant", "url": "http://h:1", "api_key": "written"}, "api_key", "must not be written down"),
    ],
)
def test_settings_that_cannot_work_are_named(
    write_config: WriteConfig, store: dict[str, Any], key: str, message: str
) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        with_store(write_config, **store)
    (problem,) = caught.value.problems
    assert problem.path == f"rag_system.knowledge_store.{key}"
    assert message in problem.message


def test_a_filter_of_other_than_plain_values_is_refused(write_config: WriteConfig) -> None:
    with pytest.raises(InvalidConfigError, match=r"knowledge_store\.filter"):
        with_store(write_config, type="qdrant", filter={"owner": [1]})


def test_a_key_comes_from_the_environment_and_only_its_reference_is_written(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret-value")
    store = {
        "type": "qdrant",
        "url": "https://h:1",
        "api_key": "${oc.env:MY_KEY}",
        "filter": {"owner": "a", "old": True},
    }
    source = load_config_with_source(write_config(rag_system={"knowledge_store": store}))
    assert source.config.rag_system.knowledge_store.api_key == "secret-value"
    assert source.config.rag_system.knowledge_store.filter == {"owner": "a", "old": True}
    text = source.to_yaml()
    assert "${oc.env:MY_KEY}" in text
    assert "secret-value" not in text


@pytest.mark.parametrize(
    ("kind", "package", "extra"), [("faiss", "faiss", "faiss"), ("qdrant", "qdrant_client", "qdrant")]
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, kind: str, package: str, extra: str
) -> None:
    for name in [name for name in sys.modules if name.startswith(f"fedrag_cli.rag.knowledge_stores.{kind}_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    config = with_store(write_config, type=kind)
    with pytest.raises(ConfigError, match="not installed") as caught:
        build_rag_system(config, with_generator=False)
    assert f"pip install 'fedrag-cli[{extra}]'" in caught.value.hint
