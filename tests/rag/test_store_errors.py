"""What a command says of the store that its config names, and when."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import data_rows, write_rows

from fedrag_cli.cli.main import main
from fedrag_cli.config import load_config
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.knowledge_stores.store_files import reason_of
from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever

WriteConfig = Callable[..., Path]
QUESTION = "what is the colour of the cat ?"
MISSING = "There is no knowledge store at"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that takes the name of each model that is loaded."""
    names: list[str] = []
    for name, owner in (("retriever", SentenceTransformerRetriever), ("generator", CausalLMGenerator)):

        def loading(*arguments: Any, _name: str = name, _load: Any = owner.from_config, **settings: Any) -> Any:
            names.append(_name)
            return _load(*arguments, **settings)

        monkeypatch.setattr(owner, "from_config", loading)
    return names


@pytest.mark.parametrize("command", [["query", QUESTION], ["evaluate"]])
def test_what_is_encoded_for_one_command_alone_is_told_with_the_command_that_keeps_it(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    config, place = write_config(), f"rag_system.knowledge_store.path={tmp_path / 'store'}"
    name, *rest = command
    assert main([name, str(config), *rest, place]) == 0
    shown = capsys.readouterr()
    assert f"{MISSING} {tmp_path / 'store'} yet" in shown.err.replace("\n", " ")
    assert "'fedrag index CONFIG' keeps them there" in shown.err.replace("\n", " ")
    assert MISSING not in shown.out
    assert main([name, str(config), *rest, place, "--quiet"]) == 0
    assert main([name, str(config), *rest]) == 0
    assert main(["index", str(config), place]) == 0
    assert main([name, str(config), *rest, place]) == 0
    assert MISSING not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "message", "expected"),
    [
        ("damaged", "is damaged", []),
        ("dtype", "was saved as float32, but the config says float16", []),
        ("corpus", "was built from other passages", []),
        ("encoder", "was filled by another encoder", ["retriever"]),
        ("none", "", ["retriever", "generator"]),
    ],
)
def test_what_is_wrong_with_a_store_is_told_before_models_are_loaded_for_nothing(
    write_config: WriteConfig, tmp_path: Path, loaded: list[str], fault: str, message: str, expected: list[str]
) -> None:
    path, overrides = write_config(), [f"rag_system.knowledge_store.path={tmp_path / 'store'}"]
    assert main(["index", str(path), *overrides, "-q"]) == 0
    if fault == "damaged":
        (tmp_path / "store" / "nodes.jsonl").write_text("{}\n")
    elif fault == "dtype":
        overrides.append("rag_system.knowledge_store.dtype=float16")
    elif fault == "corpus":
        write_rows(tmp_path / "corpus.jsonl", data_rows()["corpus"][1:])
    elif fault == "encoder":
        overrides.append("rag_system.retriever.passage_prompt=p")
    loaded.clear()
    if fault == "none":
        build_rag_system(load_config(path, overrides))
    else:
        with pytest.raises(KnowledgeStoreError, match=message):
            build_rag_system(load_config(path, overrides))
    assert loaded == expected


def test_a_filter_that_hides_all_passages_of_a_built_store_encodes_nothing(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, place = str(write_config()), f"type: qdrant, path: {tmp_path / 'store'}"
    assert main(["index", config, f"rag_system.knowledge_store={{{place}}}", "-q"]) == 0
    assert main(["query", config, QUESTION, f"rag_system.knowledge_store={{{place}, filter: {{title: none}}}}"]) == 3
    shown = capsys.readouterr().err
    assert "no passages that pass the filter" in shown
    assert MISSING not in shown
    assert "Encoding" not in shown


def test_another_type_says_which_settings_went_with_the_old_one(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(rag_system={"knowledge_store": {"type": "memory", "path": "store", "memory_map": True}}))
    key = "rag_system.knowledge_store"

    def told(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["index", config, *arguments, "--json"]) == 2
        return str(json.loads(capsys.readouterr().out)["error"]["message"])

    assert told(f"{key}.type=faiss").endswith("change of type to 'faiss' dropped the former path, memory_map.")
    message = told(f"{key}={{type: faiss, memory_map: true}}")
    assert "needs a path" in message
    assert message.endswith("(the change of type dropped the former path)")
    assert "dropped" not in told("rag_system.retriever.model=null", f"{key}.type=faiss")
    assert "dropped" not in told(f"{key}={{type: faiss, index: maybe}}")
    assert main(["index", config, f"{key}.type=faiss", f"{key}.path={tmp_path / 'other'}", "-q"]) == 0
    base = tmp_path / "other.yaml"
    base.write_text("extends: config.yaml\nrag_system: {knowledge_store: {type: faiss}}\n")
    config = str(base)
    assert "dropped the former path, memory_map" in told()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FileNotFoundError(2, "No such file or directory", "/a/store/nodes.jsonl"), "'nodes.jsonl' is missing."),
        (FileNotFoundError("No such file or directory: /a/e.safetensors"), "'e.safetensors' is missing."),
        (PermissionError(13, "Permission denied", "/a/b"), "'b' cannot be read (Permission denied)."),
        (ValueError("it ends early"), "it ends early."),
        (KeyError("format"), "it has no 'format'."),
        (json.JSONDecodeError("no value", "", 0), "it is not as it was written (no value: line 1 column 1 (char 0))."),
    ],
)
def test_reasons_are_told_in_sentences(error: Exception, told: str) -> None:
    assert reason_of(error) == told


@pytest.mark.parametrize("store", ["type: memory", "type: memory, memory_map: true", "type: faiss", "type: qdrant"])
def test_an_evaluation_on_a_damaged_store_leaves_no_run_directory(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], store: str
) -> None:
    arguments = [str(write_config()), f"rag_system.knowledge_store={{{store}, path: {tmp_path / 'store'}}}"]
    assert main(["index", *arguments, "-q"]) == 0
    name = "storage.sqlite" if "qdrant" in store else "nodes.jsonl"
    (file,) = (tmp_path / "store").rglob(name)
    content = file.read_bytes()
    file.write_bytes(b"".join(b"\xff" + line[1:] for line in content.splitlines(keepends=True)))
    capsys.readouterr()
    assert main(["evaluate", *arguments, "--json"]) == 3
    assert "damaged" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not (tmp_path / "runs").exists()
