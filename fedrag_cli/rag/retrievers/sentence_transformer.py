"""A bi-encoder of sentence-transformers as the retriever."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, Router
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from fedrag_cli.errors import DataError
from fedrag_cli.rag.config import SentenceTransformerConfig
from fedrag_cli.rag.lengths import Lengths
from fedrag_cli.rag.models import (
    FingerprintMemory,
    choose_device,
    choose_dtype,
    locate_model,
    model_errors,
    require_vocabulary,
)
from fedrag_cli.rag.retrievers.base import Progress, TrainableRetriever
from fedrag_cli.rag.retrievers.length_limits import measure_texts, set_length_limit

# Names under which models declare prompts, in the order in which sentence-transformers looks for them.
_QUERY_NAMES = ("query",)
_PASSAGE_NAMES = ("document", "passage", "corpus")
# Tokenizers differ in capitals, accents, spaces, punctuation, long words and other writings.
_PROBE = "Éclair  naïve CAFÉ, don't\n42.5% internationalization's Straße 東京 мир 🦉"
_structures: WeakKeyDictionary[SentenceTransformer, str] = WeakKeyDictionary()


class SentenceTransformerRetriever(TrainableRetriever):
    """Encodes queries and passages with one shared encoder or with two.

    Args:
        query_encoder: Encoder of queries.
        passage_encoder: Encoder of passages; the same object where the encoder is shared.
        config: Prompts, similarity and batch size; prompts that it leaves open are those that the encoders declare.
    """

    query_encoder: SentenceTransformer
    passage_encoder: SentenceTransformer

    def __init__(
        self,
        query_encoder: SentenceTransformer,
        passage_encoder: SentenceTransformer | None = None,
        config: SentenceTransformerConfig | None = None,
    ) -> None:
        """Put both encoders in eval mode, settle the prompts, and take control tokens in texts as text."""
        self.query_encoder = query_encoder.eval()
        self.passage_encoder = (passage_encoder or query_encoder).eval()
        self.config = _with_own_prompts(
            config or SentenceTransformerConfig(model="model"), self.query_encoder, self.passage_encoder
        )
        for encoder in (self.query_encoder, self.passage_encoder):
            _take_texts_as_text(encoder, (self.query_prompt, self.passage_prompt))
        self._memory_of_passages, self._memory_of_queries = FingerprintMemory(), FingerprintMemory()

    @classmethod
    def from_config(cls, config: SentenceTransformerConfig, *, device: str = "auto") -> SentenceTransformerRetriever:
        """Load one or two encoders; a Router of two, as this class saves it, is taken apart. Raises ModelError."""
        if config.model is None:
            query = _load(config.query_model or "", config, device)
            retriever = cls(query, _load(config.passage_model or "", config, device), config)
        else:
            model = _load(config.model, config, device)
            retriever = cls(*_encoders_of(model), _with_own_prompts(config, model, model))
        own = [
            f"{getattr(retriever.config, name)!r} before {texts}"
            for name, texts in (("query_prompt", "queries"), ("passage_prompt", "passages"))
            if getattr(config, name) is None and getattr(retriever.config, name)
        ]
        if own:
            settings = "query_prompt and passage_prompt change them"
            retriever.notes = (f"The retriever's own prompts are used: {', '.join(own)} ({settings}).",)
        return retriever

    @property
    def query_prompt(self) -> str:
        """What is put before each query."""
        return self.config.query_prompt or ""

    @property
    def passage_prompt(self) -> str:
        """What is put before each passage."""
        return self.config.passage_prompt or ""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What embeddings depend on beside the weights."""
        names = ("similarity", "query_prompt", "passage_prompt")
        own = {name: getattr(self.config, name) for name in names}
        return own | {"max_length": self.query_encoder.max_seq_length}

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        size = self.passage_encoder.get_embedding_dimension()
        return int(size) if size else int(self.encode_passages(["dimension"]).shape[1])

    @property
    def device(self) -> torch.device:
        """Where the encoders are."""
        return torch.device(self.query_encoder.device)

    def separate_encoders(self) -> None:
        """Give queries a copy of the shared encoder, so that tuning it leaves the passage side as it is."""
        if self.is_shared:
            self.query_encoder = copy.deepcopy(self.passage_encoder)

    def with_query_encoder(self, encoder: SentenceTransformer, *, shared: bool) -> SentenceTransformerRetriever:
        """Return a retriever with the same settings around another query encoder, of passages too where shared."""
        return SentenceTransformerRetriever(encoder, encoder if shared else self.passage_encoder, self.config)

    def fingerprint(self) -> str:
        """Return a hash of what passage embeddings depend on.

        This is the weights and their number format, the modules with their settings, the tokenizer, the prompt, the
        length limit and the similarity.
        """
        return self._fingerprint(self.passage_encoder, self._memory_of_passages, self.passage_prompt)

    def query_fingerprint(self) -> str:
        """Return a hash of what query embeddings depend on; see `fingerprint`."""
        return self._fingerprint(self.query_encoder, self._memory_of_queries, self.query_prompt)

    def _fingerprint(self, encoder: SentenceTransformer, memory: FingerprintMemory, prompt: str) -> str:
        settings: tuple[object, ...] = (
            prompt, encoder.max_seq_length, self.config.similarity, structure_fingerprint(encoder)
        )  # fmt: skip
        if prompt and _pools_without_prompt(encoder):
            # Stores that were filled while the prompt was pooled like the text must not pass for these.
            settings = (*settings, "prompt not pooled")
        return f"{memory.fingerprint(encoder)}-{_short_hash(repr(settings))}"

    def encode_queries(self, queries: Sequence[str], progress: Progress | None = None) -> Tensor:
        """Encode queries without gradient; see `encode_passages`."""
        return self._encode(self.query_encoder, queries, self.query_prompt, progress)

    def encode_passages(self, texts: Sequence[str], progress: Progress | None = None) -> Tensor:
        """Encode passages without gradient, to unit length where the similarity is cosine; see `Retriever`."""
        return self._encode(self.passage_encoder, texts, self.passage_prompt, progress)

    def passage_batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Tensor]]:
        """Encode passages without gradient, one batch after the other, the longest texts first; see `Retriever`."""
        return self._batches(self.passage_encoder, texts, self.passage_prompt)

    def features(self, texts: Sequence[str], *, queries: bool) -> dict[str, Any]:
        """Tokenise texts for a forward pass with gradient, prompts included."""
        encoder, prompt = self._side(queries)
        return prompted_features(encoder, texts, prompt)

    def embed(self, encoder: Any, features: Mapping[str, Any]) -> Tensor:
        """Run an encoder on tokenised texts, with gradient where the caller allows it; returns as `encode_passages`."""
        embeddings: Tensor = encoder(dict(features))["sentence_embedding"].float()
        return functional.normalize(embeddings, dim=-1) if self.config.similarity == "cosine" else embeddings

    def measure(self, texts: Sequence[str], kind: str, *, queries: bool) -> Lengths:
        """Measure queries or passages beside the encoder's limit, prompts included."""
        encoder, prompt = self._side(queries)
        return measure_texts(encoder, [prompt + text for text in texts], kind, splittable=not queries)

    def save(self, directory: Path) -> None:
        """Write the encoder, or a Router of the two, loadable by `SentenceTransformer(directory)`.

        Its `encode_query` and `encode_document` use the encoder and the prompt of queries and of passages.
        """
        prompts = {"query": self.query_prompt, "document": self.passage_prompt}
        model = self.query_encoder
        if not self.is_shared:
            router = Router.for_query_document(list(self.query_encoder), list(self.passage_encoder))
            model = SentenceTransformer(modules=[router], device=str(self.device))
        model.prompts = prompts
        model.save(str(directory), create_model_card=False)

    def _side(self, queries: bool) -> tuple[SentenceTransformer, str]:
        return (self.query_encoder, self.query_prompt) if queries else (self.passage_encoder, self.passage_prompt)

    def _encode(
        self, encoder: SentenceTransformer, texts: Sequence[str], prompt: str, progress: Progress | None
    ) -> Tensor:
        order: list[int] = []
        parts: list[Tensor] = []
        for positions, part in self._batches(encoder, texts, prompt):
            order += positions
            parts.append(part)
            if progress is not None:
                progress(len(positions))
        sorted_embeddings = torch.cat(parts) if parts else torch.zeros((0, 0), device=self.device)
        embeddings = torch.empty_like(sorted_embeddings)
        embeddings[order] = sorted_embeddings
        return embeddings

    @torch.inference_mode()
    def _batches(
        self, encoder: SentenceTransformer, texts: Sequence[str], prompt: str
    ) -> Iterator[tuple[list[int], Tensor]]:
        blank = next((position for position, text in enumerate(texts) if not text.strip()), None)
        if blank is not None:
            raise DataError(f"Text {blank} to encode is empty.", "Remove empty questions and passages.")
        was_training = encoder.training
        encoder.eval()
        # Texts of similar length go together, so that little is computed on padding.
        order = sorted(range(len(texts)), key=lambda position: -len(texts[position]))
        try:
            for start in range(0, len(order), self.config.batch_size):
                batch = order[start : start + self.config.batch_size]
                features = prompted_features(encoder, [texts[position] for position in batch], prompt)
                placed = {
                    name: value.to(self.device) if isinstance(value, Tensor) else value
                    for name, value in features.items()
                }
                yield batch, self.embed(encoder, placed)
        finally:
            encoder.train(was_training)


def prompted_features(encoder: SentenceTransformer, texts: Sequence[str], prompt: str) -> dict[str, Any]:
    """Tokenise texts with a prompt before each."""
    if prompt and _pools_without_prompt(encoder):
        return dict(encoder.preprocess(list(texts), prompt=prompt))
    return dict(encoder.preprocess([prompt + text for text in texts]))


def structure_fingerprint(encoder: SentenceTransformer) -> str:
    """Return a hash of an encoder's modules, their settings such as the pooling, and its tokenizer.

    It is the same for an encoder that was saved and loaded again.
    """
    if encoder not in _structures:
        # The first module's settings are those of a library's version; its weights and tokens tell what it does.
        modules = [
            [type(module).__name__, {} if isinstance(module, Transformer) else module.get_config_dict()]
            for module in encoder
        ]
        ids = encoder.preprocess([_PROBE]).get("input_ids")
        tokens = ids.flatten().tolist() if ids is not None else []
        _structures[encoder] = _short_hash(json.dumps([modules, tokens], sort_keys=True, default=str))
    return _structures[encoder]


def _with_own_prompts(
    config: SentenceTransformerConfig, query_model: SentenceTransformer, passage_model: SentenceTransformer
) -> SentenceTransformerConfig:
    """Return a config without open prompts: what it leaves open is what the models declare, or nothing.

    `default_prompt_name` does not count, as in `encode_query`.
    """

    def declared(model: SentenceTransformer, names: Sequence[str]) -> str:
        return next((str(model.prompts[name]) for name in names if model.prompts.get(name)), "")

    query, passage = config.query_prompt, config.passage_prompt
    return dataclasses.replace(
        config,
        query_prompt=query if query is not None else declared(query_model, _QUERY_NAMES),
        passage_prompt=passage if passage is not None else declared(passage_model, _PASSAGE_NAMES),
    )


def _take_texts_as_text(encoder: SentenceTransformer, prompts: Sequence[str]) -> None:
    """Let an encoder's tokenizer split control tokens in texts, such as [SEP], unless a prompt has some of its own."""
    for module in encoder.modules():
        tokenizer = getattr(module, "tokenizer", None)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            special = tokenizer.all_special_tokens
            tokenizer.split_special_tokens = not any(token in prompt for token in special for prompt in prompts)


def _pools_without_prompt(encoder: SentenceTransformer) -> bool:
    """Return whether a model leaves the tokens of its prompt out of the embedding, as Instructor does."""
    return any(isinstance(module, Pooling) and not module.include_prompt for module in encoder)


def _encoders_of(model: SentenceTransformer) -> tuple[SentenceTransformer, SentenceTransformer]:
    """Return the encoders of queries and of passages, which are one where the model is no Router of two."""
    if not isinstance(model[0], Router):
        return model, model
    routes = model[0].sub_modules
    query, passage = (
        SentenceTransformer(modules=list(routes[route]), device=str(model.device)) for route in ("query", "document")
    )
    return query, passage


def _load(reference: str, config: SentenceTransformerConfig, device: str) -> SentenceTransformer:
    location = locate_model(reference)
    target = choose_device(device)
    with model_errors(location, "retriever"):
        dtype = choose_dtype(config.dtype, target, small=True, setting="rag_system.retriever.dtype")
        model = SentenceTransformer(
            location.name_or_path,
            device=str(target),
            revision=config.revision,
            local_files_only=location.is_local,
            trust_remote_code=config.trust_remote_code,
            model_kwargs={"dtype": dtype},
        )
        for module in model.modules():
            require_vocabulary(getattr(module, "tokenizer", None))
    set_length_limit(model, config.max_length, location.reference)
    return model


def _short_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
