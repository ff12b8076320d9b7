from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import data_rows, write_rows

from fedrag_cli.cli.main import main
from fedrag_cli.errors import EXIT_DATA, EXIT_DONE, EXIT_FAILED, EXIT_USAGE

WriteConfig = Callable[..., Path]
QUESTION = "what is the colour of the cat ?"
LONG = " ".join(["colour"] * 300)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs a command and gives exit code and stderr, and checks what holds for every error."""

    def command(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main([*(str(argument) for argument in arguments), "--json"])
        shown = capsys.readouterr()
        document = json.loads(shown.out)
        assert document["schema_version"] == 1
        assert "Traceback" not in shown.err
        if code:
            for problem in document["error"].get("problems", ()):
                assert problem["message"] in shown.err
            assert document["error"]["exit_code"] == code
            assert document["error"]["hint"], "an error says what to do next"
            assert shown.err.endswith(f"What to do: {document['error']['hint']}\n")
        return code, shown.err

    return command


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def rows(name: str) -> list[dict[str, Any]]:
    return data_rows()[name]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainr.mode=generator", "trainr: is no setting here (did you mean 'trainer'?)"),
        ("run.sed=3", "run.sed: is no setting here (did you mean 'seed'?)"),
        (
            "trainer.retriever.validation.metrc=mrr",
            "trainer.retriever.validation.metrc: is no setting here (did you mean 'metric'?)",
        ),
        (
            "run.seed=99999999999999999999",
            "run.seed: must be less than or equal to 4294967295, not 99999999999999999999",
        ),
        ("dataset.train.path=" + "x" * 300, "is too long for a path"),
        ("rag_system.generator.model=" + "x/" * 2100, "is too long for a path"),
        ("rag_system.generator.adapter='~nobody-here/x'", "'~nobody-here/x' is no path"),
        ('rag_system.knowledge_store.path="a\\0b"', "is no path: it has a NUL character"),
        ("run.name=" + "é" * 125, "run.name: is too long for the name of a folder"),
        (f"trainer.retriever.batch_size=1{'0' * 400}", "must be less than or equal to 2147483647"),
        ("rag_system.top_k=1" + "0" * 5000, "cannot be read: Exceeds the limit"),
        ("run.seed=-1", "run.seed: must be greater than or equal to 0, not -1"),
        ("run.seed=three", "run.seed: must be a whole number, not 'three'"),
        ("trainer.retriever.learning_rate=0", "trainer.retriever.learning_rate: must be greater than 0, not 0"),
        ("dataset.train=null", "The config has no dataset.train, which training needs."),
        ("rag_system.generator=null", "The config has no rag_system.generator, which training needs."),
    ],
)
def test_wrong_settings(write_config: WriteConfig, run: Callable[..., Any], override: str, message: str) -> None:
    config = write_config()
    before = files(config.parent)
    code, shown = run("train", config, override)
    assert code == EXIT_USAGE
    assert message in shown
    assert files(config.parent) == before


def test_a_config_that_is_not_utf_8(write_config: WriteConfig, run: Callable[..., Any]) -> None:
    config = write_config()
    config.write_bytes(b"# caf\xe9\n" + config.read_bytes())
    code, shown = run("validate", config)
    assert code == EXIT_USAGE
    assert f"'{config}' is not UTF-8 text: the byte 0xe9 at offset 5 cannot be decoded." in shown
    assert "What to do: Save the file as UTF-8.\n" in shown


def _missing_file(home: Path) -> None:
    (home / "train.jsonl").unlink()


def _empty_corpus(home: Path) -> None:
    (home / "corpus.jsonl").write_text("", encoding="utf-8")


def _blank_corpus(home: Path) -> None:
    (home / "corpus.jsonl").write_text("\n\n", encoding="utf-8")


def _empty_training_file(home: Path) -> None:
    (home / "train.jsonl").write_text("", encoding="utf-8")


def _duplicate_ids(home: Path) -> None:
    write_rows(home / "corpus.jsonl", [*rows("corpus"), {"id": "colour-cat", "text": "again"}])


def _no_response_column(home: Path) -> None:
    kept = [{"query": row["query"], "answer": row["response"]} for row in rows("train")]
    write_rows(home / "train.jsonl", kept)


def _empty_response(home: Path) -> None:
    changed = rows("train")
    changed[2]["response"] = ""
    changed[4]["response"] = None
    del changed[6]["response"]
    write_rows(home / "train.jsonl", changed)


def _half_a_line(home: Path) -> None:
    path = home / "train.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")


def _long_question(home: Path) -> None:
    changed = rows("train")
    changed[3]["query"] = LONG
    write_rows(home / "train.jsonl", changed)


def _unknown_relevant_id(home: Path) -> None:
    changed = rows("test")
    changed[1]["relevant_ids"] = ["colour-unicorn"]
    write_rows(home / "test.jsonl", changed)


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (_missing_file, ["train.jsonl does not exist.", "Its folder has: "]),
        (_empty_corpus, ["corpus.jsonl is empty."]),
        (_blank_corpus, ["corpus.jsonl has no rows."]),
        (_empty_training_file, ["train.jsonl is empty."]),
        (_duplicate_ids, ["corpus.jsonl:25", "id 'colour-cat' is that of corpus.jsonl:"]),
        (_no_response_column, ["train.jsonl has no column 'response'", "did you mean 'answer'?"]),
        (
            _empty_response,
            [
                "train.jsonl:3: response is empty",
                "train.jsonl:5: response is missing (null)",
                "train.jsonl:7: has no 'response'",
            ],
        ),
        (_half_a_line, ["train.jsonl:14"]),
        (
            _unknown_relevant_id,
            ["test.jsonl:2: the relevant id 'colour-unicorn' is no passage and no document of the corpus"],
        ),
        (_long_question, ["tokens", "the context window has 256"]),
    ],
)
def test_bad_data_leaves_no_run(
    write_config: WriteConfig, run: Callable[..., Any], spoil: Callable[[Path], None], messages: list[str]
) -> None:
    config = write_config()
    spoil(config.parent)
    before = files(config.parent)
    code, shown = run("train", config)
    assert code == EXIT_DATA, shown
    for message in messages:
        assert message in shown
    assert files(config.parent) == before


def test_bad_data_as_json(write_config: WriteConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config()
    _empty_response(config.parent)
    assert main(["train", str(config), "--json"]) == EXIT_DATA
    problems = json.loads(capsys.readouterr().out)["error"]["problems"]
    assert [(item["file"], item["line"]) for item in problems] == [("train.jsonl", line) for line in (3, 5, 7)]
    assert problems[0]["message"] == "response is empty"


@pytest.mark.parametrize(
    "override", ["rag_system.top_k=25", "trainer.retriever.top_k=25"], ids=["rag_system", "trainer"]
)
def test_top_k_above_the_number_of_passages(write_config: WriteConfig, run: Callable[..., Any], override: str) -> None:
    config = write_config()
    before = files(config.parent)
    code, shown = run("train", config, override)
    assert code == EXIT_DATA
    assert (
        f"{override.partition('=')[0]} is 25, but the corpus has 24 passages.\nWhat to do: Set it to 24 or less"
        in shown
    )
    assert files(config.parent) == before


def test_top_k_of_a_side_that_is_not_tuned_does_not_matter(
    write_config: WriteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["query", str(write_config()), QUESTION, "trainer.generator.top_k=25"]) == EXIT_DONE


def test_question_longer_than_the_window(write_config: WriteConfig, run: Callable[..., Any]) -> None:
    code, shown = run("query", write_config(), LONG)
    assert code == EXIT_DATA
    assert "the context window has 256" in shown


def test_store_of_another_encoder(
    write_config: WriteConfig, run: Callable[..., Any], models: dict[str, Path], tmp_path: Path
) -> None:
    config = write_config()
    store = f"rag_system.knowledge_store.path={tmp_path / 'store'}"
    assert run("index", config, store)[0] == EXIT_DONE
    other = f"rag_system.retriever.model={models['other_retriever']}"
    before = files(tmp_path)
    for command in (["query", config, QUESTION], ["train", config], ["evaluate", config]):
        code, shown = run(*command, store, other)
        assert code == EXIT_DATA
        assert "The knowledge store was filled by another encoder (" in shown
        assert "'fedrag index" in shown
    assert files(tmp_path) == before
    assert run("index", config, store, other)[0] == EXIT_DONE
    assert run("query", config, QUESTION, store, other)[0] == EXIT_DONE


def test_store_of_another_corpus(write_config: WriteConfig, run: Callable[..., Any], tmp_path: Path) -> None:
    config = write_config()
    store = f"rag_system.knowledge_store.path={tmp_path / 'store'}"
    assert run("index", config, store)[0] == EXIT_DONE
    changed = rows("corpus")
    changed[0]["text"] = "something else"
    write_rows(config.parent / "corpus.jsonl", changed)
    code, shown = run("query", config, QUESTION, store)
    assert code == EXIT_DATA
    assert (
        f"The knowledge store in '{tmp_path / 'store'}' was built from other passages than the corpus has now." in shown
    )
    assert "'fedrag index" in shown
    assert run("index", config, store)[0] == EXIT_DONE
    assert run("query", config, QUESTION, store)[0] == EXIT_DONE


@pytest.mark.parametrize("name", ["embeddings.safetensors", "nodes.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "gone", "garbage"])
def test_damaged_store(
    write_config: WriteConfig, run: Callable[..., Any], tmp_path: Path, name: str, damage: str
) -> None:
    config = write_config()
    store = f"rag_system.knowledge_store.path={tmp_path / 'store'}"
    assert run("index", config, store)[0] == EXIT_DONE
    path = tmp_path / "store" / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "garbage":
        path.write_bytes(b"\xff\x00garbage\n")
    else:
        path.unlink()
    code, shown = run("query", config, QUESTION, store)
    assert code == EXIT_DATA
    assert f"'{tmp_path / 'store'}'" in shown
    assert ("is damaged" in shown) or (f"holds no knowledge store: '{name}' is missing." in shown)
    assert "[Errno" not in shown
    assert shown.splitlines()[-2].endswith(".")
    assert "fedrag index" in shown


def test_index_without_a_place(write_config: WriteConfig, run: Callable[..., Any]) -> None:
    code, shown = run("index", write_config())
    assert code == EXIT_USAGE
    assert "does not say where to save the knowledge store" in shown


def test_index_with_bad_data_keeps_the_old_store(
    write_config: WriteConfig, run: Callable[..., Any], tmp_path: Path
) -> None:
    config = write_config()
    store = f"rag_system.knowledge_store.path={tmp_path / 'store'}"
    assert run("index", config, store)[0] == EXIT_DONE
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    _empty_corpus(config.parent)
    assert run("index", config, store)[0] == EXIT_DATA
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before


@pytest.mark.parametrize("command", ["train", "index", "evaluate"])
def test_output_that_cannot_be_written(
    write_config: WriteConfig, run: Callable[..., Any], tmp_path: Path, command: str
) -> None:
    config = write_config()
    (tmp_path / "file").write_text("", encoding="utf-8")
    target = tmp_path / "file" / "below"
    arguments = {
        "train": [f"run.output_dir={target}"],
        "index": [f"rag_system.knowledge_store.path={target}"],
        "evaluate": [f"run.output_dir={target}"],
    }[command]
    before = files(tmp_path)
    code, shown = run(command, config, *arguments)
    assert code == EXIT_FAILED
    assert str(target) in shown
    assert "This should not happen" not in shown
    assert files(tmp_path) == before


@pytest.mark.parametrize("side", ["retriever", "generator"])
def test_model_id_that_does_not_exist(write_config: WriteConfig, run: Callable[..., Any], side: str) -> None:
    config = write_config()
    before = files(config.parent)
    code, shown = run("train", config, f"rag_system.{side}.model=fedrag-nobody/no-such-model")
    assert code == EXIT_DATA, shown
    assert f"The {side} 'fedrag-nobody/no-such-model' cannot be loaded: " in shown
    assert "Check the id and the network" in shown
    assert files(config.parent) == before


@pytest.mark.parametrize("side", ["retriever", "generator"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("package://fedrag_no_such_package/model", "The package 'fedrag_no_such_package' of the model"),
        ("package://fedrag_cli/no-such-folder", "The package 'fedrag_cli' has no 'no-such-folder' inside."),
        ("https://example.org/model", "'https://example.org/model' is no model reference."),
        ("./nowhere", "There is no model at '"),
        ("./train.jsonl", "is neither a model directory nor a GGUF file."),
        (".", "cannot be loaded: "),
    ],
)
def test_wrong_models(
    write_config: WriteConfig,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    side: str,
    model: str,
    message: str,
) -> None:
    config = write_config()
    monkeypatch.chdir(config.parent)
    before = files(config.parent)
    code, shown = run("train", config, f"rag_system.{side}.model={model}")
    assert code == EXIT_DATA, shown
    assert message in shown
    assert files(config.parent) == before


def test_resume_of_a_folder_that_is_no_run(run: Callable[..., Any], tmp_path: Path) -> None:
    for folder, message in (
        (tmp_path, "is no run directory (config.yaml or manifest.json is missing)."),
        (tmp_path / "nowhere", "does not exist."),
    ):
        code, shown = run("resume", folder)
        assert code == EXIT_USAGE
        assert f"'{folder}' {message}" in shown
    assert files(tmp_path) == set()


@pytest.mark.parametrize("content", ['{"status": "run', "[]", "null", ""])
@pytest.mark.parametrize("command", [["resume"], ["evaluate"], ["query"]], ids=lambda command: command[0])
def test_run_with_a_damaged_manifest(
    write_config: WriteConfig, run: Callable[..., Any], command: list[str], content: str
) -> None:
    home = write_config().parent
    (home / "manifest.json").write_text(content, encoding="utf-8")
    before = files(home)
    code, shown = run(*command, home)
    assert code == EXIT_DATA, shown
    assert f"'{home / 'manifest.json'}'" in shown
    assert files(home) == before


def test_evaluate_and_query_of_a_run_that_is_not_finished(write_config: WriteConfig, run: Callable[..., Any]) -> None:
    home = write_config().parent
    (home / "manifest.json").write_text('{"status": "interrupted"}', encoding="utf-8")
    for command in ("evaluate", "query"):
        code, shown = run(command, home)
        assert code == EXIT_USAGE
        assert f"The run in '{home}' is not finished (status: interrupted)." in shown
        assert f"What to do: Go on with: fedrag resume {home}\n" in shown


def test_query_without_a_generator(write_config: WriteConfig, run: Callable[..., Any]) -> None:
    code, shown = run("query", write_config(), QUESTION, "rag_system.generator=null")
    assert code == EXIT_USAGE
    assert "The config has no rag_system.generator, which answering needs." in shown


@pytest.mark.parametrize("question", ["", "   "])
def test_blank_question(write_config: WriteConfig, run: Callable[..., Any], question: str) -> None:
    code, shown = run("query", write_config(), question)
    assert code in (EXIT_USAGE, EXIT_DATA)
    assert "empty" in shown
