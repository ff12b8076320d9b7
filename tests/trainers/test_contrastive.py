"""Contrastive training on tiny models: what the negatives are, what moves, and that no generator is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import data_rows, write_rows

from fedrag_cli.cli.main import main
from fedrag_cli.config import load_config
from fedrag_cli.data.examples import Example
from fedrag_cli.errors import DataError
from fedrag_cli.losses import contrastive_loss
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.system import RAGSystem, refresh_store
from fedrag_cli.trainers.config import ContrastiveConfig, ValidationConfig
from fedrag_cli.trainers.huggingface import HuggingFaceTrainerForContrastive

NEVER = ValidationConfig(every="never")
CAT, DOG = "what is the colour of the cat ?", "what is the colour of the dog ?"


@pytest.fixture
def rag_system(write_config: Callable[..., Path]) -> RAGSystem:
    return build_rag_system(load_config(write_config()), with_generator=False)


def _example(query: str, *relevant: str) -> Example:
    return Example(query, query, (), relevant)


def test_the_query_encoder_moves_and_nothing_else(rag_system: RAGSystem) -> None:
    config = ContrastiveConfig(batch_size=4, learning_rate=1e-3, max_steps=1)
    trainer = HuggingFaceTrainerForContrastive(rag_system, config=config)
    retriever, store = rag_system.retriever, rag_system.knowledge_store
    query, passages, embeddings = retriever.query_fingerprint(), retriever.fingerprint(), store.embeddings.clone()
    result = trainer.train()
    assert retriever.query_fingerprint() != query
    assert retriever.fingerprint() == passages
    assert torch.equal(store.embeddings, embeddings)
    assert result.metrics["validation"]["loss"] == pytest.approx(trainer.validate()["loss"], abs=1e-5)
    assert result.metrics["pairs"] == 14


def test_mined_negatives_are_the_best_passages_that_are_not_relevant(rag_system: RAGSystem) -> None:
    trainer = HuggingFaceTrainerForContrastive(rag_system, config=ContrastiveConfig(hard_negatives=3))
    example = _example(CAT, "colour-cat", "home-cat")
    first, second = trainer.pairs([example])
    ranking = [scored.node.id for scored in rag_system.retrieve(CAT, 24)]
    nodes = rag_system.knowledge_store.nodes
    assert [nodes[first.passage].id, nodes[second.passage].id] == ["colour-cat", "home-cat"]
    best = [node_id for node_id in ranking if node_id not in example.relevant_ids][:3]
    assert [nodes[place].id for place in first.negatives] == best
    assert first.negatives == second.negatives


def test_the_first_loss_is_the_formula_on_columns_chosen_by_hand(rag_system: RAGSystem) -> None:
    """Three pairs, one of them a second relevant passage: it is no negative of its own query."""
    examples = [_example(CAT, "colour-cat", "home-cat"), _example(DOG, "colour-dog")]
    config = ContrastiveConfig(batch_size=3, learning_rate=1e-3, scale=5.0)
    trainer = HuggingFaceTrainerForContrastive(rag_system, examples, [], config)
    store = rag_system.knowledge_store
    nodes = {node.id: row for node, row in zip(store.nodes, store.embeddings, strict=True)}
    expected = []
    mined = {}
    for example in examples:
        ranking = [scored.node.id for scored in rag_system.retrieve(example.query, 24)]
        mined[example.id] = next(node_id for node_id in ranking if node_id not in example.relevant_ids)
    # The mined negative of the query with two passages stands there twice, once for each of its pairs.
    columns = ["colour-cat", "home-cat", "colour-dog", mined[CAT], mined[CAT], mined[DOG]]
    for example in examples:
        [query] = rag_system.retriever.encode_queries([example.query])
        for own in example.relevant_ids:
            others = [node_id for node_id in columns if node_id not in example.relevant_ids]
            cosines = torch.stack([query @ nodes[node_id] for node_id in [own, *others]])
            expected.append(-torch.log_softmax(5.0 * cosines, dim=0)[0].item())
    assert len(expected) == 3
    assert trainer.train().loss == pytest.approx(sum(expected) / 3, rel=1e-4)


@pytest.fixture
def twins(write_config: Callable[..., Path]) -> RAGSystem:
    """A system whose store has the cat's and the dog's passages under further ids."""
    config = write_config()
    copies = [
        {"id": f"again-{animal}", "text": f"The colour of  the {animal} is {colour} .", "title": "copy"}
        for animal, colour in (("cat", "red"), ("dog", "blue"))
    ]
    write_rows(config.parent / "corpus.jsonl", [*data_rows()["corpus"], *copies])
    return build_rag_system(load_config(config), with_generator=False)


def test_what_answers_a_query_under_another_id_or_in_another_row_is_no_negative(twins: RAGSystem) -> None:
    """The cat's passage has a twin, and another row that asks the same has home-cat for its answer."""
    config = ContrastiveConfig(batch_size=4, learning_rate=1e-3, scale=5.0, hard_negatives=26)
    examples = [_example(CAT, "colour-cat", "again-cat"), _example(DOG, "again-dog")]
    examples += [Example("same", CAT.upper().replace(" ?", "?"), (), ("home-cat",))]
    trainer = HuggingFaceTrainerForContrastive(twins, examples, [], config)
    pairs = trainer.pairs(examples)
    nodes = twins.knowledge_store.nodes
    ids = [nodes[pair.passage].id for pair in pairs]
    assert ids == ["colour-cat", "again-dog", "home-cat"]
    of_cat, of_dog = {"colour-cat", "again-cat", "home-cat"}, {"colour-dog", "again-dog"}
    everything = {node.id for node in nodes}
    for pair, own in zip(pairs, (of_cat, of_dog, of_cat), strict=True):
        assert {nodes[place].id for place in pair.negatives} == everything - own
    # In the batch: the columns of the other cat are none for it, nor are the dog's mined negatives that answer it.
    embeddings = dict(zip((node.id for node in nodes), twins.knowledge_store.embeddings, strict=True))
    columns = [*ids, *(nodes[place].id for pair in pairs for place in pair.negatives)]
    expected = []
    for example, own_id, own in zip(examples, ids, (of_cat, of_dog, of_cat), strict=True):
        [query] = twins.retriever.encode_queries([example.query])
        others = [query @ embeddings[name] for name in columns if name not in own]
        expected.append(-torch.log_softmax(5.0 * torch.stack([query @ embeddings[own_id], *others]), dim=0)[0].item())
    assert trainer.train().loss == pytest.approx(sum(expected) / 3, rel=1e-4)


def test_a_validation_row_that_asks_the_same_spares_its_passage(twins: RAGSystem) -> None:
    config = ContrastiveConfig(hard_negatives=26)
    trainer = HuggingFaceTrainerForContrastive(twins, [_example(CAT, "home-cat")], [_example(CAT, "again-cat")], config)
    [pair] = trainer.pairs(trainer.train_examples)
    nodes = twins.knowledge_store.nodes
    spared = {node.id for node in nodes} - {nodes[place].id for place in pair.negatives}
    assert spared == {"home-cat", "again-cat", "colour-cat"}


def test_the_relevant_passage_ranks_first_after_training(rag_system: RAGSystem) -> None:
    trainer = HuggingFaceTrainerForContrastive(
        rag_system, config=ContrastiveConfig(batch_size=14, learning_rate=3e-3, epochs=40, validation=NEVER)
    )

    def first() -> int:
        found = rag_system.batch_retrieve([example.query for example in trainer.train_examples], 1)
        return sum(
            row[0].node.id in example.relevant_ids for row, example in zip(found, trainer.train_examples, strict=True)
        )

    before = first()
    trainer.train()
    assert first() > max(before, 11)


@pytest.mark.parametrize("train", ["query", "both"])
def test_accumulated_batches_equal_one_large_batch(write_config: Callable[..., Path], train: Any) -> None:
    """The negatives are those of the whole optimizer step, whatever its batches."""

    def run(folder: str, **settings: Any) -> dict[str, torch.Tensor]:
        system = build_rag_system(load_config(write_config(folder)), with_generator=False)
        config = ContrastiveConfig(train=train, optimizer="sgd", learning_rate=1e-2, validation=NEVER, **settings)
        trainer = HuggingFaceTrainerForContrastive(system, config=config)
        trainer.train()
        return trainer.trained_weights()

    large = run("large", batch_size=8)
    small = run("small", batch_size=2, gradient_accumulation_steps=4)
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_training_both_moves_passages_and_refreshes_the_store(rag_system: RAGSystem) -> None:
    before = rag_system.retriever.fingerprint()
    config = ContrastiveConfig(train="both", batch_size=4, learning_rate=1e-3, max_steps=2)
    HuggingFaceTrainerForContrastive(rag_system, config=config).train()
    assert rag_system.retriever.is_shared
    assert rag_system.retriever.fingerprint() != before
    rag_system.require_matching_store()


def test_validation_compares_with_passages_as_they_are_encoded_now(rag_system: RAGSystem) -> None:
    trainer = HuggingFaceTrainerForContrastive(rag_system, config=ContrastiveConfig(train="both", batch_size=4))
    stale = trainer.validate()["loss"]
    with torch.no_grad():
        for parameter in rag_system.retriever.passage_encoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    found = trainer.validate()["loss"]
    # Metrics of the whole system, which come with it, search the store.
    rag_system.require_matching_store()
    refresh_store(rag_system)
    assert found == pytest.approx(trainer.validate()["loss"], rel=1e-5)
    assert found != pytest.approx(stale, rel=1e-3)


def test_scores_are_computed_in_float32_under_mixed_precision(
    rag_system: RAGSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 has three digits, too few for cosines that are multiplied by 20."""
    given: list[torch.Tensor] = []

    def noted(scores: torch.Tensor, *arguments: Any) -> torch.Tensor:
        given.append(scores.detach().clone())
        return contrastive_loss(scores, *arguments)

    monkeypatch.setattr("fedrag_cli.trainers.huggingface.retriever.contrastive_loss", noted)
    config = ContrastiveConfig(precision="bfloat16", batch_size=4, learning_rate=1e-3, max_steps=1, validation=NEVER)
    HuggingFaceTrainerForContrastive(rag_system, config=config).train()
    assert given[0].dtype == torch.float32
    assert not torch.equal(given[0], given[0].bfloat16().float())


def test_examples_without_relevant_ids_are_left_out_and_counted(rag_system: RAGSystem) -> None:
    examples = [_example(CAT, "colour-cat"), _example(DOG, "colour-dog"), _example("where ?")]
    config = ContrastiveConfig(batch_size=2, learning_rate=1e-3)
    result = HuggingFaceTrainerForContrastive(rag_system, examples, [], config).train()
    assert (result.metrics["pairs"], result.metrics["without_relevant_ids"]) == (2, 1)
    with pytest.raises(DataError, match="None of the 1 examples of the training data has relevant ids"):
        HuggingFaceTrainerForContrastive(rag_system, [_example("where ?")], [], config)
    with pytest.raises(DataError, match="None of the 1 examples of the validation data has relevant ids"):
        HuggingFaceTrainerForContrastive(rag_system, examples, [_example("where ?")], config)


def test_validation_goes_in_batches(rag_system: RAGSystem) -> None:
    """With batches of one and no mined negative there is nothing to confuse a passage with."""
    config = ContrastiveConfig(batch_size=1, gradient_accumulation_steps=2, hard_negatives=0)
    trainer = HuggingFaceTrainerForContrastive(rag_system, config=config)
    assert trainer.validate()["loss"] == 0.0
    wide = HuggingFaceTrainerForContrastive(rag_system, config=ContrastiveConfig(batch_size=4, hard_negatives=0))
    queries = rag_system.retriever.encode_queries([example.query for example in wide.validation_examples])
    ids = [node.id for node in rag_system.knowledge_store.nodes]
    places = [ids.index(example.relevant_ids[0]) for example in wide.validation_examples]
    cosines = queries @ rag_system.knowledge_store.embeddings[places].T
    assert wide.validate()["loss"] == pytest.approx(contrastive_loss(cosines).mean().item(), rel=1e-5)


def test_it_trains_through_the_command_line_without_generator_and_answers(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(trainer={"retriever": {"type": "contrastive", "batch_size": 4, "learning_rate": 1e-3}})
    arguments = ["train", str(config), "--json", "rag_system.generator=null"]
    assert main(arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["status"] == "done"
    assert {item["metric"] for item in summary["differences"]} == {"mrr", "recall@1", "recall@5", "ndcg@10"}
    assert "generator" not in summary["fingerprints"]
    assert main(["resume", summary["run_dir"]]) == 0
    assert "fedrag query" not in capsys.readouterr().err
    assert main([*arguments, "evaluation.metrics=[mrr,f1]"]) == 2
    capsys.readouterr()
    rows = [json.loads(line) for line in (config.parent / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    bare = [{name: value for name, value in row.items() if name != "relevant_ids"} for row in rows]
    (config.parent / "train.jsonl").write_text("\n".join(json.dumps(row) for row in bare) + "\n", encoding="utf-8")
    assert main(arguments) == 3
    assert "None of the 14 examples of dataset.train has relevant ids" in " ".join(capsys.readouterr().err.split())


def test_rows_without_answers_are_enough(write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    trainer = {"type": "contrastive", "batch_size": 4, "learning_rate": 1e-3, "epochs": 1}
    config = write_config(trainer={"retriever": trainer})
    for name in ("train", "validation", "test"):
        path = config.parent / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        bare = [{key: value for key, value in row.items() if key != "response"} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in bare), encoding="utf-8")

    def fails(code: int, *arguments: str) -> str:
        assert main([*arguments]) == code
        return " ".join(capsys.readouterr().err.split())

    assert main(["train", str(config), "--json", "rag_system.generator=null"]) == 0
    run = json.loads(capsys.readouterr().out)["run_dir"]
    assert main(["validate", str(config), "--load", "rag_system.generator=null"]) == 0
    assert main(["evaluate", run]) == 0
    assert main(["report", run, "-o", str(config.parent / "report.html")]) == 0
    capsys.readouterr()
    # Where a metric or an objective looks at answers, the error is that of a missing column.
    for arguments, file in (
        (["evaluation.metrics=[mrr,f1]"], "test"),
        (["trainer.retriever.type=lsr"], "test"),
        (["trainer.mode=generator"], "test"),
        (["trainer.mode=generator", "evaluation.metrics=[mrr]"], "validation"),
        (["evaluation.context=oracle"], "test"),
    ):
        if arguments == ["trainer.retriever.type=lsr"]:
            arguments, file = [*arguments, "dataset.test=null", "dataset.validation=null"], "train"
        assert f"{file}.jsonl has no column 'response'" in fails(3, "train", str(config), *arguments)
    rows = [json.loads(line) for line in (config.parent / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    rows[0]["response"] = "red"
    (config.parent / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert "test.jsonl:2: has no 'response'" in fails(3, "train", str(config), "evaluation.metrics=[f1]")


def test_judged_queries_without_answers_are_enough(write_config: Callable[..., Path], tmp_path: Path) -> None:
    """A BEIR folder has judgements and no answers."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": str(n), "text": text}) + "\n" for n, text in enumerate([CAT, DOG])), encoding="utf-8"
    )
    (folder / "qrels" / "train.tsv").write_text(
        "query-id\tcorpus-id\tscore\n0\tcolour-cat\t1\n1\tcolour-dog\t1\n", encoding="utf-8"
    )
    dataset = {"train": {"type": "beir", "path": str(folder), "split": "train"}}
    config = write_config(
        dataset=dataset, trainer={"retriever": {"type": "contrastive", "batch_size": 2, "learning_rate": 1e-3}}
    )
    assert main(["train", str(config), "--json", "rag_system.generator=null"]) == 0
