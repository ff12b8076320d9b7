"""A retriever and a generator of somebody else, from an entry point, in the commands."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import data_rows
from plugins import installed

from fedrag_cli.cli.main import main


@pytest.fixture(autouse=True)
def models_of_a_plugin(tmp_path: Path) -> Iterator[None]:
    with installed(tmp_path / "packages", "fedrag-models", entry_point="plugin_models:register"):
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Return a function that gives a command's exit code and its JSON document."""

    def command(*arguments: object) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        code = main([*map(str, arguments), "--json"])
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return code, document

    return command


def section(generator: str = "first_sentence", **others: Any) -> dict[str, Any]:
    """Return the config's section `rag_system` with both plug-ins, or with others in their place."""
    return {"retriever": {"type": "hashing", "size": 4096}, "generator": {"type": generator}, "top_k": 2, **others}


def expected_mrr() -> float:
    """Return the mean reciprocal rank of word counts compared by their cosine, without any hashing."""
    rows = data_rows()

    def similarity(first: str, second: str) -> float:
        left, right = Counter(first.split()), Counter(second.split())
        norms = math.hypot(*left.values()) * math.hypot(*right.values())
        return round(sum(left[word] * right[word] for word in left) / norms, 6)

    def reciprocal_rank(question: dict[str, Any]) -> float:
        scores = {row["id"]: similarity(question["query"], row["text"]) for row in rows["corpus"]}
        ranking = sorted(scores, key=lambda name: -scores[name])
        return 1 / (1 + ranking.index(question["relevant_ids"][0]))

    return sum(map(reciprocal_rank, rows["test"])) / len(rows["test"])


def test_every_command_without_training(
    write_config: Callable[..., Path], tmp_path: Path, run: Callable[..., Any]
) -> None:
    store = {"path": str(tmp_path / "store")}
    config = write_config(rag_system=section(knowledge_store=store), dataset={"train": None})
    assert run("validate", config)[0] == 0
    code, document = run("validate", config, "--load")
    loaded = document["loaded"]
    assert (code, loaded["parameters"], loaded["truncated"]) == (0, {}, {"passages": 0, "queries": 0, "prompts": 0})
    code, index = run("index", config)
    assert (code, index["passages"], index["encoded"]) == (0, 24, 24)
    assert run("index", config)[1]["encoded"] == 0
    code, answer = run("query", config, "what is the colour of the owl ?")
    passage = next(row["text"] for row in data_rows()["corpus"] if row["id"] == "colour-owl")
    assert (code, answer["answer"]) == (0, passage.removesuffix(" ."))
    assert answer["sources"][0]["id"] == "colour-owl"
    metrics = "evaluation.metrics=[mrr,exact_match,f1,negative_log_likelihood]"
    code, found = run("evaluate", config, metrics)
    assert code == 0
    rows = [json.loads(line) for line in Path(found["predictions"]).read_text(encoding="utf-8").splitlines()]
    texts = {row["id"]: row["text"] for row in data_rows()["corpus"]}
    likely = [any(row["accepted"][0] in texts[passage["id"]] for passage in row["passages"]) for row in rows]
    assert found["metrics"]["negative_log_likelihood"]["mean"] == pytest.approx(
        sum(0.5 if known else 5.0 for known in likely) / len(rows)
    )
    assert found["metrics"]["mrr"]["mean"] == pytest.approx(expected_mrr(), abs=1e-6)
    assert found["metrics"]["exact_match"]["mean"] == 0
    assert 0.1 < found["metrics"]["f1"]["mean"] < 0.6
    # A store of another encoder is refused, as for the built-in ones.
    code, refused = run("query", config, "where ?", "rag_system.retriever.size=64")
    assert (code, "filled by another encoder (hashing-4096)" in refused["error"]["message"]) == (3, True)


@pytest.mark.parametrize(
    ("mode", "side", "name"), [("retriever", "retriever", "Hashing"), ("generator", "generator", "Scoring")]
)
def test_what_has_no_weights_is_not_trained(
    write_config: Callable[..., Path], run: Callable[..., Any], mode: str, side: str, name: str
) -> None:
    config = write_config(rag_system=section())
    for arguments in (["train", config], ["validate", config, "--load"]):
        code, document = run(*arguments, f"trainer.mode={mode}")
        assert code == 2
        assert document["error"]["message"] == f"The {side} {name} has no weights that could be tuned."
        assert f"use a {side} with weights" in document["error"]["hint"]
    assert not list(config.parent.glob("runs/*/*"))


def test_a_plugin_beside_a_model_that_is_trained(
    write_config: Callable[..., Path], models: dict[str, Path], run: Callable[..., Any]
) -> None:
    retriever = write_config(rag_system=section(retriever={"model": str(models["retriever"])}))
    code, trained = run("train", retriever)
    assert (code, trained["metrics"]["scoring"]["prompts"] > 0) == (0, True)
    assert run("query", trained["run_dir"], "where is the owl ?")[0] == 0
    generator = {"model": str(models["generator"]), "max_new_tokens": 4}
    code, trained = run(
        "train", write_config(rag_system={**section(), "generator": generator}), "trainer.mode=generator"
    )
    assert (code, trained["tuned"]["retriever"]) == (0, None)
    assert trained["metrics"]["prompts"]["prompts"] == 28
    assert run("query", trained["run_dir"], "where is the owl ?")[0] == 0


@pytest.mark.parametrize("objective", ["contrastive", "lsr"])
@pytest.mark.parametrize("train", ["query", "both"])
def test_a_plugin_with_weights_is_trained(
    write_config: Callable[..., Path],
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    train: str,
) -> None:
    config = write_config(rag_system=section(retriever={"type": "vectors"}), evaluation={"metrics": ["mrr"]})
    trainer = f"trainer.retriever={{type: {objective}, train: {train}, learning_rate: 0.05, max_steps: 12}}"
    code, trained = run("train", config, trainer)
    assert (code, trained["steps"]) == (0, 12)
    [difference] = trained["differences"]
    assert abs(difference["difference"]["mean"]) > 0.01
    if objective == "contrastive":
        assert difference["difference"]["mean"] > 0.1
    code, again = run("evaluate", trained["run_dir"])
    after = json.loads((Path(trained["run_dir"]) / "evaluation" / "after.json").read_text(encoding="utf-8"))
    assert again["metrics"]["mrr"]["mean"] == pytest.approx(sum(after["values"]["mrr"]) / len(after["values"]["mrr"]))
    assert run("resume", trained["run_dir"])[0] == 0
    with monkeypatch.context() as patch:
        patch.delattr("plugin_models.VectorsConfig.tuned_in")
        code, document = run("query", trained["run_dir"], "where is the owl ?")
    assert (code, "the config of type 'vectors' does not say how" in document["error"]["message"]) == (2, True)


def test_a_plugin_generator_with_weights_is_trained(
    write_config: Callable[..., Path], models: dict[str, Path], run: Callable[..., Any]
) -> None:
    generator = {"type": "own_model", "model": str(models["generator"]), "max_new_tokens": 4}
    config = write_config(rag_system={**section(), "generator": generator})
    code, trained = run("train", config, "trainer.mode=generator")
    assert (code, trained["mode"]) == (0, "generator")
    assert run("query", trained["run_dir"], "where is the owl ?")[0] == 0


def test_a_federation_whose_sites_share_a_plugin(
    write_config: Callable[..., Path], models: dict[str, Path], run: Callable[..., Any]
) -> None:
    generator = {"model": str(models["generator"]), "max_new_tokens": 4}
    config = write_config(rag_system={**section(), "generator": generator}, federated={"rounds": 1, "min_clients": 2})
    code, document = run("simulate", config, "--clients", 2, "trainer.mode=generator")
    assert (code, document["rounds"][0]["clients"]) == (0, ["site-0", "site-1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.metrics=[perplexity]"], "The generator FirstSentence cannot score answers."),
        (
            ["rag_system.inference=ensemble", "evaluation.metrics=[f1]"],
            "The generator FirstSentence cannot answer from several prompts at once.",
        ),
    ],
)
def test_what_a_generator_does_not_offer_is_refused_in_words(
    write_config: Callable[..., Path],
    run: Callable[..., Any],
    overrides: list[str],
    message: str,
) -> None:
    code, document = run("evaluate", write_config(rag_system=section("plain")), *overrides)
    assert (code, document["error"]["message"]) == (2, message)
    assert "use another generator" in document["error"]["hint"]
