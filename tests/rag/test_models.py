"""Model references, devices, number formats and fingerprints of weights."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fedrag_cli.cli.main import main
from fedrag_cli.errors import EXIT_DATA, ModelError
from fedrag_cli.rag.models import (
    FingerprintMemory,
    ModelLocation,
    choose_device,
    choose_dtype,
    locate_model,
    model_errors,
    tensors_fingerprint,
    weights_fingerprint,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def test_a_hub_id_stays_as_it_is() -> None:
    location = locate_model("some-owner/some-model")
    assert (location.name_or_path, location.gguf_file, location.is_local) == ("some-owner/some-model", None, False)


def test_a_directory_is_local(tmp_path: Path) -> None:
    location = locate_model(str(tmp_path))
    assert (location.name_or_path, location.gguf_file, location.is_local) == (str(tmp_path), None, True)


def test_a_gguf_file_is_its_folder_and_its_name(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    location = locate_model(str(tmp_path / "model.gguf"))
    assert (location.name_or_path, location.gguf_file, location.is_local) == (str(tmp_path), "model.gguf", True)


def test_a_file_inside_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "weights_for_a_test"
    (package / "small").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate_model("package://weights_for_a_test/small").name_or_path == str(package / "small")
    assert locate_model("package://weights_for_a_test/model.gguf").gguf_file == "model.gguf"
    assert locate_model("package://weights_for_a_test").name_or_path == str(package)
    assert "weights_for_a_test" not in sys.modules
    with pytest.raises(ModelError, match="has no 'large' inside") as caught:
        locate_model("package://weights_for_a_test/large")
    assert "small" in caught.value.hint


@pytest.mark.parametrize(
    "reference", ["package://no_such_package_here/x", "package://", "package:///x", "package://json.tool/x"]
)
def test_a_missing_package_is_named_with_a_hint(reference: str) -> None:
    with pytest.raises(ModelError, match="is not installed") as caught:
        locate_model(reference)
    assert caught.value.hint


@pytest.mark.parametrize("reference", ["/no/such/folder", "./no-such-folder", "../no-such-folder", "no-such-file.gguf"])
def test_a_missing_path_is_an_error_not_a_hub_id(reference: str) -> None:
    with pytest.raises(ModelError, match="no model at"):
        locate_model(reference)


def test_a_file_that_is_no_model_and_a_foreign_scheme_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelError, match="neither a model directory nor a GGUF file"):
        locate_model(str(tmp_path / "weights.bin"))
    with pytest.raises(ModelError, match="no model reference"):
        locate_model("https://example.org/model")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without cuda")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_an_absent_device_is_a_model_error(device: str) -> None:
    with pytest.raises(ModelError, match=f"no device '{device}'") as caught:
        choose_device(device)
    assert "run.device" in caught.value.hint


def test_an_unknown_device_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="no device 'banana'"):
        choose_device("banana")


def test_cpu_is_always_there_and_auto_is_something() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in {"cpu", "cuda", "mps"}


@pytest.mark.parametrize("small", [True, False])
def test_auto_keeps_float32_on_the_cpu(small: bool) -> None:
    assert choose_dtype("auto", torch.device("cpu"), small=small, setting="dtype") == torch.float32
    assert choose_dtype("bfloat16", torch.device("cpu"), small=small, setting="dtype") == torch.bfloat16


def test_errors_of_the_libraries_become_one_line_with_a_hint(tmp_path: Path) -> None:
    local, remote = ModelLocation("here", str(tmp_path)), ModelLocation("owner/name", "owner/name")
    with (
        pytest.raises(ModelError, match="The generator 'here' cannot be loaded: first") as caught,
        model_errors(local, "generator"),
    ):
        raise OSError("\nfirst\nsecond")
    assert "second" not in caught.value.message
    assert "config.json" in caught.value.hint
    with pytest.raises(ModelError) as caught, model_errors(remote, "retriever"):
        raise ValueError
    assert "network" in caught.value.hint
    assert "ValueError" in caught.value.message


@pytest.mark.parametrize("error", [ZeroDivisionError, AssertionError, IndexError, RecursionError])
def test_whatever_a_damaged_model_raises_is_a_model_error(tmp_path: Path, error: type[Exception]) -> None:
    location = ModelLocation("here", str(tmp_path))
    with pytest.raises(ModelError, match="The generator 'here' cannot be loaded"), model_errors(location, "generator"):
        raise error("odd")
    with pytest.raises(MemoryError), model_errors(location, "generator"):
        raise MemoryError


def test_the_fingerprint_sees_values_names_shapes_types_and_buffers() -> None:
    tensor = torch.arange(6, dtype=torch.float32)
    base = tensors_fingerprint({"a": tensor})
    assert base == tensors_fingerprint({"a": tensor.clone()})
    assert len(base) == 16
    others = [{"b": tensor}, {"a": tensor.reshape(2, 3)}, {"a": tensor.half()}, {"a": tensor + 1e-6}, {}]
    assert len({base, *(tensors_fingerprint(other) for other in others)}) == 6
    assert tensors_fingerprint({"x": tensor, "a": tensor}) == tensors_fingerprint({"a": tensor, "x": tensor})
    assert tensors_fingerprint({"a": tensor.reshape(2, 3).T}) == tensors_fingerprint(
        {"a": tensor.reshape(2, 3).T.contiguous()}
    )
    model = network()
    before = weights_fingerprint(model)
    model[1].running_mean.add_(1.0)
    assert weights_fingerprint(model) != before


def test_the_fingerprint_takes_scalars_empty_tensors_and_bfloat16() -> None:
    values = {"scalar": torch.tensor(3), "empty": torch.zeros(0), "half": torch.ones(2, dtype=torch.bfloat16)}
    assert tensors_fingerprint(values) == tensors_fingerprint(values)


def test_a_remembered_fingerprint_follows_every_way_of_changing_weights() -> None:
    model, memory = network(), FingerprintMemory()
    seen = [memory.fingerprint(model)]
    assert memory.fingerprint(model) == seen[0] == weights_fingerprint(model)

    def changed() -> bool:
        seen.append(memory.fingerprint(model))
        return seen[-1] not in seen[:-1] and seen[-1] == weights_fingerprint(model)

    with torch.no_grad():
        model[0].weight.add_(0.5)
    assert changed(), "in place"
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    assert changed(), "an optimizer's step"
    torch.manual_seed(9)
    model.load_state_dict({name: torch.rand_like(value.float()) for name, value in model.state_dict().items()})
    assert changed(), "load_state_dict"
    model[2].weight = nn.Parameter(torch.full((2, 3), 0.25))
    assert changed(), "another parameter"
    model[0].weight.data = torch.full((3, 4), 0.75)
    assert changed(), "another tensor behind the parameter"
    model[0].weight.data.mul_(2.0)
    assert changed(), "a write through .data, which torch does not count"
    model[2].bias.detach().numpy()[1] += 1.0
    assert changed(), "a write through numpy"
    model.to(torch.float64)
    assert changed(), "another number format"
    model[1].running_mean.add_(1.0)
    assert changed(), "a buffer"


def test_a_remembered_fingerprint_is_not_mistaken_for_that_of_another_model() -> None:
    memory = FingerprintMemory()
    first, second = network(), network()
    with torch.no_grad():
        second[0].weight.add_(1.0)
    assert memory.fingerprint(first) != memory.fingerprint(second)
    assert memory.fingerprint(first) == weights_fingerprint(first)


class _Command:
    """Pickled, it runs a shell command where a file is read as a plain pickle."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"echo > {self.marker}",)


def _edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def _with_own_model(folder: Path, base: str, of: str) -> None:
    own = {"AutoConfig": "own_code.OwnConfig", of: "own_code.OwnModel"}
    _edited(folder / "config.json", model_type="own", auto_map=own)
    classes = f"class OwnConfig({base}Config):\n    model_type = 'own'\n"
    head = {"AutoModelForCausalLM": "ForCausalLM", "AutoModel": "Model"}[of]
    classes += f"class OwnModel({base}{head}):\n    config_class = OwnConfig\n"
    _add_code(folder, f"from transformers import {base}Config, {base}{head}\n{classes}")


def _with_own_tokenizer(folder: Path) -> None:
    _edited(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own_code.Own"]})
    _add_code(
        folder, "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )


def _with_own_module(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    modules[1]["type"] = "own_code.Own"
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    _add_code(
        folder,
        "from sentence_transformers.sentence_transformer.modules import Pooling\nclass Own(Pooling):\n    pass\n",
    )


def _without_modules(folder: Path) -> None:
    _with_own_model(folder, "Bert", "AutoModel")
    (folder / "modules.json").unlink()


def _on_a_base_with_code(folder: Path) -> None:
    """Turn a generator into an adapter whose base, beside it, brings code."""
    base = folder.with_name("base")
    shutil.copytree(folder, base)
    _with_own_model(base, "Llama", "AutoModelForCausalLM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    _edited(folder / "adapter_config.json", base_model_name_or_path=str(base))


def _add_code(folder: Path, code: str) -> None:
    marker = folder.parent / "code-was-run"
    (folder / "own_code.py").write_text(f"open({str(marker)!r}, 'w').close()\n{code}", encoding="utf-8")


OWN_CODE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "model": ("generator", lambda folder: _with_own_model(folder, "Llama", "AutoModelForCausalLM")),
    "tokenizer": ("generator", _with_own_tokenizer),
    "adapter": ("generator", _on_a_base_with_code),
    "encoder": ("retriever", lambda folder: _with_own_model(folder, "Bert", "AutoModel")),
    "module": ("retriever", _with_own_module),
    "plain encoder": ("retriever", _without_modules),
}


@pytest.mark.parametrize(("side", "change"), OWN_CODE.values(), ids=OWN_CODE)
def test_code_of_a_model_is_run_only_where_the_config_says_so(
    write_config: Callable[..., Path],
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    side: str,
    change: Callable[[Path], None],
) -> None:
    folder, marker = tmp_path / "model", tmp_path / "code-was-run"
    shutil.copytree(models[side], folder)
    change(folder)
    config = write_config()
    agreement = io.StringIO("y\n" * 9)
    monkeypatch.setattr(sys, "stdin", agreement)
    arguments = ["query", str(config), "where is the cat ?", f"rag_system.{side}.model={folder}"]
    assert main(arguments) == EXIT_DATA
    shown = capsys.readouterr()
    assert f"The {side} '{folder}' comes with Python code of its own, which is not run." in shown.err
    assert f"set rag_system.{side}.trust_remote_code: true." in shown.err
    assert shown.out == ""
    assert agreement.tell() == 0, "nobody is asked"
    assert not marker.exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main([*arguments, f"rag_system.{side}.trust_remote_code=true"]) == 0
    assert marker.exists()
    assert agreement.tell() == 0


@pytest.mark.parametrize("side", ["generator", "retriever", "adapter"])
def test_code_in_pickled_weights_is_not_run(
    write_config: Callable[..., Path],
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    side: str,
) -> None:
    folder, marker = tmp_path / "model", tmp_path / "code-was-run"
    if side == "adapter":
        LoraConfig(target_modules=["q_proj"]).save_pretrained(folder)
    else:
        shutil.copytree(models[side], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = folder / ("adapter_model.bin" if side == "adapter" else "pytorch_model.bin")
    torch.save({"weight": _Command(marker)}, weights)
    setting = "generator.adapter" if side == "adapter" else f"{side}.model"
    assert main(["query", str(write_config()), "where is the cat ?", f"rag_system.{setting}={folder}"]) == EXIT_DATA
    message = f"The {side} '{folder}' cannot be loaded: its weights are a Python pickle with more than tensors in it"
    assert message in capsys.readouterr().err
    assert not marker.exists()


def test_an_exported_flower_app_agrees_to_no_code(write_config: Callable[..., Path], tmp_path: Path) -> None:
    trusting = ["rag_system.retriever.trust_remote_code=true", "rag_system.generator.trust_remote_code=true"]
    assert main(["export-flower-app", str(tmp_path / "app"), str(write_config()), *trusting]) == 0
    (exported,) = (tmp_path / "app").rglob("config.yaml")
    assert "trust_remote_code" not in exported.read_text(encoding="utf-8")
