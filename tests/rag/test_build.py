"""Building a RAG system from a config: with and without a saved store, and errors before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import data_rows, write_rows

from fedrag_cli.cli.main import main
from fedrag_cli.commands import run_data
from fedrag_cli.config import Config, load_config
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ConfigError, DataError, KnowledgeStoreError, ModelError
from fedrag_cli.rag import build
from fedrag_cli.rag.build import build_rag_system, corpus_fingerprint
from fedrag_cli.rag.index_build import build_index
from fedrag_cli.runs.reporter import SilentReporter

WriteConfig = Callable[..., Path]


def indexed(write_config: WriteConfig, models: dict[str, Path], tmp_path: Path, **retriever: Any) -> Config:
    """Write a config whose store lies on the disk."""
    section = {
        "retriever": {"model": str(models["retriever"]), **retriever},
        "knowledge_store": {"path": str(tmp_path / "store")},
        "top_k": 2,
    }
    return load_config(write_config(rag_system=section))


def test_a_config_becomes_a_system_that_answers(write_config: WriteConfig) -> None:
    config = load_config(write_config(run={"device": "cpu"}))
    system = build_rag_system(config)
    assert system.config is config
    assert system.top_k == 2
    assert len(system.knowledge_store) == 24
    assert [node.id for node in system.knowledge_store.nodes] == [row["id"] for row in data_rows()["corpus"]]
    assert system.knowledge_store.nodes[0].metadata == {"title": "cat"}
    assert system.prompt_config == config.rag_system.prompt
    answer = system.query("what is the colour of the cat ?")
    assert len(answer.sources) == 2
    system.require_matching_store()
    assert not (Path(config.run.output_dir)).exists()


def test_the_generator_may_be_left_out(write_config: WriteConfig, models: dict[str, Path], tmp_path: Path) -> None:
    missing = {"generator": {"model": str(tmp_path / "nowhere")}}
    config = load_config(write_config(rag_system=missing, run={"device": "cpu"}))
    system = build_rag_system(config, with_generator=False)
    assert system.generator is None
    with pytest.raises(ModelError, match="no model at"):
        build_rag_system(config)


def test_passages_may_be_handed_over(write_config: WriteConfig) -> None:
    nodes = [
        KnowledgeNode("a", "the barn"),
        KnowledgeNode("b", "the tree"),
        KnowledgeNode("c", "the house"),
        KnowledgeNode("d", "x"),
    ]
    system = build_rag_system(load_config(write_config()), nodes=nodes, with_generator=False)
    assert system.knowledge_store.nodes == nodes


def test_a_saved_store_is_opened_and_equals_a_new_one(
    write_config: WriteConfig, models: dict[str, Path], tmp_path: Path
) -> None:
    config = indexed(write_config, models, tmp_path)
    fresh = build_rag_system(config)
    assert not (tmp_path / "store").exists()
    told = build_index(config, SilentReporter())
    assert (told["passages"], told["dimension"], told["truncated"], told["path"]) == (
        24,
        32,
        0,
        str(tmp_path / "store"),
    )
    assert told["corpus_fingerprint"] == corpus_fingerprint(fresh.knowledge_store.nodes)
    opened = build_rag_system(config)
    assert torch.equal(opened.knowledge_store.embeddings, fresh.knowledge_store.embeddings)
    query = "where is the owl ?"
    assert opened.retrieve(query) == fresh.retrieve(query)
    # What lies on the disk is really used: a changed embedding there is seen.
    store = opened.knowledge_store
    store.replace_embeddings(store.embeddings.flip(0))
    store.save(tmp_path / "store")
    assert torch.equal(build_rag_system(config).knowledge_store.embeddings, fresh.knowledge_store.embeddings.flip(0))


def test_an_index_without_a_place_is_a_config_error(write_config: WriteConfig) -> None:
    with pytest.raises(ConfigError, match="where to save"):
        build_index(load_config(write_config()), SilentReporter())


@pytest.mark.parametrize("change", ["text", "order", "less", "more", "id"])
def test_a_store_of_other_passages_is_refused(
    write_config: WriteConfig, models: dict[str, Path], tmp_path: Path, change: str
) -> None:
    config = indexed(write_config, models, tmp_path)
    build_index(config, SilentReporter())
    rows = data_rows()["corpus"]
    changed = {
        "text": [{**rows[0], "text": "other"}, *rows[1:]],
        "order": rows[::-1],
        "less": rows[:-1],
        "more": [*rows, {"id": "new", "text": "new"}],
        "id": [{**rows[0], "id": "other"}, *rows[1:]],
    }[change]
    write_rows(tmp_path / "corpus.jsonl", changed)
    with pytest.raises(KnowledgeStoreError, match="other passages") as caught:
        build_rag_system(config)
    assert "fedrag index" in caught.value.hint
    build_index(config, SilentReporter())
    assert len(build_rag_system(config).knowledge_store) == len(changed)


@pytest.mark.parametrize("setting", ["model", "prompt", "max_length", "similarity"])
def test_a_store_of_another_encoder_is_refused(
    write_config: WriteConfig, models: dict[str, Path], tmp_path: Path, setting: str
) -> None:
    build_index(indexed(write_config, models, tmp_path), SilentReporter())
    changed = {
        "model": {"model": str(models["other_retriever"])},
        "prompt": {"passage_prompt": "passage: "},
        "max_length": {"max_length": 9},
        "similarity": {"similarity": "dot"},
    }[setting]
    with pytest.raises(KnowledgeStoreError, match="another encoder") as caught:
        build_rag_system(indexed(write_config, models, tmp_path, **changed))
    assert "fedrag index" in caught.value.hint


def test_a_setting_that_passages_do_not_depend_on_keeps_the_store(
    write_config: WriteConfig, models: dict[str, Path], tmp_path: Path
) -> None:
    build_index(indexed(write_config, models, tmp_path), SilentReporter())
    build_rag_system(indexed(write_config, models, tmp_path, query_prompt="query: ", batch_size=3))


def test_a_damaged_store_is_an_error(write_config: WriteConfig, models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with pytest.raises(KnowledgeStoreError, match="no knowledge store"):
        build_rag_system(indexed(write_config, models, tmp_path))


NOWHERE = {"retriever": {"model": "./nowhere"}, "generator": {"model": "./nowhere"}}


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"rag_system": {**NOWHERE, "top_k": 25}}, "rag_system.top_k"),
        (
            {"rag_system": NOWHERE, "trainer": {"mode": "retriever", "retriever": {"top_k": 25}}},
            "trainer.retriever.top_k",
        ),
        (
            {"rag_system": NOWHERE, "trainer": {"mode": "generator", "generator": {"top_k": 25}}},
            "trainer.generator.top_k",
        ),
        (
            {"rag_system": NOWHERE, "trainer": {"mode": "alternating", "generator": {"top_k": 25}}},
            "trainer.generator.top_k",
        ),
    ],
)
def test_top_k_above_the_corpus_is_an_error_before_a_model_is_loaded(
    write_config: WriteConfig, sections: dict[str, Any], key: str
) -> None:
    config = load_config(write_config(**sections))
    with pytest.raises(KnowledgeStoreError, match=f"{key} is 25, but the corpus has 24 passages") as caught:
        build_rag_system(config)
    assert "24 or less" in caught.value.hint


def test_top_k_of_the_side_that_is_not_tuned_does_not_matter(write_config: WriteConfig) -> None:
    config = load_config(write_config(trainer={"mode": "retriever", "generator": {"top_k": 500}}))
    assert len(build_rag_system(config, with_generator=False).knowledge_store) == 24


def test_a_missing_corpus_is_an_error_before_a_model_is_loaded(write_config: WriteConfig, tmp_path: Path) -> None:
    config = load_config(write_config(rag_system=NOWHERE))
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(DataError, match=r"corpus\.jsonl"):
        build_rag_system(config)


def test_the_fingerprint_of_a_corpus_sees_where_a_passage_ends() -> None:
    def fingerprint(*pairs: tuple[str, str]) -> str:
        return corpus_fingerprint([KnowledgeNode(*pair) for pair in pairs])

    variants = [
        fingerprint(("a", "bc"), ("d", "e")),
        fingerprint(("ab", "c"), ("d", "e")),
        fingerprint(("a", "b"), ("cd", "e")),
        fingerprint(("d", "e"), ("a", "bc")),
        fingerprint(("a", "bc")),
        fingerprint(),
    ]
    assert len(set(variants)) == len(variants)
    assert variants[0] == fingerprint(("a", "bc"), ("d", "e"))


def test_a_run_hashes_its_corpus_once(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def counting(nodes: Sequence[KnowledgeNode]) -> str:
        hashed.extend(node.id for node in nodes)
        return corpus_fingerprint(nodes)

    for module in (build, run_data):
        monkeypatch.setattr(module, "corpus_fingerprint", counting)
    assert main(["evaluate", str(write_config()), "-q"]) == 0
    assert [hashed.count(row["id"]) for row in data_rows()["corpus"]] == [1] * 24
