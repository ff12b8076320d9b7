from __future__ import annotations

import html
import json
import os
import subprocess
import sys
import termios
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import data_rows, write_rows

from fedrag_cli.cli.main import main
from fedrag_cli.commands.train import train
from fedrag_cli.config import load_config, load_config_with_source
from fedrag_cli.errors import RunInterruptedError
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.reporter import SilentReporter


def test_train_writes_a_whole_run_directory(write_config: Callable[..., Path], capsys) -> None:
    config = write_config()
    assert main(["train", str(config), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    run = Path(summary["run_dir"])
    assert summary["status"] == "done"
    assert {item["metric"] for item in summary["differences"]} == {"mrr", "recall@1", "recall@5", "ndcg@10"}
    assert [item["phase"] for item in summary["kept"]] == ["1-retriever"]
    for name in ("config.yaml", "manifest.json", "metrics.jsonl", "summary.json", "README.md", "plots/loss.png"):
        assert (run / name).is_file(), name
    assert json.loads((run / "manifest.json").read_text())["status"] == "done"


def test_accumulated_batches_equal_one_large_batch(write_config: Callable[..., Path], capsys) -> None:
    """Through the command line: batch 1 with 8 accumulated equals batch 8, for both sides."""
    from safetensors.torch import load_file

    def train(folder: str, *overrides: str) -> dict[str, torch.Tensor]:
        config = write_config(folder, trainer={"mode": "alternating"})
        common = [
            f"trainer.{side}.{setting}"
            for side in ("retriever", "generator")
            for setting in ("optimizer=sgd", "learning_rate=0.05", "validation.every=never")
        ]
        assert main(["train", str(config), "--json", *common, *overrides]) == 0
        run = Path(json.loads(capsys.readouterr().out)["run_dir"])
        files = [*run.glob("retriever/query*/*.safetensors"), *run.glob("generator/*.safetensors")]
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    sides = ("retriever", "generator")
    large = train("large", *(f"trainer.{side}.batch_size=8" for side in sides))
    accumulated = [f"trainer.{side}.{s}" for side in sides for s in ("batch_size=1", "gradient_accumulation_steps=8")]
    small = train("small", *accumulated)
    assert large
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, atol=2e-6, rtol=1e-4, msg=name)


def test_the_tuned_models_load_in_their_own_libraries(write_config: Callable[..., Path], capsys) -> None:
    from peft import PeftModel
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForCausalLM

    config = write_config(trainer={"mode": "alternating"})
    assert main(["train", str(config), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    run = Path(summary["run_dir"])
    retriever = SentenceTransformer(str(run / "retriever"), device="cpu")
    query, passage = retriever.encode_query(["the cat"]), retriever.encode_document(["the cat"])
    assert abs(query - passage).max() > 1e-5
    base = AutoModelForCausalLM.from_pretrained(load_config(config).rag_system.generator.model)
    adapted = PeftModel.from_pretrained(base, str(run / "generator"))
    assert any("lora" in name for name, _ in adapted.named_parameters())
    assert not [file for file in run.rglob("*") if file.suffix == ".bin" and "checkpoints" not in file.parts]


def test_the_time_of_a_resumed_run_counts_all_its_parts(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    source = load_config_with_source(write_config())
    with monkeypatch.context() as patched:
        patched.setattr("fedrag_cli.commands.train.save_models", interrupt)
        with pytest.raises(RunInterruptedError):
            train(source, SilentReporter())
    (path,) = Path(source.config.run.output_dir).glob("*/*")
    run = RunDirectory.open(path)
    events = run.events()
    assert events[-1]["event"] == "stopped"
    # As if the first part had begun two hours earlier than it has.
    began = datetime.fromisoformat(events[0]["time"]) - timedelta(hours=2)
    events[0]["time"] = began.isoformat()
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    summary = train(load_config_with_source(run.config_file), SilentReporter(), run=run)
    assert 7200 < summary["seconds"] < 7200 + 600


@pytest.mark.slow
def test_a_terminal_shows_our_bars_alone(write_config: Callable[..., Path]) -> None:
    terminal, other_end = os.openpty()
    # Bars draw nothing on a terminal without columns.
    termios.tcsetwinsize(terminal, (40, 200))
    config = write_config(trainer={"mode": "generator"})
    settings = ("trainer.generator.lora=null", "trainer.generator.max_steps=1", "evaluation.metrics=[mrr]")
    environment = {name: value for name, value in os.environ.items() if "TQDM" not in name and "BARS" not in name}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "fedrag_cli", "train", str(config), *settings],
        stderr=other_end,
        env=environment | {"OMP_NUM_THREADS": "1", "TERM": "xterm"},
    )
    os.close(other_end)
    shown = b""
    while part := _read(terminal):
        shown += part
    os.close(terminal)
    assert process.wait(60) == 0, shown.decode()
    assert "1-generator" in shown.decode()
    for bar in ("Loading weights", "Writing model shards", "it/s]"):
        assert bar not in shown.decode()


def _read(terminal: int) -> bytes:
    """Return what comes next; nothing where the other end is closed."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


def _write(config: Path, split: str, rows: list[dict[str, object]]) -> None:
    write_rows(config.parent / f"{split}.jsonl", rows)


def test_questions_that_were_trained_on_are_told_with_every_verdict(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(trainer={"retriever": {"type": "contrastive", "learning_rate": 1e-3, "max_steps": 2}})
    rows = data_rows()
    same = [{**row, "query": row["query"].upper().replace(" ?", "?")} for row in rows["train"]]
    _write(config, "test", same)
    said = "14 of 14 test questions are also in train: the difference says nothing"
    assert main(["validate", str(config), "--load", "rag_system.generator=null"]) == 0
    assert said in " ".join(capsys.readouterr().err.split())
    assert main(["train", str(config), "rag_system.generator=null"]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert told.index("verdict") < told.index(said)
    [run] = (config.parent / "runs").glob("*/*")
    [overlap] = json.loads((run / "summary.json").read_text())["overlaps"]
    assert (overlap["split"], overlap["other"], overlap["questions"], overlap["of"]) == ("test", "train", 14, 14)
    assert overlap["message"] == said
    assert said in (run / "README.md").read_text()
    assert main(["report", str(run), "-o", str(config.parent / "report.html")]) == 0
    page = (config.parent / "report.html").read_text()
    assert said in page
    assert "14 of 14 compared questions are also in train: the difference says nothing." in page
    assert main(["compare", str(run), "--json"]) == 0
    [compared] = json.loads(capsys.readouterr().out)["comparisons"]
    assert compared["in_train"] == 14
    assert "the difference says nothing" in compared["verdict"]
    # Some of them, and none.
    _write(config, "test", [*same[:3], *rows["test"]])
    assert main(["validate", str(config), "--load", "--json", "rag_system.generator=null"]) == 0
    [overlap] = json.loads(capsys.readouterr().out)["loaded"]["overlaps"]
    assert overlap["message"].startswith("3 of 9 test questions are also in train: part of the difference")
    _write(config, "test", rows["test"])
    assert main(["validate", str(config), "--load", "--json", "rag_system.generator=null"]) == 0
    assert json.loads(capsys.readouterr().out)["loaded"]["overlaps"] == []


def _too_long(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [*rows[:2], {**rows[2], "query": "what is " * 300}, *rows[3:]]


def _answered(rows: list[dict[str, object]], answer: str) -> list[dict[str, object]]:
    return [rows[0], {**rows[1], "response": answer}, *rows[2:]]


REFUSED = {
    "question": ("train", _too_long, [], 3, "train.jsonl:3: dataset.train: The question 'what is what"),
    "answer": (
        "train",
        lambda rows: _answered(rows, "red " * 300),
        [],
        3,
        "train.jsonl:2: dataset.train: The question",
    ),
    "validation": ("validation", _too_long, [], 3, "validation.jsonl:3: dataset.validation: The question"),
    "test": ("test", _too_long, ["evaluation.metrics=[f1]"], 3, "test.jsonl:3: dataset.test: The question"),
    "likelihood": (
        "test",
        lambda rows: _answered(rows, "red " * 300),
        ["evaluation.metrics=[perplexity]"],
        3,
        "test.jsonl:2: dataset.test: The question",
    ),
    "unknown id": (
        "test",
        lambda rows: [{**rows[0], "relevant_ids": ["nothing"]}, *rows[1:]],
        [],
        3,
        "test.jsonl:1: the relevant id 'nothing' is no passage",
    ),
    "no ids": (
        "train",
        lambda rows: [{"query": row["query"], "response": row["response"]} for row in rows],
        ["trainer.retriever.type=contrastive"],
        3,
        "None of the 14 examples of dataset.train has relevant ids",
    ),
    "too few": (
        "train",
        lambda rows: rows[:1],
        ["trainer.retriever.type=contrastive", "trainer.retriever.hard_negatives=0"],
        3,
        "All training examples have the same relevant passage",
    ),
    "top_k": ("train", None, ["trainer.retriever.top_k=25"], 3, "trainer.retriever.top_k is 25, but the corpus has 24"),
    "target": (
        "train",
        None,
        ["trainer.mode=generator", "trainer.generator.lora.target_modules=[q_proj,v_porj]"],
        2,
        "'v_porj' (did you mean 'v_proj'",
    ),
    "precision": ("train", None, ["trainer.retriever.precision=float16"], 3, "float16 needs a cuda device"),
    "max_length": ("train", None, ["rag_system.retriever.max_length=65"], 3, "has 64 positions"),
    "no generator": ("train", None, ["rag_system.generator=null"], 2, "The config has no rag_system.generator"),
    "template": (
        "train",
        None,
        ["rag_system.prompt.passage_template='{text} {year}'"],
        3,
        "has no field 'year', which rag_system.prompt.passage_template names",
    ),
    "empty": ("train", lambda _: [], [], 3, "train.jsonl"),
    "group": ("test", None, ["evaluation.group_by=year"], 3, "test.jsonl:1: the example 'test-0001' has no 'year'"),
    "oracle": (
        "test",
        lambda rows: [{"query": row["query"], "response": row["response"]} for row in rows],
        ["evaluation.context=oracle", "evaluation.metrics=[f1]"],
        3,
        "evaluation.context is oracle, but no example has relevant ids",
    ),
    "metric": (
        "validation",
        lambda rows: [{"query": row["query"], "response": row["response"]} for row in rows],
        ["trainer.retriever.validation.metric=mrr"],
        3,
        "The validation metric 'mrr' needs relevant ids",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_validate_finds_what_train_refuses_before_its_first_step(
    case: str, write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    split, change, overrides, code, said = REFUSED[case]
    config = write_config()
    if change is not None:
        _write(config, split, change(data_rows()[split]))
    told = []
    for command in (["validate", "--load"], ["train"]):
        assert main([command[0], str(config), *command[1:], *overrides]) == code, command
        told.append(" ".join(capsys.readouterr().err.split()))
        assert said in told[-1]
        assert "Evaluating" not in told[-1]
    assert told[0].partition("Error: ")[2] == told[1].partition("Error: ")[2]
    assert not (config.parent / "runs").exists()


def test_all_rows_that_do_not_fit_are_told_at_once(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config()
    _write(config, "train", _answered(_too_long(data_rows()["train"]), "red " * 300))
    _write(config, "validation", _too_long(data_rows()["validation"]))
    assert main(["train", str(config), "--json"]) == 3
    problems = json.loads(capsys.readouterr().out)["error"]["problems"]
    places = {(problem["file"], problem["line"]) for problem in problems}
    assert places == {("train.jsonl", 2), ("train.jsonl", 3), ("validation.jsonl", 3)}


def test_what_the_limits_cut_off_is_told_with_what_to_set(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(trainer={"mode": "alternating", "retriever": {"top_k": 2, "max_steps": 1}})
    limits = ["rag_system.retriever.max_length=10", "rag_system.generator.context_window=80"]
    settings = ["trainer.generator.max_steps=1", "evaluation.metrics=[mrr,f1]", *limits]
    assert main(["train", str(config), "--json", *settings]) == 0
    streams = capsys.readouterr()
    summary = json.loads(streams.out)
    by_kind = {item["kind"]: item for item in summary["lengths"]}
    tokenizer = _tokenizer_of(config)
    counts = [len(tokenizer(row["text"])["input_ids"]) for row in data_rows()["corpus"]]
    passages = by_kind["passages"]
    assert (passages["texts"], passages["limit"], passages["tokens"]) == (24, 10, sum(counts))
    assert passages["truncated"] == sum(count > 10 for count in counts) > 0
    assert passages["share"] == pytest.approx(sum(max(count - 10, 0) for count in counts) / sum(counts))
    assert f"{100 * passages['share']:.3g} % of all tokens of passages are cut off" in passages["message"]
    assert "Raise rag_system.retriever.max_length to at most 64, or split" in passages["message"]
    for kind in ("evaluation prompts", "scored prompts", "training prompts"):
        assert 0 < by_kind[kind]["share"] < 1, kind
        assert "Raise rag_system.generator.context_window to at most 256, or lower top_k" in by_kind[kind]["message"]
    run = Path(summary["run_dir"])
    assert main(["report", str(run), "-o", str(config.parent / "report.html")]) == 0
    page = html.unescape((config.parent / "report.html").read_text())
    for item in summary["lengths"]:
        assert item["message"] in (run / "README.md").read_text()
        assert item["message"] in page
    assert (
        main(["index", str(config), f"rag_system.knowledge_store.path={config.parent / 'store'}", "--json", limits[0]])
        == 0
    )
    streams = capsys.readouterr()
    assert passages["message"] in " ".join(streams.err.split())
    assert json.loads(streams.out)["truncated_share"] == pytest.approx(passages["share"], abs=1e-4)
    assert main(["validate", str(config), "--load", *limits]) == 0
    assert passages["message"] in " ".join(capsys.readouterr().err.split())


def _tokenizer_of(config: Path) -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(load_config(config).rag_system.retriever.model)


def test_metrics_without_a_split_are_no_error(write_config: Callable[..., Path], capsys: Any) -> None:
    config = write_config(dataset={"test": None, "validation": None}, evaluation={"metrics": ["mrr"]})
    assert main(["train", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differences"] == []
