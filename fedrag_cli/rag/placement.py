"""Where a large model's weights go, and in how many bits: several GPUs, and quantization by bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from fedrag_cli.errors import ConfigError, ModelError
from fedrag_cli.rag.config import CausalLMConfig
from fedrag_cli.rag.models import ModelLocation, has_fast_bfloat16
from fedrag_cli.runs.launch import process_count


def placement_options(config: CausalLMConfig, location: ModelLocation, device: torch.device) -> dict[str, Any]:
    """Return what `from_pretrained` needs to place the weights itself; nothing where the whole model is moved later.

    Args:
        config: The generator's settings.
        location: Where the model is.
        device: The device for a model that is on one.

    Raises:
        ConfigError: The package for quantization is missing, the model is a GGUF file, or several processes would take
            all GPUs each.
    """
    options: dict[str, Any] = {}
    if config.device_map is not None:
        if process_count() > 1:
            raise ConfigError(
                f"rag_system.generator.device_map gives all GPUs to one process, but {process_count()} were started.",
                "Start 'fedrag train' without a launcher, or remove device_map.",
            )
        options["device_map"] = config.device_map
    if config.quantization is not None:
        _require_quantization(location)
        options["quantization_config"] = quantization_config(config.quantization, device)
        options.setdefault("device_map", {"": device})
    return options


def quantization_config(quantization: str, device: torch.device) -> BitsAndBytesConfig:
    """Return the settings of bitsandbytes.

    Source: LLM.int8() (arXiv 2208.07339) for 8bit; QLoRA (arXiv 2305.14314, section 3) for 4bit.

    Args:
        quantization: `8bit` or `4bit`.
        device: Where the model will run; products are computed in bfloat16 where it has that in hardware.
    """
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if has_fast_bfloat16(device) else torch.float32,
    )


def settled(model: Any, location: ModelLocation) -> Any:
    """Return a model that `from_pretrained` has placed, after a look at where its weights are.

    Args:
        model: The model.
        location: Where it came from, for the message.

    Raises:
        ModelError: A part of it did not fit on the GPUs.
    """
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    # What accelerate keeps in main memory or on disk has no weights to train, to save or to take a fingerprint of.
    if len(places) > 1 and places & {"cpu", "disk"}:
        raise ModelError(
            f"The generator '{location.reference}' does not fit on the GPUs that the process sees.",
            "Set rag_system.generator.quantization: 4bit, use more GPUs, or take a smaller model.",
        )
    for module in model.modules():
        # On some processors bitsandbytes packs weights anew before an evaluation, which rounds them, so that neither
        # fingerprint nor training would see the weights that were loaded, and which fails for narrow layers.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    return model


def placement_note(config: CausalLMConfig, model: Any) -> str:
    """Return where a device map has put a model, in words; empty where there is no device map."""
    if config.device_map is None:
        return ""
    placed = getattr(model, "hf_device_map", None) or {"": model.device}
    names = dict.fromkeys(f"cuda:{place}" if isinstance(place, int) else str(place) for place in placed.values())
    reason = ", because the process sees no GPU" if set(names) == {"cpu"} else ""
    return f"device_map: {config.device_map} has put the generator on {' and '.join(names)}{reason}."


def _require_quantization(location: ModelLocation) -> None:
    if location.gguf_file is not None:
        raise ConfigError(
            f"The GGUF file '{location.reference}' cannot be loaded with rag_system.generator.quantization, because "
            "transformers turns it into plain weights.",
            "Remove quantization, or give the model in safetensors.",
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "rag_system.generator.quantization needs the package bitsandbytes, which is not installed.",
            "Install it with: pip install 'fedrag-cli[quantization]'",
        )
