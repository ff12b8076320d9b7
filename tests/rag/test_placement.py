"""Where the generator's weights go, and in how many bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fedrag_cli.commands.run_data import load_run_data
from fedrag_cli.commands.train import train
from fedrag_cli.config import PromptConfig, load_config, load_config_with_source
from fedrag_cli.errors import ConfigError, ModelError
from fedrag_cli.evaluation.evaluator import evaluate
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.config import CausalLMConfig
from fedrag_cli.rag.from_run import load_config_or_run
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.models import (
    ModelLocation,
    choose_dtype,
    placement_note,
    placement_options,
    quantization_config,
    require_bfloat16,
    settled,
)
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.reporter import SilentReporter
from fedrag_cli.trainers.config import RALTConfig, ValidationConfig
from fedrag_cli.trainers.huggingface import HuggingFaceTrainerForRALT
from fedrag_cli.trainers.huggingface.base import training_arguments

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PROMPTS = ["the colour of the cat is", "the owl lives in the", "what is the colour of the dog ?"]
TARGETS = [" red", " green house", " blue"]
quantised = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is missing")
bits = pytest.mark.parametrize("quantization", ["8bit", "4bit"])


def load(model: Path, **settings: Any) -> CausalLMGenerator:
    config = CausalLMConfig(model=str(model), **settings)
    return CausalLMGenerator.from_config(config, prompt=PromptConfig(), device="cpu")


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let quantised layers compute in float32, so that their error is that of the weights alone."""
    monkeypatch.setattr("fedrag_cli.rag.models.has_fast_bfloat16", lambda device: False)


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
def test_a_device_map_on_a_machine_without_gpu_leaves_the_model_whole(
    models: dict[str, Path], device_map: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plain, mapped = load(models["generator"]), load(models["generator"], device_map=device_map)
    assert mapped.device == CPU
    assert mapped.notes == (f"device_map: {device_map} has put the generator on cpu, because the process sees no GPU.",)
    assert plain.notes == ()
    assert mapped.fingerprint() == plain.fingerprint()
    assert torch.equal(mapped.target_log_probs(PROMPTS, TARGETS), plain.target_log_probs(PROMPTS, TARGETS))


def test_where_a_device_map_has_put_the_model_is_told(
    write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(2, 2)
    model.hf_device_map = {"embed": 0, "layers.0": 0, "layers.1": 1}  # type: ignore[assignment]
    config = CausalLMConfig(model="m", device_map="balanced")
    assert placement_note(config, model) == "device_map: balanced has put the generator on cuda:0 and cuda:1."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    notes: list[str] = []
    reporter = SilentReporter()
    monkeypatch.setattr(reporter, "note", notes.append)
    build_rag_system(load_config(write_config(), ["rag_system.generator.device_map=auto"]), reporter=reporter)
    assert [note for note in notes if note.startswith("device_map: auto has put the generator on cpu")]


def test_a_model_that_does_not_fit_on_the_gpus_is_refused() -> None:
    model, location = nn.Linear(2, 2), ModelLocation("org/large", "org/large")
    assert settled(model, location) is model
    model.hf_device_map = {"embed": 0, "layers.0": 1}  # type: ignore[assignment]
    assert settled(model, location) is model
    for place in ("cpu", "disk", torch.device("cpu")):
        model.hf_device_map = {"embed": 0, "layers.0": place}  # type: ignore[assignment]
        with pytest.raises(ModelError, match="'org/large' does not fit on the GPUs") as caught:
            settled(model, location)
        assert "quantization: 4bit" in caught.value.hint


def test_the_settings_of_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantization_config("8bit", CPU).load_in_8bit
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("fedrag_cli.rag.models.has_fast_bfloat16", lambda device, fast=fast: fast)
        settings = quantization_config("4bit", CPU)
        assert settings.load_in_4bit
        assert settings.bnb_4bit_quant_type == "nf4"
        assert settings.bnb_4bit_use_double_quant
        assert settings.bnb_4bit_compute_dtype == dtype


def test_what_quantization_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CausalLMConfig(model="org/m", quantization="4bit")
    with pytest.raises(ConfigError, match=r"GGUF file 'm\.gguf' cannot be loaded with"):
        placement_options(config, ModelLocation("m.gguf", ".", "m.gguf"), CPU)
    monkeypatch.setattr(
        "fedrag_cli.rag.models.importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    )
    with pytest.raises(ConfigError, match="needs the package bitsandbytes, which is not installed") as caught:
        placement_options(config, ModelLocation("org/m", "org/m"), CPU)
    assert caught.value.hint == "Install it with: pip install 'fedrag-cli[quantization]'"
    assert placement_options(CausalLMConfig(model="m"), ModelLocation("org/m", "org/m"), CPU) == {}


def test_bfloat16_needs_a_device_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # As a GPU before Ampere answers, where torch would compute bfloat16 by way of float32.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose_dtype("auto", GPU, small=False, setting="dtype") == torch.float32
    with pytest.raises(ModelError, match=r"rag\.dtype is bfloat16, which the device 'cuda' does not have"):
        choose_dtype("bfloat16", GPU, small=False, setting="rag.dtype")
    with pytest.raises(ModelError, match="precision of training is bfloat16, which the device 'cuda' does not have"):
        training_arguments(RALTConfig(precision="bfloat16"), directory=Path(), seed=0, device=GPU)
    require_bfloat16(CPU, "dtype")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    require_bfloat16(GPU, "dtype")
    assert choose_dtype("auto", GPU, small=False, setting="dtype") == torch.bfloat16


@quantised
@bits
def test_quantised_weights_are_small_and_nearly_the_same(
    models: dict[str, Path], quantization: str, exact_products: None
) -> None:
    plain, small = load(models["generator"]), load(models["generator"], quantization=quantization)
    inner = small.model.model.layers[0].mlp.up_proj
    assert inner.weight.element_size() == 1
    assert inner.weight.numel() == 32 * 64 // (2 if quantization == "4bit" else 1)
    fingerprint = small.fingerprint()
    before, after = plain.target_log_probs(PROMPTS, TARGETS), small.target_log_probs(PROMPTS, TARGETS)
    assert 0 < (before - after).abs().max() < (0.1 if quantization == "8bit" else 1.5)
    # An evaluation changes neither the weights nor what the next one says.
    assert small.fingerprint() == fingerprint == load(models["generator"], quantization=quantization).fingerprint()
    assert torch.equal(small.target_log_probs(PROMPTS, TARGETS), after)
    assert len(small.batch_generate(PROMPTS)) == 3


def train_adapter(config: Path, quantization: str, **settings: Any) -> tuple[HuggingFaceTrainerForRALT, dict[str, Any]]:
    rag_system = build_rag_system(load_config(config, [f"rag_system.generator.quantization={quantization}"]))
    options = {"top_k": 2, "batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "optimizer": "sgd"}
    never = ValidationConfig(every="never")
    trainer = HuggingFaceTrainerForRALT(rag_system, config=RALTConfig(**options, validation=never, **settings))
    trainer.train()
    return trainer, trainer.trained_weights()


@quantised
@bits
def test_an_adapter_of_a_quantised_model_trains_saves_and_loads(
    write_config: Callable[..., Path], tmp_path: Path, models: dict[str, Path], quantization: str, exact_products: None
) -> None:
    trainer, weights = train_adapter(write_config(), quantization)
    assert all("lora" in name and tensor.dtype == torch.float32 for name, tensor in weights.items())
    assert any(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name)
    generator = trainer.rag_system.require_generator()
    generator.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    again = load(models["generator"], quantization=quantization, adapter=str(tmp_path / "saved"))
    scores = generator.target_log_probs(PROMPTS, TARGETS)
    assert torch.equal(again.target_log_probs(PROMPTS, TARGETS), scores)
    assert again.fingerprint() == generator.fingerprint()
    untuned = load(models["generator"], quantization=quantization).target_log_probs(PROMPTS, TARGETS)
    assert (untuned - scores).abs().max() > 1e-4


@quantised
def test_gradient_checkpointing_of_a_quantised_model_gives_the_same_adapter(
    write_config: Callable[..., Path], exact_products: None
) -> None:
    _, plain = train_adapter(write_config("plain"), "4bit")
    _, checkpointed = train_adapter(write_config("checkpointed"), "4bit", gradient_checkpointing=True)
    assert all(torch.allclose(tensor, checkpointed[name], atol=1e-7) for name, tensor in plain.items())


@quantised
@bits
def test_a_run_with_a_quantised_generator_is_evaluated_as_it_ended(
    write_config: Callable[..., Path], quantization: str
) -> None:
    path = write_config(trainer={"mode": "generator"})
    overrides = [f"rag_system.generator.quantization={quantization}", "evaluation.metrics=[negative_log_likelihood,f1]"]
    summary = train(load_config_with_source(path, overrides), SilentReporter())
    run = RunDirectory.open(Path(summary["run_dir"]))
    assert (run.generator / "adapter_config.json").is_file()
    config, _ = load_config_or_run(run.path, [])
    data = load_run_data(config)
    rag_system = build_rag_system(config, nodes=data.nodes)
    means = evaluate(rag_system, data.evaluation, ["negative_log_likelihood", "f1"], config.evaluation).means()
    after = run.read_json_if_there("evaluation/after.json")
    assert after is not None
    for name, mean in means.items():
        values = after["values"][name]
        assert mean == pytest.approx(sum(values) / len(values), abs=1e-6)
