"""Finding and loading models: references, devices, number formats, several GPUs and quantization."""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from fedrag_cli.config.fields import ModelLocation as ModelLocation
from fedrag_cli.config.fields import locate_model as locate_model
from fedrag_cli.errors import ConfigError, FedRAGError, ModelError
from fedrag_cli.rag.config import CausalLMConfig
from fedrag_cli.runs.processes import local_rank, process_count

_SAMPLED_VALUES = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def model_errors(location: ModelLocation, what: str) -> Iterator[None]:
    """Turn what the model libraries raise while they load a retriever, generator or adapter into a ModelError."""
    try:
        yield
    except (FedRAGError, MemoryError):
        raise
    except Exception as error:
        # Any: what stands in a folder of somebody else may make the libraries divide by zero.
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        # The libraries name the argument in every refusal of a model's own code.
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"The {what} '{location.reference}' comes with Python code of its own, which is not run.",
                f"If you have read that code and trust it, set rag_system.{what}.trust_remote_code: true.",
            ) from error
        if isinstance(error, pickle.UnpicklingError):
            raise ModelError(
                f"The {what} '{location.reference}' cannot be loaded: its weights are a Python pickle with more than "
                "tensors in it, which is not read, or a damaged one.",
                "Give a model with *.safetensors.",
            ) from error
        if location.is_local:
            hint = "Check that the folder holds a whole model (config.json, tokenizer files, *.safetensors)."
        else:
            hint = (
                "Check the id and the network; for a machine without network, give a local directory "
                "or a package://name/path."
            )
        raise ModelError(f"The {what} '{location.reference}' cannot be loaded: {reason}", hint) from error


def require_vocabulary(tokenizer: Any) -> None:
    """Raise OSError where a tokenizer knows special tokens only; transformers makes such a one of missing files."""
    special = getattr(tokenizer, "all_special_ids", None)
    if special is not None and len(tokenizer) <= len(special):
        raise OSError("its tokenizer has no vocabulary (tokenizer.json is missing)")


def choose_device(device: str) -> torch.device:
    """Return the torch device for a config value; `auto` takes cuda, then mps, then cpu.

    With several processes on a machine each takes the GPU of its number.

    Raises:
        ModelError: The device is not there, or several processes would share it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if process_count() > 1 and device.startswith("cuda"):
        if device != "cuda":
            raise ModelError(
                f"run.device is {device}, but each of {process_count()} processes needs a GPU of its own.",
                "Set run.device to auto or cuda.",
            )
        device = f"cuda:{local_rank()}"
    missing = ModelError(f"This machine has no device '{device}'.", "Set run.device to auto or cpu.")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise missing from error
    there = {
        "cpu": True,
        "mps": torch.backends.mps.is_available(),
        "cuda": torch.cuda.is_available() and (chosen.index or 0) < torch.cuda.device_count(),
    }
    if not there.get(chosen.type, False):
        raise missing
    return chosen


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes matrix products in bfloat16 in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def require_bfloat16(device: torch.device, setting: str) -> None:
    """Raise ModelError, which names the setting, where a GPU has no bfloat16; every CPU computes it, if slowly."""
    missing = (device.type == "cuda" and not has_fast_bfloat16(device)) or (
        device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0)
    )
    if missing:
        raise ModelError(f"{setting} is bfloat16, which the device '{device}' does not have.", "Set it to float32.")


def choose_dtype(dtype: str, device: torch.device, *, small: bool, setting: str) -> torch.dtype:
    """Return the number format of the weights that a config value means; `small` models keep float32 with `auto`.

    Raises:
        ModelError: The device does not have the format; `setting` names its config key.
    """
    if dtype == "bfloat16":
        require_bfloat16(device, setting)
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda" and has_fast_bfloat16(device) and not small:
        return torch.bfloat16
    return torch.float32


class FingerprintMemory:
    """Remembers a model's fingerprint until a weight is written in place or replaced.

    Every replacement of a tensor and every write that torch counts is noticed: optimizers, `copy_`, `load_state_dict`.
    Writes that torch does not count, through `parameter.data` (as peft does when it merges an adapter) or numpy, are
    noticed where they change one of the 8 values that are looked at in each tensor. One that leaves those alone, such
    as a single row of an embedding, is not; write it under `torch.no_grad()` to the parameter itself.
    """

    def __init__(self) -> None:
        """Remember nothing yet."""
        self._known: tuple[list[object], str] | None = None

    def fingerprint(self, model: nn.Module) -> str:
        """Return `weights_fingerprint(model)`, computed anew only where a weight has changed."""
        tensors = [*model.parameters(), *model.buffers()]
        state: list[object] = [*((tensor.data_ptr(), tensor._version) for tensor in tensors), *_samples(tensors)]
        if self._known is None or self._known[0] != state:
            self._known = (state, weights_fingerprint(model))
        return self._known[1]


@torch.no_grad()
def _samples(tensors: Sequence[Tensor]) -> list[bytes]:
    """Return some values of each tensor, evenly spread, with one transfer a device and number format."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if count := min(_SAMPLED_VALUES, tensor.numel()):
            values = tensor.contiguous()
            sample = values.as_strided((count,), (tensor.numel() // count,), values.storage_offset())
            groups.setdefault((tensor.device, tensor.dtype), []).append(sample)
    return [torch.cat(group).cpu().view(torch.uint8).numpy().tobytes() for group in groups.values()]


def weights_fingerprint(model: nn.Module) -> str:
    """Return a hash of all weights and buffers of a model, by name, of 16 hexadecimal digits."""
    return tensors_fingerprint(model.state_dict())


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of tensors, by name, of 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def placement_options(config: CausalLMConfig, location: ModelLocation, device: torch.device) -> dict[str, Any]:
    """Return what `from_pretrained` needs to place the weights itself; nothing where the whole model is moved later.

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
        if location.gguf_file is not None:
            raise ConfigError(
                f"The GGUF file '{location.reference}' cannot be loaded with rag_system.generator.quantization, "
                "because transformers turns it into plain weights.",
                "Remove quantization, or give the model in safetensors.",
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "rag_system.generator.quantization needs the package bitsandbytes, which is not installed.",
                "Install it with: pip install 'fedrag-cli[quantization]'",
            )
        options["quantization_config"] = quantization_config(config.quantization, device)
        options.setdefault("device_map", {"": device})
    return options


def quantization_config(quantization: str, device: torch.device) -> BitsAndBytesConfig:
    """Return the settings of bitsandbytes; products are computed in bfloat16 where the device has it in hardware.

    Source: LLM.int8() (arXiv 2208.07339) for 8bit; QLoRA (arXiv 2305.14314, section 3) for 4bit.
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
    """Return a model that `from_pretrained` has placed; raise ModelError where a part did not fit on the GPUs."""
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
