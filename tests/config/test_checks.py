from __future__ import annotations

from pathlib import Path

import pytest

from fedrag_cli.config import load_config
from fedrag_cli.config.fields import GENERATOR_METRICS
from fedrag_cli.config.problems import InvalidConfigError
from fedrag_cli.config.validation import evaluation_split, require_generator, require_training, tuned_sides
from fedrag_cli.errors import ConfigError

BASE = """\
rag_system:
  retriever: {model: org/r}
  generator: {model: org/g}
dataset:
  corpus: {path: c.jsonl}
  train: {path: t.jsonl}
"""
VALIDATION = "dataset.validation.path=v.jsonl"
GENERATOR = "trainer.mode=generator"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(BASE, encoding="utf-8")
    return file


NOT_FOR_RETRIEVER = "does not measure the retriever (metrics: loss, mrr, hit@K, recall@K, ndcg@K)"
NOT_FOR_GENERATOR = f"does not measure the generator (metrics: loss, {', '.join(GENERATOR_METRICS)})"


@pytest.mark.parametrize(
    ("overrides", "finding"),
    [
        (
            ["evaluation.metrics=[]"],
            "evaluation.metrics: names no metric; leave it out for those of the side that is tuned",
        ),
        (["run.device=gpu"], "run.device: 'gpu' is no device (auto, cpu, mps, cuda, cuda:N)"),
        (["run.device='cuda:'"], "run.device: 'cuda:' is no device (auto, cpu, mps, cuda, cuda:N)"),
        (["run.device='cpu:0'"], "run.device: 'cpu:0' is no device (auto, cpu, mps, cuda, cuda:N)"),
        (
            ["rag_system.generator.device_map=auto", "run.device='cuda:1'"],
            "rag_system.generator.device_map: takes all GPUs, but run.device is cuda:1; "
            "set that to auto or cuda, or remove it",
        ),
        (
            ["rag_system.generator.device_map=balanced", "run.device=cpu"],
            "rag_system.generator.device_map: takes all GPUs, but run.device is cpu; "
            "set that to auto or cuda, or remove it",
        ),
        (
            ["rag_system.generator.quantization=4bit", "rag_system.generator.model=package://llm/m.gguf"],
            "rag_system.generator.quantization: is not for GGUF files, which transformers turns into plain weights; "
            "remove it",
        ),
        (
            [GENERATOR, "rag_system.generator.quantization=8bit", "trainer.generator.lora=null"],
            "trainer.generator.lora: is needed, because the weights of a quantised generator "
            "cannot be tuned themselves",
        ),
        (["run.name=../up"], "run.name: '../up' is no name of a folder (write the path into run.output_dir)"),
        (["run.name=a/b"], "run.name: 'a/b' is no name of a folder (write the path into run.output_dir)"),
        (["run.name=.."], "run.name: '..' is no name of a folder (write the path into run.output_dir)"),
        (
            ["rag_system.retriever.model=null"],
            "rag_system.retriever: needs 'model', or both 'query_model' and 'passage_model'",
        ),
        (
            ["rag_system.retriever.model=null", "rag_system.retriever.query_model=a"],
            "rag_system.retriever: needs 'model', or both 'query_model' and 'passage_model'",
        ),
        (
            ["rag_system.retriever.passage_model=a"],
            "rag_system.retriever: has 'model' beside 'query_model' or 'passage_model'; keep one or the other",
        ),
        (["evaluation.split=test"], "evaluation.split: is 'test', but there is no dataset.test"),
        (["evaluation.split=validation"], "evaluation.split: is 'validation', but there is no dataset.validation"),
        (
            ["rag_system.generator=null", "evaluation.metrics=[mrr,f1]"],
            "evaluation.metrics: f1 needs a rag_system.generator",
        ),
        (
            ["trainer.retriever.top_k=1"],
            "trainer.retriever.top_k: must be at least 2: among one passage there is no ranking to learn",
        ),
        (
            ["trainer.retriever.refresh_every=5"],
            "trainer.retriever.refresh_every: has no effect with train: query, whose index never goes stale; remove it",
        ),
        *[
            (
                [f"trainer.retriever.type={objective}", "trainer.retriever.top_k=1"],
                "trainer.retriever.top_k: must be at least 2: among one passage there is no ranking to learn",
            )
            for objective in ("pdist", "emdr2", "loop")
        ],
        (
            ["trainer.retriever.type=loop", "trainer.retriever.refresh_every=5"],
            "trainer.retriever.refresh_every: has no effect with train: query, whose index never goes stale; remove it",
        ),
        (
            [
                "trainer.retriever.type=contrastive",
                "trainer.retriever.batch_size=1",
                "trainer.retriever.hard_negatives=0",
            ],
            "trainer.retriever.hard_negatives: must be at least 1 where a step has one example: it has no other "
            "negative",
        ),
        (
            [GENERATOR, "trainer.generator.retriever_temperature=0.1"],
            "trainer.generator.retriever_temperature: has no effect with passage_weights: uniform; remove it",
        ),
        (
            [GENERATOR, "trainer.generator.passage_weights=retriever", "trainer.generator.passages=together"],
            "trainer.generator.passage_weights: retriever needs passages: separate; together makes one instance of "
            "them all",
        ),
        (
            [GENERATOR, "trainer.generator.passage_weights=retriever", "trainer.generator.top_k=1"],
            "trainer.generator.passage_weights: retriever needs a top_k of at least 2; one passage always has the "
            "weight 1",
        ),
        *[
            (
                [
                    GENERATOR,
                    f"trainer.generator.type={objective}",
                    "trainer.generator.lora=null",
                    "rag_system.generator.adapter=folder",
                ],
                "trainer.generator.lora: null tunes all weights, but rag_system.generator has an adapter; remove one "
                "of the two",
            )
            for objective in ("ralt", "raft")
        ],
        (
            ["trainer.retriever.validation.metric=mrr"],
            "trainer.retriever.validation.metric: needs a dataset.validation",
        ),
        (
            ["trainer.retriever.validation.patience=2"],
            "trainer.retriever.validation.patience: needs a dataset.validation",
        ),
        (
            [VALIDATION, "trainer.retriever.validation.patience=2", "trainer.retriever.validation.every=never"],
            "trainer.retriever.validation.patience: needs validation.every: epoch or a number of steps",
        ),
        (
            [VALIDATION, "trainer.retriever.validation.metric=f1"],
            f"trainer.retriever.validation.metric: 'f1' {NOT_FOR_RETRIEVER}",
        ),
        (
            [VALIDATION, GENERATOR, "trainer.generator.validation.metric=mrr"],
            f"trainer.generator.validation.metric: 'mrr' {NOT_FOR_GENERATOR}",
        ),
        (
            [VALIDATION, "trainer.mode=alternating", "trainer.generator.validation.metric=hit@1"],
            f"trainer.generator.validation.metric: 'hit@1' {NOT_FOR_GENERATOR}",
        ),
    ],
)
def test_findings(path: Path, overrides: list[str], finding: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        load_config(path, overrides)
    assert [f"{problem.path}: {problem.message}" for problem in caught.value.problems] == [finding]


@pytest.mark.parametrize(
    "overrides",
    [
        ["run.device='cuda:1'"],
        ["run.name=v1.2"],
        [
            "rag_system.retriever.model=null",
            "rag_system.retriever.query_model=a",
            "rag_system.retriever.passage_model=b",
        ],
        ["trainer.retriever.train=both", "trainer.retriever.refresh_every=5"],
        [GENERATOR, "trainer.retriever.top_k=1"],
        [GENERATOR, "trainer.generator.passage_weights=retriever", "trainer.generator.retriever_temperature=0.1"],
        [GENERATOR, "trainer.generator.type=raft", "trainer.generator.top_k=1"],
        ["trainer.retriever.type=contrastive", "rag_system.generator=null"],
        ["trainer.retriever.type=emdr2", "trainer.retriever.train=both", "trainer.retriever.refresh_every=5"],
        [GENERATOR, "trainer.generator.top_k=1"],
        [VALIDATION, "evaluation.split=validation"],
        [VALIDATION, "trainer.retriever.validation.metric=loss", "trainer.retriever.validation.patience=1"],
        [VALIDATION, GENERATOR, "trainer.generator.validation.metric=exact_match"],
    ],
)
def test_right_settings(path: Path, overrides: list[str]) -> None:
    load_config(path, overrides)


def test_findings_name_the_line_or_the_override(path: Path) -> None:
    path.write_text(BASE + "run:\n  device: tpu\n", encoding="utf-8")
    with pytest.raises(InvalidConfigError) as caught:
        load_config(path, ["trainer.retriever.top_k=1"])
    assert [str(problem.position) for problem in caught.value.problems] == [
        f"{path}:8",
        "command line (trainer.retriever.top_k=1)",
    ]


def test_tuned_sides(path: Path) -> None:
    modes = ("retriever", "generator", "alternating")
    sides = [tuned_sides(load_config(path, [f"trainer.mode={mode}"])) for mode in modes]
    assert sides == [("retriever",), ("generator",), ("retriever", "generator")]


def test_evaluation_split(path: Path) -> None:
    assert evaluation_split(load_config(path)) is None
    assert evaluation_split(load_config(path, [VALIDATION])) == "validation"
    both = [VALIDATION, "dataset.test.path=t.jsonl"]
    assert evaluation_split(load_config(path, both)) == "test"
    assert evaluation_split(load_config(path, [*both, "evaluation.split=validation"])) == "validation"


def test_what_training_needs(path: Path) -> None:
    require_training(load_config(path))
    with pytest.raises(ConfigError, match=r"has no dataset\.train, which training needs"):
        require_training(load_config(path, ["dataset.train=null"]))
    without = load_config(path, ["rag_system.generator=null"])
    with pytest.raises(ConfigError, match=r"has no rag_system\.generator, which training needs"):
        require_training(without)
    with pytest.raises(ConfigError, match=r"has no rag_system\.generator, which answering needs"):
        require_generator(without, "answering")
    contrastive = ["trainer.retriever.type=contrastive", "rag_system.generator=null"]
    require_training(load_config(path, contrastive))
    with pytest.raises(ConfigError, match=r"has no rag_system\.generator, which training needs"):
        require_training(load_config(path, [*contrastive, "trainer.mode=alternating"]))
