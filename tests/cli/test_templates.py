from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fedrag_cli.cli.main import main
from fedrag_cli.config.json_schema import config_json_schema
from fedrag_cli.config.templates import template_folder, template_names
from fedrag_cli.errors import EXIT_FAILED, EXIT_USAGE

SHIPPED = sorted(template_folder().glob("*.yaml"))
SCHEMA_LINE = re.compile(r"^# yaml-language-server: \$schema=(\S+)$")


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return config_json_schema()


@pytest.fixture(autouse=True)
def environment_of_shipped_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set every environment variable that a shipped config asks for."""
    for path in SHIPPED:
        for name in re.findall(r"\$\{oc\.env:(\w+)", path.read_text(encoding="utf-8")):
            monkeypatch.setenv(name, "value")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def errors(schema: dict[str, Any], value: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


def test_schema_is_a_json_schema_and_printed_as_it_is(
    schema: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    assert main(["schema"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == schema
    assert main(["schema", "--output", str(tmp_path / "s.json")]) == 0
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "s.json").read_text(encoding="utf-8") == printed


def test_shipped_schema_is_the_newest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    shipped = (template_folder() / "fedrag.schema.json").read_text(encoding="utf-8")
    assert shipped == capsys.readouterr().out, "write it anew: fedrag schema --output configs/fedrag.schema.json"


def test_schema_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main(["schema", "-o", str(tmp_path / "file" / "s.json")]) == EXIT_FAILED
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_schema_describes_every_setting(schema: dict[str, Any]) -> None:
    sections = {"top": schema, **schema["$defs"]}
    silent = [
        f"{name}.{setting}"
        for name, section in sections.items()
        for setting, field in section.get("properties", {}).items()
        if "description" not in field
    ]
    assert silent == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_fit_the_schema(schema: dict[str, Any], path: Path) -> None:
    assert errors(schema, read(path)) == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_name_the_schema(path: Path) -> None:
    match = SCHEMA_LINE.match(path.read_text(encoding="utf-8").splitlines()[0])
    assert match is not None
    assert (path.parent / match[1]).resolve() == (template_folder() / "fedrag.schema.json").resolve()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(path)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rum": {}}, "'rum' was unexpected"),
        ({"run": {"sed": 3}}, "$.run: Additional properties are not allowed ('sed' was unexpected)"),
        ({"rag_system": {"top_k": 0}}, "is not valid under any of the given schemas"),
        ({"trainer": {"mode": "retriver"}}, "is not valid under any of the given schemas"),
    ],
)
def test_schema_refuses_what_validate_refuses(schema: dict[str, Any], change: dict[str, Any], message: str) -> None:
    assert errors(schema, {"extends": "base.yaml"}) == []
    [error] = errors(schema, change)
    assert message in error


def test_schema_takes_references_everywhere(schema: dict[str, Any]) -> None:
    config = {
        "run": {"seed": "${oc.env:SEED}", "report_to": "${x}"},
        "dataset": {"train": "${dataset.test}", "corpus": {"path": "${oc.env:DATA}/c.jsonl"}},
        "trainer": {"mode": "${oc.env:MODE}", "retriever": {"learning_rate": "${y}", "dropout": "${z}"}},
    }
    assert errors(schema, config) == []


@pytest.mark.parametrize("name", template_names())
def test_init_writes_a_folder_that_validates_and_never_overwrites(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deep" / "new"
    assert main(["init", str(folder), "--template", name, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert (written["schema_version"], written["template"]) == (1, name)
    files = sorted(str(path) for path in folder.rglob("*") if path.is_file())
    assert sorted(written["files"]) == files
    match = SCHEMA_LINE.match((folder / "fedrag.yaml").read_text(encoding="utf-8").splitlines()[0])
    assert match is not None
    assert (folder / match[1]).is_file()
    monkeypatch.chdir(folder)
    assert main(["validate"]) == 0, capsys.readouterr().err
    config = read(folder / "fedrag.yaml")
    for part in config.get("dataset", {}).values():
        if part["path"].startswith("quickstart/"):
            assert (folder / part["path"]).exists(), part

    (folder / "fedrag.yaml").write_text("mine", encoding="utf-8")
    before = {path: Path(path).read_bytes() for path in files}
    capsys.readouterr()
    assert main(["init", str(folder), "-t", name]) == EXIT_USAGE
    shown = capsys.readouterr().err
    assert shown.startswith(f"Error: There is something in the way: {folder / 'fedrag.yaml'}")
    assert "nothing is overwritten" in shown
    assert {path: Path(path).read_bytes() for path in files} == before


def test_init_with_one_file_in_the_way_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fedrag.schema.json").write_text("mine", encoding="utf-8")
    assert main(["init", str(tmp_path)]) == EXIT_USAGE
    assert f"in the way: {tmp_path / 'fedrag.schema.json'}." in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["fedrag.schema.json"]


@pytest.mark.parametrize(
    ("template", "command"), [("quickstart", "fedrag train"), ("federated", "fedrag simulate --clients 3")]
)
def test_init_says_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, command: str
) -> None:
    assert main(["init", str(tmp_path / "new"), "--template", template]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"wrote {tmp_path / 'new' / 'fedrag.yaml'}"
    assert lines[-1] == f"Next: cd {tmp_path / 'new'} && {command}"


def test_init_with_an_unknown_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path / "new"), "--template", "quikstart"]) == EXIT_USAGE
    assert "There is no template 'quikstart' (did you mean 'quickstart'?)." in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_init_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main(["init", str(tmp_path / "file" / "new")]) == EXIT_USAGE
    assert f"'{tmp_path / 'file' / 'new'}' cannot be written: Not a directory." in capsys.readouterr().err
