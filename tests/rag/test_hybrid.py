"""Hybrid retrieval through the commands: what is found, kept beside each kind of store, refused, and learnt from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from indexing import STORES

from fedrag_cli.cli.main import main
from fedrag_cli.config import load_config
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ConfigError, KnowledgeStoreError
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.fusion import lexical_bonus
from fedrag_cli.rag.hybrid import lexical_folder
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.runs.files import name_aside
from fedrag_cli.trainers.config import EMDR2Config, ValidationConfig
from fedrag_cli.trainers.huggingface import HuggingFaceTrainerForEMDR2

WriteConfig = Callable[..., Path]
QUERIES = ["what colour is the owl ?", "gold eel", "zebra"]


def _system(path: Path, *overrides: str) -> RAGSystem:
    return build_rag_system(load_config(path, overrides), with_generator=False)


def _ids(rag_system: RAGSystem, query: str, top_k: int = 3) -> list[str]:
    return [scored.node.id for scored in rag_system.retrieve(query, top_k)]


def test_the_ranking_is_that_of_both_sides(write_config: WriteConfig) -> None:
    """With candidates for all passages, the score is the similarity and the bonus over the whole store."""
    rag_system = _system(write_config(), "rag_system.lexical={}", "rag_system.fusion.weight=0.6")
    store, hybrid = rag_system.knowledge_store, rag_system.hybrid
    assert hybrid is not None
    embeddings = rag_system.retriever.encode_queries(QUERIES)
    dense = embeddings @ store.embeddings.T
    lexical = torch.stack([torch.from_numpy(hybrid.lexical.scores(query)) for query in QUERIES])
    expected = dense + lexical_bonus(dense, lexical, torch.ones_like(dense, dtype=torch.bool), 0.6)
    scores, positions = rag_system.search(QUERIES, embeddings, 4)
    wanted = expected.sort(dim=1, descending=True, stable=True)
    assert torch.equal(positions, wanted.indices[:, :4])
    assert scores == pytest.approx(wanted.values[:, :4], abs=1e-5)
    # Nobody has written of a zebra, so the words change nothing.
    assert _ids(rag_system, "zebra") == _ids(_system(write_config("dense")), "zebra")


def test_many_questions_are_searched_in_blocks_and_with_all_digits(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks change nothing, and neither does autocast, in which the trainers search."""
    rag_system = _system(write_config(), "rag_system.lexical={}")
    embeddings = rag_system.retriever.encode_queries(QUERIES)
    scores, positions = rag_system.search(QUERIES, embeddings, 4)
    assert [len(part) for part in rag_system.search([], embeddings[:0], 4)] == [0, 0]
    gathered: list[tuple[int, ...]] = []
    embeddings_at = rag_system.knowledge_store.embeddings_at

    def count(wanted: torch.Tensor) -> torch.Tensor:
        gathered.append(tuple(wanted.shape))
        return embeddings_at(wanted)

    monkeypatch.setattr(rag_system.knowledge_store, "embeddings_at", count)
    passages = len(rag_system.knowledge_store)
    monkeypatch.setattr("fedrag_cli.rag.hybrid.NUMBERS_AT_ONCE", 2 * 2 * passages * rag_system.retriever.dimension)
    with torch.autocast("cpu", torch.bfloat16):
        again, same = rag_system.search(QUERIES, embeddings, 4)
    assert gathered == [(2, 2 * passages), (1, 2 * passages)]
    assert torch.equal(same, positions)
    assert again == pytest.approx(scores, abs=1e-6)


def test_words_bring_up_what_the_encoder_misses(write_config: WriteConfig) -> None:
    path = write_config()
    wanted = _system(path).knowledge_store.nodes[7]
    for fusion in ("{weight: 0.01}", "{method: rrf, rrf_constant: 0.01}", "{method: lexical}"):
        overrides = [f"rag_system.fusion={fusion}", "trainer.mode=generator"]
        assert wanted.id in _ids(_system(path, "rag_system.lexical={}", *overrides), wanted.text, 2)
    alone = _system(path, "rag_system.lexical={}", "rag_system.fusion.weight=1")
    assert _ids(alone, QUERIES[0], 5) == _ids(_system(path), QUERIES[0], 5)


@pytest.mark.parametrize("kind", STORES)
def test_the_lexical_index_lies_beside_every_store_and_follows_it(
    write_config: WriteConfig, capsys: Any, kind: str
) -> None:
    store = {**STORES[kind], "path": "store"}
    path = write_config(rag_system={"knowledge_store": store, "lexical": {}})
    folder = path.parent / "store-lexical"
    assert lexical_folder(path.parent / "store") == folder

    def index(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["index", str(path), *arguments, "--json", "-q"]) == 0
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        return str(report["lexical"])

    assert index() == "built"
    before = _ids(_system(path), QUERIES[1])
    assert before == _ids(_system(write_config("memory", rag_system={"lexical": {}})), QUERIES[1])
    assert index() == "kept"
    assert index("--rebuild") == "built"
    corpus = path.parent / "corpus.jsonl"
    rows = corpus.read_text(encoding="utf-8").splitlines()
    corpus.write_text("\n".join([*rows, json.dumps({"id": "new", "text": "zebra"})]) + "\n", encoding="utf-8")
    assert index() == "built"
    assert _ids(_system(path), "zebra zebra", 1) == ["new"]
    # Other settings are another index; it is refused where it is only opened.
    with pytest.raises(KnowledgeStoreError, match=r"other settings \(k1\)"):
        _system(path, "rag_system.lexical.k1=1.2")
    assert index("rag_system.lexical.k1=1.2") == "built"


def test_an_index_of_other_passages_is_refused(write_config: WriteConfig, capsys: Any) -> None:
    path = write_config(rag_system={"knowledge_store": {"path": "store"}, "lexical": {}})
    assert main(["index", str(path), "-q"]) == 0
    dense = [f"rag_system.knowledge_store.path={path.parent / 'store'}", "rag_system.lexical=null"]
    corpus = path.parent / "corpus.jsonl"
    corpus.write_text("\n".join(reversed(corpus.read_text(encoding="utf-8").splitlines())) + "\n", encoding="utf-8")
    assert main(["index", str(path), *dense, "-q"]) == 0
    capsys.readouterr()
    assert main(["query", str(path), "owl ?", "rag_system.generator=null"]) != 0
    assert main(["evaluate", str(path)]) == 3
    assert "The lexical index in" in (said := capsys.readouterr().err)
    assert "fedrag index" in said
    assert "Loading the models" not in said
    # Where there is no store either, both are made for the command alone.
    shutil.rmtree(path.parent / "store")
    assert main(["evaluate", str(path)]) == 0


def test_passages_that_were_added_since_are_not_searched_by_old_words(write_config: WriteConfig) -> None:
    rag_system = _system(write_config(), "rag_system.lexical={}")
    rag_system.knowledge_store.add([KnowledgeNode("new", "zebra")], rag_system.retriever.encode_passages(["zebra"]))
    with pytest.raises(KnowledgeStoreError, match="holds 24 passages, but the knowledge store 25"):
        rag_system.retrieve("zebra", 1)


def test_a_store_that_has_the_name_of_a_lexical_index_is_not_replaced(write_config: WriteConfig, capsys: Any) -> None:
    store = {"knowledge_store": {"path": "store-lexical"}}
    dense = write_config(rag_system=store)
    home = dense.parent
    assert main(["index", str(dense), "-q"]) == 0
    files = {file.name: file.read_bytes() for file in (home / "store-lexical").iterdir()}
    moved = write_config("", rag_system={"knowledge_store": {"path": "store"}, "lexical": {}})
    capsys.readouterr()
    assert main(["index", str(moved), "-q"]) == 2
    assert f"'{home / 'store-lexical'}', where the lexical index goes, holds something else" in capsys.readouterr().err
    assert not (home / "store").exists()
    assert {file.name: file.read_bytes() for file in (home / "store-lexical").iterdir()} == files
    (home / "store-lexical").rename(home / "elsewhere")
    assert main(["index", str(moved), "-q"]) == 0
    # A kill between the renames of a replacement leaves the old index under the name that it is set aside by.
    (home / "store-lexical").rename(name_aside(home / "store-lexical"))
    assert _ids(_system(moved), QUERIES[1])
    assert (home / "store-lexical" / "lexical.json").is_file()


def test_a_filter_hides_passages_from_the_words_too(write_config: WriteConfig) -> None:
    store = {"type": "qdrant", "path": "store", "filter": {"title": "eel"}}
    path = write_config(rag_system={"knowledge_store": store, "lexical": {}})
    assert main(["index", str(path), "-q"]) == 0
    rag_system = _system(path)
    assert len(rag_system.knowledge_store) == 2
    assert _ids(rag_system, "the owl house", 2) == _ids(rag_system, "house", 2) == ["home-eel", "colour-eel"]


def test_index_to_another_place_takes_the_words_along(write_config: WriteConfig, capsys: Any) -> None:
    path = write_config(rag_system={"knowledge_store": {"path": "store"}, "lexical": {}})
    other = write_config("other", rag_system={"knowledge_store": {"type": "faiss", "path": "moved"}, "lexical": {}})
    assert main(["index", str(path), "-q"]) == 0
    assert main(["index", str(path), "--to", str(other), "-q"]) == 0
    assert (other.parent / "moved-lexical").is_dir()
    assert _ids(_system(other), QUERIES[1]) == _ids(_system(path), QUERIES[1])


def test_training_and_its_run_are_hybrid(write_config: WriteConfig, capsys: Any) -> None:
    """Candidates come from the fused list; and what the run saves is found by the commands that use the run."""
    path = write_config(rag_system={"lexical": {}})
    assert main(["train", str(path), "--json", "-q"]) == 0
    run = Path(json.loads(capsys.readouterr().out)["run_dir"])
    assert (run / "knowledge_store-lexical").is_dir()
    assert main(["evaluate", str(run), "--json", "-q"]) == 0
    after = json.loads((run / "summary.json").read_text())["differences"]
    evaluated = json.loads(capsys.readouterr().out)
    assert {item["metric"]: item["after"] for item in after}["mrr"] == pytest.approx(
        evaluated["metrics"]["mrr"]["mean"]
    )


def test_the_loss_is_of_the_fused_scores(write_config: WriteConfig) -> None:
    config = load_config(write_config(rag_system={"lexical": {}, "fusion": {"weight": 0.5}}))
    rag_system = build_rag_system(config)
    trainer = HuggingFaceTrainerForEMDR2(
        rag_system, config=EMDR2Config(top_k=4, validation=ValidationConfig(every="never"))
    )
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def loss(scores: torch.Tensor, lm_scores: torch.Tensor) -> torch.Tensor:
        seen.append((scores, lm_scores))
        return scores.sum(dim=1)

    trainer._loss = loss  # type: ignore[method-assign]
    trainer._prepare(None, None)
    queries = [example.query for example in trainer.train_examples[:2]]
    trainer.losses(rag_system.retriever.features(queries, queries=True), [0, 1])
    embeddings = rag_system.retriever.encode_queries(queries)
    fused, positions = rag_system.search(queries, embeddings, 4)
    ((scores, _),) = seen
    assert scores.detach() == pytest.approx(fused, abs=1e-5)
    assert scores.requires_grad
    assert not torch.equal(positions, rag_system.knowledge_store.search_positions(embeddings, 4)[1])


def test_a_ranking_without_gradient_is_searched_by_but_not_tuned_by(write_config: WriteConfig) -> None:
    rrf = {"lexical": {}, "fusion": {"method": "rrf"}}
    config = load_config(write_config(rag_system=rrf), ["dataset.train=null"])
    trainer = HuggingFaceTrainerForEMDR2(
        build_rag_system(config), Dataset.from_dict({"query": ["owl ?"], "response": ["green"]}), config=EMDR2Config()
    )
    with pytest.raises(ConfigError, match="A ranking by rrf has no gradient to tune the retriever by"):
        trainer.train()


@pytest.mark.parametrize(
    ("overrides", "place", "message"),
    [
        (["rag_system.fusion.weight=0.5"], "rag_system.fusion", "has no effect without rag_system.lexical"),
        (
            ["rag_system.lexical={}", "rag_system.fusion.method=rrf"],
            "rag_system.fusion.method",
            "must be weighted where lsr tunes the retriever: a ranking by rrf has no gradient",
        ),
        (
            ["rag_system.lexical={}", "trainer.mode=generator", "rag_system.fusion={method: rrf, weight: 0.5}"],
            "rag_system.fusion.weight",
            "has no effect with method: rrf",
        ),
        (["rag_system.lexical={}", "rag_system.fusion.weight=0"], "rag_system.fusion.weight", "greater than 0"),
        (["rag_system.lexical.stemmer=true"], "rag_system.lexical.stemmer", "did you mean 'stemming'"),
        (
            [
                "rag_system.lexical={}",
                "trainer.mode=generator",
                "rag_system.fusion.method=rrf",
                "rag_system.inference=ensemble",
            ],
            "rag_system.ensemble_temperature",
            "is missing: the default is for similarities, and the scores of fusion.method: rrf are none",
        ),
        (
            ["rag_system.lexical={stop_words: true}"],
            "rag_system.lexical.language",
            "is missing, which stemming and stop_words need",
        ),
        (["rag_system.lexical.language=german"], "rag_system.lexical.language", "has no effect without stemming or"),
        (["rag_system.lexical={language: klingon, stemming: true}"], "", ""),
    ],
)
def test_settings_that_do_not_go_together_are_told(
    write_config: WriteConfig, capsys: Any, overrides: list[str], place: str, message: str
) -> None:
    path = write_config()
    if not place:
        assert main(["query", str(path), "owl ?", *overrides]) == 2
        assert "There is no stemmer for 'klingon'" in capsys.readouterr().err
        return
    assert main(["validate", str(path), *overrides]) == 2
    assert f"{place}: {message}" in (said := capsys.readouterr().err) or message in said
