"""What the sites of a federation must have in common, and how they differ where they do not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.errors import ConnectionFailedError
from fedrag_cli.federated.lora import LORA_A
from fedrag_cli.federated.weights import Manifest, manifest_of
from fedrag_cli.rag.generators.base import TrainableGenerator
from fedrag_cli.rag.retrievers.base import TrainableRetriever
from fedrag_cli.text import printable, shape_text
from fedrag_cli.trainers.huggingface.base import HuggingFaceTrainer
from fedrag_cli.trainers.huggingface.checks import trainable

PROTOCOL = 1
# What each site sets for its own hardware and its own records.
SITE_SETTINGS = frozenset(
    {
        "batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "keep_checkpoints",
        "log_every",
        "precision",
        "save_every",
        "validation",
    }
)
MOST_DIFFERENCES = 5


@dataclass(frozen=True)
class Agreement:
    """What server and clients must have in common."""

    protocol: int
    """Version of the messages."""
    side: str
    manifest: Manifest
    models: dict[str, str]
    """Fingerprints of the base models by name."""
    settings: dict[str, Any]
    """Settings of training, prompts and reports, by key path."""

    def to_json(self) -> str:
        """Write the agreement as JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Agreement:
        """Read an agreement that the other side sent; raises ConnectionFailedError where it is none."""
        try:
            values = json.loads(text)
            # Every part is brought to its type: what the other side sends may be anything.
            manifest = {str(name): [int(size) for size in shape] for name, shape in values["manifest"].items()}
            models = {str(name): str(value) for name, value in values["models"].items()}
            settings = {str(name): value for name, value in values["settings"].items()}
            return cls(int(values["protocol"]), str(values["side"]), manifest, models, settings)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ConnectionFailedError(
                f"The other side's handshake cannot be read ({type(error).__name__}).",
                "Use the same version of fedrag everywhere.",
            ) from error


def misfit(server: Agreement, own: Agreement) -> ConnectionFailedError | None:
    """Return the error of a client whose side of the agreement is not the server's; None where both agree."""
    found = differences(server, own)
    if not found:
        return None
    return ConnectionFailedError(
        "This client does not fit the federation: " + "; ".join(found) + ".",
        "Use the server's models and settings; only hardware settings such as batch_size may differ.",
    )


def agreement_of(trainer: HuggingFaceTrainer, settings: FederatedConfig) -> Agreement:
    """Collect what the others must have in common with a trainer: the reported metrics are a part of it."""
    return Agreement(
        PROTOCOL,
        trainer.side,
        manifest_of(trainable(trainer.model)),
        _fingerprints(trainer, settings),
        dict(_settings(trainer, settings)),
    )


def differences(server: Agreement, client: Agreement) -> list[str]:
    """Say in words where a client differs from the server; empty where they agree."""
    if client.protocol != server.protocol:
        theirs, ours = printable(client.protocol, 20), printable(server.protocol, 20)
        return [f"protocol {theirs}, but the server speaks {ours} (use the same version of fedrag)"]
    if client.side != server.side:
        theirs, ours = printable(client.side, 20), printable(server.side, 20)
        return [f"tunes the {theirs}, but the server the {ours} (trainer.mode)"]
    found = [f"another {printable(name, 40)} model" for name in _unequal(server.models, client.models)]
    found += [
        f"{printable(key, 80)} is {_show(client.settings, key)}, but the server has {_show(server.settings, key)}"
        for key in _unequal(server.settings, client.settings)
    ]
    tensors = _unequal(server.manifest, client.manifest)
    if tensors:
        name = tensors[0]
        more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        found.append(
            f"trained tensor {printable(name, 120)} is {_shape(client.manifest, name)}, but on the server "
            f"{_shape(server.manifest, name)}{more}"
        )
    rest = len(found) - MOST_DIFFERENCES
    return [*found[:MOST_DIFFERENCES], f"{rest} more"] if rest > 0 else found


def base_fingerprint(model: nn.Module, vocabulary: Mapping[str, int] | None = None) -> str:
    """Return a hash of a base model: its weights without LoRA adapters, and its vocabulary.

    Weights are hashed as bfloat16, so that a site which keeps them in bfloat16 agrees with one that keeps float32.
    """
    return _fingerprint(_base_tensors(model), json.dumps(sorted((vocabulary or {}).items())))


def _fingerprint(tensors: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors):
        digest.update(f"{name}:{tuple(tensor.shape)}".encode())
        digest.update(_canonical(tensor))
    digest.update(text.encode())
    return digest.hexdigest()


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that are no adapter's, under the names that they have without adapters."""
    for name, tensor in model.named_parameters():
        if "lora_" not in name:
            yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), tensor


def _canonical(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu()
    values = values.to(torch.bfloat16) if values.is_floating_point() else values
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _fingerprints(trainer: HuggingFaceTrainer, settings: FederatedConfig) -> dict[str, str]:
    rag_system = trainer.rag_system
    retriever = rag_system.retriever
    if isinstance(retriever, TrainableRetriever):
        found = {
            "passage encoder": base_fingerprint(retriever.passage_encoder),
            "query encoder": base_fingerprint(retriever.query_encoder),
        }
    else:
        found = {"retriever": retriever.fingerprint()}
    # A site may have a generator for its own evaluation that no objective sees.
    if trainer.config.needs_generator and rag_system.generator is not None:
        generator = rag_system.generator
        found["generator"] = (
            base_fingerprint(generator.model, generator.tokenizer.get_vocab())
            if isinstance(generator, TrainableGenerator)
            else generator.fingerprint()
        )
    if settings.lora_aggregation == "freeze_a":
        found["frozen half of the adapter's"] = _fingerprint(
            (name, tensor) for name, tensor in trainer.model.named_parameters() if LORA_A in name
        )
    return found


def _settings(trainer: HuggingFaceTrainer, settings: FederatedConfig) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(trainer.config):
        if field.name not in SITE_SETTINGS:
            yield f"trainer.{trainer.side}.{field.name}", _plain(getattr(trainer.config, field.name))
    prompt = trainer.rag_system.prompt_config
    for field in dataclasses.fields(prompt) if trainer.config.needs_generator else ():
        yield f"rag_system.prompt.{field.name}", _plain(getattr(prompt, field.name))
    for name, value in trainer.rag_system.retriever.settings.items():
        yield f"rag_system.retriever.{name}", value
    config = trainer.rag_system.config
    if trainer.side == "retriever" and config is not None and config.rag_system.lexical is not None:
        # The distribution that is taught is that of the fused scores; how words are split is each site's own matter.
        yield "rag_system.lexical.type", config.rag_system.lexical.type
        for field in dataclasses.fields(config.rag_system.fusion):
            yield f"rag_system.fusion.{field.name}", getattr(config.rag_system.fusion, field.name)
    yield "federated.metrics", sorted(settings.metrics)
    yield "federated.transport_dtype", settings.transport_dtype
    yield "federated.lora_aggregation", settings.lora_aggregation
    privacy = settings.privacy
    for field in dataclasses.fields(privacy) if privacy is not None else ():
        yield f"federated.privacy.{field.name}", getattr(privacy, field.name)
    if privacy is not None and privacy.at == "client":
        # Each client's share of the noise follows from it, and what it spends from the number of rounds.
        yield "federated.min_clients", settings.min_clients
        yield "federated.rounds", settings.rounds


def _plain(value: Any) -> Any:
    """Return a setting as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value))  # type: ignore[arg-type]


def _unequal(mine: Mapping[str, Any], other: Mapping[str, Any]) -> Sequence[str]:
    return [
        name
        for name in sorted({*mine, *other})
        if mine.get(name) != other.get(name) or (name in mine) != (name in other)
    ]


def _show(settings: Mapping[str, Any], key: str) -> str:
    return printable(json.dumps(settings[key], ensure_ascii=False), 60) if key in settings else "not set"


def _shape(manifest: Manifest, name: str) -> str:
    return f"of shape {shape_text(manifest[name])}" if name in manifest else "missing"
