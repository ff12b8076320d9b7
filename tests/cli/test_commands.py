from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from fedrag_cli.cli.main import application, main
from fedrag_cli.errors import EXIT_DATA, EXIT_DONE, EXIT_FAILED, EXIT_USAGE

CONFIG = """\
rag_system: {retriever: {model: org/r}, generator: {model: org/g}}
dataset: {corpus: {path: c.jsonl}, train: {path: t.jsonl}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    for name in ("c.jsonl", "t.jsonl"):
        (tmp_path / name).touch()
    return path


def every_command(command: Any) -> Iterator[list[str]]:
    """Yield the words of a command and of all below it."""
    yield []
    for name, below in getattr(command, "commands", {}).items():
        yield from ([name, *words] for words in every_command(below))


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return the one JSON document on stdout."""
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert next(iter(value)) == "schema_version"
    assert value["schema_version"] == 1
    return value


def test_exit_codes_have_their_documented_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert (EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_DATA) == (0, 1, 2, 3)
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "0 done, 1 failed, 2 usage or config, 3 data or model missing or bad" in text


def test_without_arguments_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == EXIT_USAGE
    shown = capsys.readouterr()
    for command in ("init", "validate", "train", "query", "doctor"):
        assert f"\n  {command} " in shown.out + shown.err


def test_the_help_of_every_command_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    for path in every_command(typer.main.get_command(application())):
        assert main([*path, "--help"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(" ".join(["Usage: fedrag", *path]))
        assert "\\" not in shown, path
    assert main(["serve-fl", "--help"]) == 0
    assert "[default: 127.0.0.1:8080]" in " ".join(capsys.readouterr().out.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib import metadata

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == metadata.version("fedrag-cli") + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?\n"),
        (["validate", "--laod"], "No such option '--laod'. Did you mean '--load'?"),
        (["resume"], "Missing argument 'RUN_DIR'"),
        (["init"], "Missing argument 'DIR'"),
        (["evaluate", "--predictions"], "Option '--predictions' requires an argument"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == EXIT_USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err


@pytest.mark.parametrize("arguments", [["validate"], ["resume"], ["query", "c.yaml"], ["schema", "-o"], []])
@pytest.mark.parametrize(("text", "message"), [("a\0b", "has a NUL character"), ("run.name=\ud800", "is no text (")])
def test_arguments_that_no_path_or_text_can_be(
    capsys: pytest.CaptureFixture[str], arguments: list[str], text: str, message: str
) -> None:
    assert main([*arguments, text]) == EXIT_USAGE
    assert f"Error: Argument {len(arguments) + 1} {message}" in capsys.readouterr().err


def test_a_run_in_a_closed_folder_is_data_that_is_missing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = tmp_path / "run"
    closed.mkdir()

    def refused(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refused)
    for arguments in (["compare", str(closed)], ["resume", str(closed)], ["query", str(closed), "where ?"]):
        assert main(arguments) == EXIT_DATA
        assert f"Error: The run in '{closed}' cannot be read: Permission denied." in capsys.readouterr().err


def test_predictions_that_cannot_be_written_fail_before_anything_is_computed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "p.jsonl"):
        assert (
            main(["evaluate", str(config), f"dataset.test.path={tmp_path}/t.jsonl", "--predictions", str(place)])
            == EXIT_FAILED
        )
        shown = capsys.readouterr().err
        assert f"Cannot write {place}" in shown
        assert "Run directory" not in shown


def test_one_argument_too_many(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(config), "run.seed", "3"]) == EXIT_USAGE
    assert capsys.readouterr().err == (
        "Error: There is one argument too many: 'run.seed'.\n"
        "What to do: Write settings as key.path=value, without spaces.\n"
    )


def test_validate_says_so_on_stderr(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(config)]) == 0
    assert capsys.readouterr() == ("", f"{config} is valid (mode: retriever).\n")


def test_validate_as_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(config), "trainer.mode=generator", "--json"]) == 0
    assert document(capsys) == {
        "schema_version": 1, "valid": True, "config": str(config), "mode": "generator", "warnings": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "path", "message"),
    [
        ("dataset.corpus.path=nosuch.jsonl", "dataset.corpus.path", "nosuch.jsonl' does not exist"),
        ("dataset.train.path=.", "dataset.train.path", "' is a folder, but a file is expected"),
        ("dataset.test={type: beir, path: c.jsonl}", "dataset.test.path", "' is a file, but a folder is expected"),
        ("dataset.test={type: boolq, path: nosuch}", "dataset.test.path", "nosuch' does not exist"),
        ("dataset.train=null", "dataset.train", "is not set; all commands but those that train can do without"),
        (
            "rag_system.generator.model=package://fedrag_no_such/x",
            "rag_system.generator.model",
            "The package 'fedrag_no_such' of the model 'package://fedrag_no_such/x' is not installed",
        ),
        ("rag_system.retriever.model=./nosuch", "rag_system.retriever.model", "nosuch'"),
        ("rag_system.generator.adapter=nosuch", "rag_system.generator.adapter", "there is no folder '"),
        ("rag_system.retriever.model=nosuch.gguf", "rag_system.retriever.model", "There is no model at '"),
    ],
)
def test_what_is_not_there_is_a_warning(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    path: str,
    message: str,
) -> None:
    monkeypatch.chdir(config.parent)
    assert main(["validate", "c.yaml", override, "--json"]) == 0
    (warning,) = document(capsys)["warnings"]
    assert (warning["path"], message in warning["message"]) == (path, True), warning
    assert main(["validate", "c.yaml", override]) == 0
    valid, told = capsys.readouterr().err.splitlines()
    assert valid == "c.yaml is valid (mode: retriever)."
    assert told.startswith(f"Warning: command line ({override}): ")
    assert told.endswith(f"{path}: {warning['message']}")


def test_errors_as_json_come_with_the_text_for_people(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(CONFIG + "run:\n  sed: 3\n", encoding="utf-8")
    assert main(["validate", str(config), "run.device=tpu", "--json"]) == EXIT_USAGE
    shown = capsys.readouterr()
    value = json.loads(shown.out)
    assert value["schema_version"] == 1
    error = value["error"]
    assert (error["type"], error["exit_code"]) == ("InvalidConfigError", 2)
    assert error["problems"] == [
        {"file": str(config), "line": 4, "path": "run.sed", "message": "is no setting here (did you mean 'seed'?)"}
    ]
    assert shown.err.startswith("Error: The config has 1 problem:\n")
    assert f"  {config}:4: run.sed: is no setting here (did you mean 'seed'?)\n" in shown.err
    assert "What to do: " + error["hint"] in shown.err


def test_error_without_problems_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(tmp_path / "none.yaml"), "--json"]) == EXIT_USAGE
    error = document(capsys)["error"]
    assert set(error) == {"type", "message", "hint", "exit_code"}
    assert error["message"] == f"There is no config file '{tmp_path / 'none.yaml'}'."


def test_quiet_prints_errors_only(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(config), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["validate", str(config), "run.seed=x", "-q"]) == EXIT_USAGE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("Error: ")


def test_traceback_with_verbose_only(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(config), "run.seed=x"]) == EXIT_USAGE
    assert "Traceback" not in capsys.readouterr().err
    assert main(["validate", str(config), "run.seed=x", "--verbose"]) == EXIT_USAGE
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last):" in shown
    assert "\nError: The config has 1 problem:" in shown


def test_unexpected_errors_are_one_line_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    from fedrag_cli.cli.session import session

    def fail(verbose: bool) -> int:
        import typer

        with pytest.raises(typer.Exit) as left, session(json_output=True, quiet=False, verbose=verbose):
            raise ZeroDivisionError("a bug")
        return left.value.exit_code

    assert fail(verbose=False) == EXIT_FAILED
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"]["message"] == "ZeroDivisionError: a bug"
    assert shown.err.startswith("Error: ZeroDivisionError: a bug\nWhat to do: This should not happen.")
    assert "Traceback" not in shown.err
    assert fail(verbose=True) == EXIT_FAILED
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["NO_COLOR", None])
def test_colours_only_where_they_are_wanted(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    # Rich takes FORCE_COLOR for a terminal; NO_COLOR wins over it.
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    if variable is not None:
        monkeypatch.setenv(variable, "1")
    assert main(["validate", str(config), "run.seed=x"]) == EXIT_USAGE
    assert ("\x1b[1;31m" in capsys.readouterr().err) is (variable is None)


def test_no_colours_outside_of_a_terminal(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(config), "run.seed=x"]) == EXIT_USAGE
    assert "\x1b" not in capsys.readouterr().err


def test_long_lines_are_not_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / ("x" * 200) / "c.yaml"
    assert main(["validate", str(path)]) == EXIT_USAGE
    assert f"There is no config file '{path}'.\n" in capsys.readouterr().err


def test_brackets_and_colons_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(tmp_path / "[red]:smile:.yaml")]) == EXIT_USAGE
    assert "[red]:smile:.yaml" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "[b]:cat:")]) == 0
    assert "[b]:cat:/fedrag.yaml" in capsys.readouterr().err


def test_fedrag_yaml_in_the_current_folder_is_the_default(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config.parent)
    assert main(["validate"]) == EXIT_USAGE
    assert "There is no config file 'fedrag.yaml'" in capsys.readouterr().err
    config.rename(config.parent / "fedrag.yaml")
    assert main(["validate", "trainer.mode=alternating"]) == 0
    assert capsys.readouterr().err == "fedrag.yaml is valid (mode: alternating).\n"


def test_components(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["components"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kind", "type", "what", "it", "is", "from"]
    assert "retriever_trainer  lsr" in next(line for line in lines if " lsr " in line)
    assert main(["components", "--json"]) == 0
    listed = document(capsys)["components"]
    assert len(listed) == len(lines) - 1
    assert all(item["settings"] for item in listed)


def test_settings_of_a_component(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["components", "lsr"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("retriever_trainer lsr: LM-supervised retrieval (REPLUG, RA-DIT)\n")
    assert "Temperature of the retriever's distribution over the passages." in shown
    assert main(["components", "lsr", "--json"]) == 0
    [component] = document(capsys)["components"]
    settings = {row["name"]: row for row in component["settings"]}
    assert settings["top_k"] == {
        "name": "top_k",
        "required": False,
        "default": 8,
        "help": "Passages retrieved for each training query.",
    }
    # An inherited setting keeps its help.
    assert settings["batch_size"]["help"] == "Examples of a batch; several processes share it."


def test_settings_of_a_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["components", "corpus", "--json"]) == 0
    kinds = {(item["kind"], item["type"]) for item in document(capsys)["components"]}
    assert {("corpus", "file"), ("corpus", "text")} <= kinds
    assert {kind for kind, _ in kinds} == {"corpus"}


def test_unknown_component(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["components", "lrs"]) == EXIT_USAGE
    assert "There is no component or kind 'lrs' (did you mean 'lsr'?)." in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = document(capsys)
    assert report["healthy"] is True
    packages = {package["name"]: package for package in report["packages"]}
    assert {"torch", "transformers", "sentence-transformers", "flwr", "typer", "rich"} <= set(packages)
    assert [name for name, package in packages.items() if package["problem"]] == []
    assert report["devices"][0]["name"] == "cpu"
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("All is well.\n")


def test_validate_load_reports_sizes(write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config()
    assert main(["validate", str(config), "--load", "--json"]) == 0
    loaded = document(capsys)["loaded"]
    assert "24" in json.dumps(loaded)
    assert "14" in json.dumps(loaded)
    assert main(["validate", str(config), "--load"]) == 0
    assert f"{config} is valid (mode: retriever).\n" in capsys.readouterr().err
    assert not (config.parent / "runs").exists()


def test_streams_that_are_closed(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["validate", str(config), "--json"]) == 0
    assert main(["validate", str(config), "run.seed=x"]) == EXIT_USAGE
    assert main(["components"]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["validate", "--json"], ["schema"]])
def test_an_output_that_is_full_is_told_in_words(config: Path, arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "fedrag_cli", *arguments], stdout=full, stderr=subprocess.PIPE, cwd=config.parent
        )
    assert ended.returncode in (EXIT_FAILED, EXIT_USAGE)
    assert ended.stderr.startswith(b"Error: ")
    assert b"Traceback" not in ended.stderr
