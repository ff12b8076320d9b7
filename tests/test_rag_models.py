"""Model references, devices, number formats and fingerprints of weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fedrag_cli.errors import ModelError
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
