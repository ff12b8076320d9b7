"""`fedrag index` finds a store where it lies: a folder that was set aside, or a server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from indexing import ROWS, WriteConfig, opened

from fedrag_cli.cli.main import main
from fedrag_cli.config import Config, load_config
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.index_build import build_index
from fedrag_cli.rag.knowledge_stores.qdrant_collection import in_memory
from fedrag_cli.runs.reporter import SilentReporter


@pytest.mark.parametrize("reader", ["index", "query", "move"])
def test_a_store_that_a_kill_left_set_aside_is_found(
    config_of: Callable[..., Config], encoded: list[int], tmp_path: Path, reader: str
) -> None:
    config = config_of()
    build_index(config, SilentReporter())
    (tmp_path / "store").rename(tmp_path / ".store.old.tmp")
    encoded.clear()
    if reader == "index":
        assert build_index(config, SilentReporter())["kept"] == 24
    elif reader == "query":
        build_rag_system(config, with_generator=False)
    else:
        other = tmp_path / "other.yaml"
        other.write_text("extends: config.yaml\nrag_system: {knowledge_store: {path: other}}\n")
        assert main(["index", str(tmp_path / "config.yaml"), "--to", str(other), "--quiet"]) == 0
        assert (tmp_path / "other").exists()
    assert not encoded
    assert (tmp_path / "store").is_dir()
    assert not (tmp_path / ".store.old.tmp").exists()


def test_a_server_out_of_reach_is_told_before_anything_is_encoded(
    write_config: WriteConfig, encoded: list[int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = write_config(rag_system={"knowledge_store": {"type": "qdrant", "url": "http://127.0.0.1:9"}})
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    for more in ([], ["--rebuild"]):
        assert main(["index", str(config), *more, "--json"]) == 4
        message = json.loads(capsys.readouterr().out)["error"]["message"]
        assert "cannot be reached: Connection refused." in message
    assert not encoded
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a Qdrant in memory, which stands for any server."""
    from fedrag_cli.rag.knowledge_stores import qdrant_store

    server = in_memory()
    monkeypatch.setattr(qdrant_store, "connect", lambda _: server)
    return server


@pytest.mark.parametrize("rebuild", [True, False])
def test_a_collection_of_others_is_left_alone_before_anything_is_encoded(
    write_config: WriteConfig, encoded: list[int], server: Any, rebuild: bool
) -> None:
    from qdrant_client import models

    server.create_collection("fedrag", models.VectorParams(size=4, distance=models.Distance.DOT))
    config = load_config(write_config(rag_system={"knowledge_store": {"type": "qdrant", "url": "http://h:1"}}))
    with pytest.raises(KnowledgeStoreError, match="which fedrag did not write and leaves alone"):
        build_index(config, SilentReporter(), rebuild=rebuild)
    assert not encoded
    assert [found.name for found in server.get_collections().collections] == ["fedrag"]


def test_another_filter_alone_gets_its_index_on_the_server(
    write_config: WriteConfig, encoded: list[int], server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, str, str]] = []
    known: dict[str, Any] = {}
    look = server.get_collection

    def create(name: str, key: str, field_schema: Any) -> None:
        made.append((name, key, field_schema.value))
        known[key] = field_schema

    monkeypatch.setattr(server, "create_payload_index", create)
    monkeypatch.setattr(
        server, "get_collection", lambda name: look(name).model_copy(update={"payload_schema": dict(known)})
    )

    def indexed(**settings: Any) -> dict[str, Any]:
        store = {"type": "qdrant", "url": "http://h:1", **settings}
        return build_index(load_config(write_config(rag_system={"knowledge_store": store})), SilentReporter())

    indexed(filter={"title": "owl"})
    (collection,) = [found.name for found in server.get_collections().collections]
    assert made == [(collection, "metadata.title", "keyword")]
    encoded.clear()
    for _ in range(2):
        assert indexed(filter={"title": "cat", "year": 7, "old": True})["kept"] == 24
    assert indexed()["kept"] == 24
    assert made[1:] == [(collection, "metadata.year", "integer"), (collection, "metadata.old", "bool")]
    assert not encoded
    assert [found.name for found in server.get_collections().collections] == [collection]


def test_a_server_gets_a_new_collection_only_where_something_has_changed(
    write_config: WriteConfig, encoded: list[int], tmp_path: Path, server: Any
) -> None:
    config = load_config(write_config(rag_system={"knowledge_store": {"type": "qdrant", "url": "http://h:1"}}))
    assert build_index(config, SilentReporter())["encoded"] == 24
    names = [found.name for found in server.get_collections().collections]
    assert build_index(config, SilentReporter())["kept"] == 24
    assert [found.name for found in server.get_collections().collections] == names
    encoded.clear()
    write_rows(tmp_path / "corpus.jsonl", [{"id": "new", "text": "new"}, *ROWS[1:]])
    told = build_index(config, SilentReporter())
    assert (told["encoded"], told["kept"], told["removed"], sum(encoded)) == (1, 23, 1, 1)
    assert [node.id for node in opened(config).nodes] == ["new", *(row["id"] for row in ROWS[1:])]
    assert len(server.get_collections().collections) == 1
    assert not list((tmp_path / "runs").glob(".*"))


def test_index_never_replaces_a_folder_of_other_files(write_config: Callable[..., Path], capsys: Any) -> None:
    config = write_config()
    folder = config.parent / "documents"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    assert main(["index", str(config), f"rag_system.knowledge_store.path={folder}"]) == 2
    assert "holds something other than a knowledge store" in capsys.readouterr().err
    assert [file.name for file in folder.iterdir()] == ["thesis.txt"]
    store = config.parent / "store"
    for _ in range(2):
        assert main(["index", str(config), f"rag_system.knowledge_store.path={store}"]) == 0
