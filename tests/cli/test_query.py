"""`fedrag query` and `fedrag evaluate`, of a config and of a run, and what they take for a question."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedrag_cli.cli.main import main
from fedrag_cli.cli.query import _sort
from fedrag_cli.errors import EXIT_DATA

LONG = "why " * 2000


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return the one JSON document on stdout."""
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert next(iter(value)) == "schema_version"
    assert value["schema_version"] == 1
    return value


def test_index_query_and_evaluate(
    write_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = tmp_path / "store"
    config = str(write_config())
    with_store = [config, f"rag_system.knowledge_store.path={store}"]
    assert main(["index", *with_store, "--json"]) == 0
    report = document(capsys)
    assert (report["path"], report["passages"], report["dimension"], report["truncated"]) == (str(store), 24, 32, 0)
    assert sorted(path.name for path in store.iterdir()) == ["embeddings.safetensors", "nodes.jsonl"]

    question = "what is the colour of the cat ?"
    assert main(["query", *with_store, question, "--json"]) == 0
    answer = document(capsys)
    assert (answer["query"], len(answer["sources"]), answer["dropped_tokens"]) == (question, 2, 0)
    assert answer["sources"][0]["score"] >= answer["sources"][1]["score"]
    assert answer["sources"][0]["text"].endswith(" .")

    assert main(["query", *with_store, question]) == 0
    shown = capsys.readouterr()
    assert shown.out == answer["answer"] + "\n"
    assert f"[1] {answer['sources'][0]['id']} (" in shown.err
    assert main(["query", *with_store, question, "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.out == answer["answer"] + "\n"
    assert "[1]" not in shown.err
    assert "Loading the models" not in shown.err

    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\n\nwhere is the dog ?\n"))
    assert main(["query", *with_store, "--json"]) == 0
    answers = document(capsys)["answers"]
    assert [item["query"] for item in answers] == [question, "where is the dog ?"]
    assert answers[0] == {key: value for key, value in answer.items() if key != "schema_version"}
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\n"))
    assert main(["query", *with_store, "-q"]) == 0
    shown = capsys.readouterr()
    assert shown.out == answer["answer"] + "\n"
    assert "[1]" not in shown.err
    assert "Loading the models" not in shown.err

    predictions = tmp_path / "predictions.jsonl"
    assert main(["evaluate", *with_store, "--predictions", str(predictions), "--json"]) == 0
    summary = document(capsys)
    assert (summary["split"], summary["confidence"]) == ("test", 0.95)
    assert all(item["n"] == 6 for item in summary["metrics"].values())
    rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 6


def test_evaluate_and_query_a_run(
    write_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDRAG_TEST_SECRET", "s3cret-prompt")
    config = str(write_config())
    template = "rag_system.prompt.template='${oc.env:FEDRAG_TEST_SECRET} {context} {query}'"
    overrides = ["trainer.retriever.epochs=1", template]
    assert main(["train", config, *overrides, "--json"]) == 0
    trained = document(capsys)
    run = Path(trained["run_dir"])
    written = [path for path in run.rglob("*") if path.is_file() and b"s3cret-prompt" in path.read_bytes()]
    assert [str(path.relative_to(run)) for path in written] == []

    assert main(["evaluate", str(run), "evaluation.metrics=[mrr,recall@5]", "--json"]) == 0
    metrics = document(capsys)["metrics"]
    after = {item["metric"]: item["after"] for item in trained["differences"]}
    assert {name: item["mean"] for name, item in metrics.items()} == pytest.approx(
        {name: after[name] for name in ("mrr", "recall@5")}
    )

    assert main(["query", str(run), "where is the owl ?", "--json"]) == 0
    assert len(document(capsys)["sources"]) == 2

    # Resuming a finished run changes nothing.
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["resume", str(run), "--json"]) == 0
    again = document(capsys)
    assert again["differences"] == trained["differences"]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before

    # A run that was moved is found where it is now.
    moved = tmp_path / "moved"
    run.rename(moved)
    assert main(["resume", str(moved)]) == 0
    shown = capsys.readouterr().err
    assert f"Everything is in {moved} " in shown
    assert str(run) not in shown
    (moved / "retriever").rename(tmp_path / "retriever")
    for command in (["resume"], ["evaluate"], ["query"]):
        assert main([*command, str(moved)]) == EXIT_DATA
        assert f"'{moved}'" in (shown := capsys.readouterr().err)
        assert "are gone: retriever/." in shown


def test_a_run_fixes_its_models(write_config: Callable[..., Path], models: dict[str, Path], capsys: Any) -> None:
    assert main(["train", str(write_config()), "--json"]) == 0
    run = json.loads(capsys.readouterr().out)["run_dir"]
    assert main(["evaluate", run, f"rag_system.retriever.model={models['other_retriever']}"]) == 2
    assert "rag_system.retriever.model is fixed by the run" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["c.yaml", "E=mc2 is what?"], ("c.yaml", "E=mc2 is what?", [])),
        (["E=mc2 is what?"], (None, "E=mc2 is what?", [])),
        (["x.y=3 means what ?", "run.seed=3"], (None, "x.y=3 means what ?", ["run.seed=3"])),
        (["run=3 means what ?"], (None, "run=3 means what ?", [])),
        (["c.yaml", "what ?", "trainr.mode=generator"], ("c.yaml", "what ?", ["trainr.mode=generator"])),
        (["c.yaml", "federated={rounds: 2}"], ("c.yaml", None, ["federated={rounds: 2}"])),
        (["c.yaml", "rag_system.generator.model=org/a=b"], ("c.yaml", None, ["rag_system.generator.model=org/a=b"])),
        (["c.yaml", LONG], ("c.yaml", LONG, [])),
        ([LONG], (None, LONG, [])),
        (["LICENSE"], (None, "LICENSE", [])),
        (["what // is in fedrag.yaml"], (None, "what // is in fedrag.yaml", [])),
        (["missing.yaml"], ("missing.yaml", None, [])),
        (["lr=1.yaml"], ("lr=1.yaml", None, [])),
        (["folder", "LICENSE"], ("folder", "LICENSE", [])),
        (["folder"], ("folder", None, [])),
        (["\ufeffwhat ?"], (None, "what ?", [])),
        (["stra\udcc3\udc9fe ?"], (None, "straße ?", [])),
    ],
)
def test_questions_paths_and_settings_are_told_apart(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: tuple[str | None, str | None, list[str]],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fedrag.yaml", "c.yaml", "lr=1.yaml", "LICENSE"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    path, question, overrides = _sort(arguments)
    assert (str(path) if path else None, question, overrides) == expected


def test_outputs_and_inputs_in_any_encoding(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config())
    for encoding in ("ascii", "cp1252"):
        output = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding=encoding))
        assert main(["query", config, "wo ist 東京, Straße ?", "--json"]) == 0
        assert json.loads(output.getvalue())["query"] == "wo ist 東京, Straße ?"
        assert main(["query", config, "wo ist 東京 ?"]) == 0
        assert main(["schema"]) == 0
        sys.stdout.flush()
        assert output.getvalue().endswith(b"}\n")
    monkeypatch.undo()
    monkeypatch.chdir(Path(config).parent)
    for given, encoding in (
        (b"\xef\xbb\xbfwo ist die Stra\xc3\x9fe ?\r\n", "ascii"),
        (b"what ?\ncaf\xe9 ?\n", "utf-8"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding=encoding))
        capsys.readouterr()
        code = main(["query", config, "--json"])
        if encoding == "ascii":
            assert code == 0
            assert [answer["query"] for answer in document(capsys)["answers"]] == ["wo ist die Straße ?"]
        else:
            assert code == EXIT_DATA
            message = "Line 2 of the input is not UTF-8 text: the byte 0xe9 cannot be decoded."
            assert document(capsys)["error"]["message"] == message
