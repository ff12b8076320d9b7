"""Retrievers and generators of a plug-in, with weights and without, as `test_plugins` installs them."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from fedrag_cli.config.fields import PathStr, PositiveInt, config_class
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.rag.config import CausalLMConfig
from fedrag_cli.rag.generators.base import EncodedPrompt, Generator, OnTexts, OnTokenLogProbs, TokenPair
from fedrag_cli.rag.models import tensors_fingerprint
from fedrag_cli.rag.retrievers.base import Progress, Retriever, TrainableRetriever
from fedrag_cli.registry import Registry


@config_class
class HashingConfig:
    """Words as numbers."""

    type: Literal["hashing"] = "hashing"
    """Names it."""
    size: PositiveInt = 256
    """Length of an embedding."""


@config_class
class FirstSentenceConfig:
    """The first sentence of the first passage."""

    type: Literal["first_sentence"] = "first_sentence"
    """Names it."""


@config_class
class PlainConfig:
    """The same without likelihoods."""

    type: Literal["plain"] = "plain"
    """Names it."""


def numbers_of(text: str, most: int) -> list[int]:
    return [int(hashlib.sha256(word.encode()).hexdigest(), 16) % most for word in text.lower().split()]


class Hashing(Retriever):
    def __init__(self, config: Any, *, device: str) -> None:
        self.size = config.size

    @property
    def dimension(self) -> int:
        return self.size

    def fingerprint(self) -> str:
        return f"hashing-{self.size}"

    def encode_queries(self, queries: Sequence[str], progress: Progress | None = None) -> Tensor:
        return self.encode_passages(queries, progress)

    def encode_passages(self, texts: Sequence[str], progress: Progress | None = None) -> Tensor:
        rows = torch.zeros(len(texts), self.size)
        for row, text in zip(rows, texts, strict=True):
            for number in numbers_of(text, self.size):
                row[number] += 1
        if progress:
            progress(len(texts))
        return torch.nn.functional.normalize(rows, dim=-1)


class FirstSentence(Generator):
    def __init__(self, config: Any, *, prompt: Any, device: str, seed: int) -> None:
        pass

    def fingerprint(self) -> str:
        return "first-sentence"

    def context(self, passages: Sequence[KnowledgeNode]) -> str:
        return "\n".join(passage.text for passage in passages)

    def encode_prompt(self, query: str, passages: Sequence[KnowledgeNode]) -> EncodedPrompt:
        return EncodedPrompt(list(self.context(passages).encode()))

    def answer(self, prompts: Sequence[EncodedPrompt], on_batch: OnTexts | None = None) -> list[str]:
        texts = [bytes(prompt.ids).decode().split(".")[0].strip() for prompt in prompts]
        if on_batch:
            on_batch(list(range(len(texts))), texts)
        return texts


class Scoring(FirstSentence):
    """An answer that stands in the prompt is likelier than another."""

    def encode_pair(
        self, query: str, passages: Sequence[KnowledgeNode], answer: str, *, with_end: bool = True
    ) -> EncodedPrompt:
        return EncodedPrompt(list((self.context(passages) + " ").encode()), answer=list(answer.encode()))

    def token_log_probs_of_ids(self, pairs: Sequence[TokenPair], on_batch: OnTokenLogProbs) -> None:
        for position, (prompt, answer) in enumerate(pairs):
            value = -0.5 if bytes(answer) in bytes(prompt) else -5.0
            on_batch([position], [torch.full((len(answer),), value)])


@config_class
class VectorsConfig:
    """A vector a word, which is tuned."""

    type: Literal["vectors"] = "vectors"
    """Names it."""
    folder: PathStr | None = None
    """Saved vectors; those of the start without it."""

    def tuned_in(self, directory: Path) -> VectorsConfig:
        return dataclasses.replace(self, folder=str(directory))


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.words = torch.nn.EmbeddingBag(512, 16)

    def forward(self, features: Mapping[str, Any]) -> Tensor:
        return self.words(features["ids"], features["offsets"])


class Vectors(TrainableRetriever):
    dimension = 16

    def __init__(self, config: Any, *, device: str) -> None:
        self.query_encoder = self.passage_encoder = Encoder()
        if config.folder is not None:
            self.separate_encoders()
            load_model(self.query_encoder, f"{config.folder}/query.safetensors")
            load_model(self.passage_encoder, f"{config.folder}/passage.safetensors")

    def fingerprint(self) -> str:
        return tensors_fingerprint(self.passage_encoder.state_dict())

    def separate_encoders(self) -> None:
        if self.is_shared:
            self.query_encoder = copy.deepcopy(self.passage_encoder)

    def with_query_encoder(self, encoder: Any, *, shared: bool) -> Vectors:
        other = copy.copy(self)
        other.query_encoder = encoder
        other.passage_encoder = encoder if shared else self.passage_encoder
        return other

    def features(self, texts: Sequence[str], *, queries: bool) -> dict[str, Any]:
        words = [numbers_of(text, 512) for text in texts]
        starts = [0, *accumulate(map(len, words))][:-1]
        return {"ids": torch.tensor([number for row in words for number in row]), "offsets": torch.tensor(starts)}

    def embed(self, encoder: torch.nn.Module, features: Mapping[str, Any]) -> Tensor:
        return torch.nn.functional.normalize(encoder(features), dim=-1)

    @torch.no_grad()
    def encode_queries(self, queries: Sequence[str], progress: Progress | None = None) -> Tensor:
        return self.embed(self.query_encoder, self.features(queries, queries=True))

    @torch.no_grad()
    def encode_passages(self, texts: Sequence[str], progress: Progress | None = None) -> Tensor:
        return self.embed(self.passage_encoder, self.features(texts, queries=False))

    def save(self, directory: Path) -> None:
        save_model(self.query_encoder, f"{directory}/query.safetensors")
        save_model(self.passage_encoder, f"{directory}/passage.safetensors")


@config_class
class OwnModelConfig(CausalLMConfig):
    """A causal language model under another name."""

    type: Literal["own_model"] = "own_model"
    """Names it."""


def register(registry: Registry) -> None:
    causal_lm = "fedrag_cli.rag.generators.causal_lm:CausalLMGenerator.from_config"
    registry.register("retriever", "hashing", HashingConfig, f"{__name__}:Hashing", "words as numbers")
    registry.register("retriever", "vectors", VectorsConfig, f"{__name__}:Vectors", "a vector a word")
    registry.register("generator", "first_sentence", FirstSentenceConfig, f"{__name__}:Scoring", "first sentence")
    registry.register("generator", "plain", PlainConfig, f"{__name__}:FirstSentence", "no likelihoods")
    registry.register("generator", "own_model", OwnModelConfig, causal_lm, "a model")
