"""Faults that a review found once: each stays mended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedrag_cli.cli.main import main
from fedrag_cli.config import load_config
from fedrag_cli.errors import TrainingError
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.trainers.config import LSRConfig, RALTConfig, ValidationConfig
from fedrag_cli.trainers.huggingface import HuggingFaceTrainerForLSR, HuggingFaceTrainerForRALT

NEVER = ValidationConfig(every="never")


def _system(write_config: Callable[..., Path], *overrides: str, folder: str = ".") -> RAGSystem:
    return build_rag_system(load_config(write_config(folder), overrides))


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


def test_rare_records_change_neither_loss_nor_checks(write_config: Callable[..., Path]) -> None:
    settings: dict[str, Any] = {"top_k": 4, "batch_size": 2, "learning_rate": 1e-3, "validation": NEVER}
    often = HuggingFaceTrainerForLSR(_system(write_config), config=LSRConfig(**settings)).train()
    rarely = HuggingFaceTrainerForLSR(_system(write_config), config=LSRConfig(log_every=100, **settings)).train()
    assert rarely.loss == often.loss > 0
    settings = {"log_every": 100, "learning_rate": 1e30, "batch_size": 4, "validation": NEVER}
    trainer = HuggingFaceTrainerForRALT(_system(write_config), config=RALTConfig(**settings))
    with pytest.raises(TrainingError, match="not finite"):
        trainer.train()


def test_mixed_precision_scores_passages_in_float32(write_config: Callable[..., Path]) -> None:
    rag_system = _system(write_config)
    trainer = HuggingFaceTrainerForLSR(rag_system, config=LSRConfig(top_k=8, validation=NEVER))
    features = rag_system.retriever.features([trainer.train_examples[0].query], queries=True)
    seen: list[torch.Tensor] = []
    loss = trainer._loss
    trainer._loss = lambda scores, lm: (seen.append(scores), loss(scores, lm))[1]  # type: ignore[method-assign]
    with torch.autocast("cpu", torch.bfloat16):
        trainer.losses(features, [0])
    assert seen[0].dtype == torch.float32
    assert not torch.equal(seen[0], seen[0].bfloat16().float())


def test_mixed_precision_ends_with_training(write_config: Callable[..., Path]) -> None:
    rag_system = _system(write_config)
    generator = rag_system.require_generator()
    settings = RALTConfig(lora=None, precision="bfloat16", learning_rate=1e-3, batch_size=4, validation=NEVER)
    HuggingFaceTrainerForRALT(rag_system, config=settings).train()
    score = generator.target_log_probs(["the cat is"], [" red"])
    fresh = type(generator)(generator.model, generator.tokenizer, generator.config)
    vars(fresh.model).pop("forward", None)
    assert torch.equal(fresh.target_log_probs(["the cat is"], [" red"]), score)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 3},
        {"learning_rate": 5e-2, "epochs": 10, "validation": ValidationConfig(every="epoch", patience=1)},
    ],
)
def test_a_run_at_its_end_is_not_trained_further(
    write_config: Callable[..., Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = LSRConfig(**{"top_k": 4, "batch_size": 4, "learning_rate": 1e-3, **settings})
    folder = tmp_path / "checkpoints"
    trainer = HuggingFaceTrainerForLSR(_system(write_config), config=config)
    result = trainer.train(checkpoints=folder)
    # The folder may have moved in the meantime, too.
    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    again = HuggingFaceTrainerForLSR(_system(write_config), config=config)
    resumed = again.train(checkpoints=moved)
    assert (resumed.steps, resumed.loss, resumed.metrics) == (result.steps, result.loss, result.metrics)
    weights = again.trained_weights()
    assert all(torch.equal(weights[name], tensor) for name, tensor in trainer.trained_weights().items())


def test_sampling_follows_the_runs_seed(write_config: Callable[..., Path]) -> None:
    hot = ("rag_system.generator.temperature=2.0", "rag_system.generator.max_new_tokens=12")
    first, second = (_system(write_config, *hot).batch_query(["what ?", "where ?"]) for _ in range(2))
    assert [answer.text for answer in first] == [answer.text for answer in second]
    other = _system(write_config, *hot, "run.seed=7").batch_query(["what ?", "where ?"])
    assert [answer.text for answer in other] != [answer.text for answer in first]


def test_cutoffs_beyond_the_depth_are_honoured(write_config: Callable[..., Path], capsys: Any) -> None:
    config = str(write_config())

    def measure(depth: int) -> dict[str, float]:
        arguments = [f"evaluation.depth={depth}", "evaluation.metrics=[mrr,recall@24]"]
        assert main(["evaluate", config, "--json", *arguments]) == 0
        metrics = json.loads(capsys.readouterr().out)["metrics"]
        return {name: value["mean"] for name, value in metrics.items()}

    shallow, deep = measure(1), measure(24)
    assert shallow["recall@24"] == deep["recall@24"] == 1.0
    assert shallow["mrr"] < deep["mrr"]


def test_a_run_fixes_its_models(write_config: Callable[..., Path], models: dict[str, Path], capsys: Any) -> None:
    assert main(["train", str(write_config()), "--json"]) == 0
    run = json.loads(capsys.readouterr().out)["run_dir"]
    assert main(["evaluate", run, f"rag_system.retriever.model={models['other_retriever']}"]) == 2
    assert "rag_system.retriever.model is fixed by the run" in " ".join(capsys.readouterr().err.split())


def test_a_run_whose_model_has_changed_is_not_resumed(
    write_config: Callable[..., Path], models: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    model = tmp_path / "retriever"
    shutil.copytree(models["retriever"], model)
    config = write_config(
        rag_system={"retriever": {"model": str(model)}, "generator": {"model": str(models["generator"])}}
    )
    assert main(["train", str(config), "--json"]) == 0
    run = Path(json.loads(capsys.readouterr().out)["run_dir"])
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
    shutil.rmtree(model)
    shutil.copytree(models["other_retriever"], model)
    assert main(["resume", str(run)]) == 1
    assert "The base models of this run have changed since it started: retriever" in capsys.readouterr().err


def test_metrics_without_a_split_are_no_error(write_config: Callable[..., Path], capsys: Any) -> None:
    config = write_config(dataset={"test": None, "validation": None}, evaluation={"metrics": ["mrr"]})
    assert main(["train", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differences"] == []


def test_tied_weights_of_an_encoder_are_saved(write_config: Callable[..., Path], tmp_path: Path) -> None:
    rag_system = _system(write_config)
    rag_system.retriever.separate_encoders()
    encoder = rag_system.retriever.query_encoder
    encoder.register_parameter("tied", next(encoder.parameters()))
    trainer = HuggingFaceTrainerForLSR(rag_system, config=LSRConfig(top_k=4, batch_size=4, learning_rate=1e-3))
    assert trainer.train(checkpoints=tmp_path / "checkpoints").steps == 4
