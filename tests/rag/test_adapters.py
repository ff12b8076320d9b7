"""LoRA adapters: the same seed gives the same weights, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedrag_cli.errors import ConfigError
from fedrag_cli.rag.models import FingerprintMemory, weights_fingerprint
from fedrag_cli.trainers.config import LoRAConfig
from fedrag_cli.trainers.huggingface.generator import add_adapter


def adapted(folder: Path, *, seed: int = 0, **settings: object) -> PeftModel:
    return add_adapter(
        AutoModelForCausalLM.from_pretrained(folder), LoRAConfig(**{"r": 2, "alpha": 4.0, **settings}), seed
    )  # type: ignore[arg-type]


def adapter_weights(model: PeftModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(models: dict[str, Path]) -> None:
    first = adapter_weights(adapted(models["generator"]))
    torch.manual_seed(123)
    same, other = adapter_weights(adapted(models["generator"])), adapter_weights(adapted(models["generator"], seed=1))
    assert first.keys() == same.keys()
    assert all(torch.equal(first[name], same[name]) for name in first)
    for name, weight in first.items():
        assert torch.equal(weight, other[name]) is ("lora_B" in name)
        assert weight.any() == ("lora_A" in name)


def test_the_global_random_state_is_left_alone(models: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(models["generator"])
    torch.manual_seed(7)
    before = torch.get_rng_state()
    add_adapter(model, LoRAConfig(r=2), seed=99)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_the_adapter_takes_a_gradient_and_the_output_head_gets_none(models: dict[str, Path]) -> None:
    model = adapted(models["generator"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter_weights(model))
    assert not [name for name in trained if "lm_head" in name or "embed" in name]
    # Seven linear layers in each of two blocks, with A and B each.
    assert len(trained) == 7 * 2 * 2


def test_named_layers_get_the_adapter(models: dict[str, Path]) -> None:
    names = adapter_weights(adapted(models["generator"], target_modules=("q_proj", "v_proj")))
    assert {name.split(".self_attn.")[1].split(".")[0] for name in names} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("targets", [("no_such_layer",), "no_such_layer"])
def test_names_of_no_layer_are_a_config_error(models: dict[str, Path], targets: object) -> None:
    with pytest.raises(ConfigError, match=r"target_modules (does not fit|names no layer of) the model") as caught:
        adapted(models["generator"], target_modules=targets)
    assert "all-linear" in caught.value.hint


def test_one_misspelt_layer_among_right_ones_is_refused_with_those_near_it(models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        adapted(models["generator"], target_modules=("q_proj", "v_porj", "self_attn.k_proj", "q", "all-linear"))
    assert "'v_porj' (did you mean 'v_proj'" in caught.value.message
    assert "'q'" in caught.value.message
    assert "'all-linear'" in caught.value.message
    assert "'q_proj'," not in caught.value.message
    assert "k_proj'," not in caught.value.message
    with pytest.raises(ConfigError, match="does not fit the model"):
        adapted(models["generator"], target_modules="q_proj(")
    with pytest.raises(ConfigError, match="it is empty"):
        adapted(models["generator"], target_modules=())


def test_the_saved_settings_do_not_depend_on_the_order_of_a_set(models: dict[str, Path], tmp_path: Path) -> None:
    names = ("q_proj", "v_proj", "k_proj", "o_proj", "up_proj", "down_proj", "gate_proj")
    adapted(models["generator"], target_modules=names).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(names)


def test_a_model_with_an_adapter_keeps_it(models: dict[str, Path]) -> None:
    model = adapted(models["generator"])
    before = adapter_weights(model)
    again = add_adapter(model, LoRAConfig(r=2, alpha=4.0), seed=55)
    assert again is model
    assert all(torch.equal(weight, before[name]) for name, weight in adapter_weights(again).items())


@pytest.mark.parametrize(("r", "alpha"), [(3, 4.0), (2, 8.0)])
def test_an_adapter_of_another_rank_or_scaling_is_refused(models: dict[str, Path], r: int, alpha: float) -> None:
    with pytest.raises(ConfigError, match=f"r 2, alpha 4.* r {r}, alpha {alpha}"):
        add_adapter(adapted(models["generator"]), LoRAConfig(r=r, alpha=alpha), seed=0)


def test_an_adapter_on_other_layers_is_refused(models: dict[str, Path]) -> None:
    model = adapted(models["generator"], target_modules=("q_proj",))
    with pytest.raises(ConfigError, match="target_modules"):
        add_adapter(model, LoRAConfig(r=2, alpha=4.0, target_modules=("v_proj",)), seed=0)


def test_gpt2_gets_an_adapter_without_a_warning(models: dict[str, Path]) -> None:
    assert adapter_weights(adapted(models["gpt2"]))


def test_a_merged_adapter_changes_the_remembered_fingerprint(models: dict[str, Path]) -> None:
    """peft merges through `.data`, which torch does not count as a write."""
    model, memory = adapted(models["generator"]), FingerprintMemory()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    before = memory.fingerprint(model)
    model.merge_adapter()
    assert memory.fingerprint(model) == weights_fingerprint(model) != before
