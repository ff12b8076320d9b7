"""What a retriever offers. The core knows these classes alone, so a plug-in that derives from one is as good as ours.

It is registered under the kind `retriever` and built as `builder(config, device=...)`, with `run.device`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedrag_cli.rag.lengths import Lengths

Progress = Callable[[int], None]


class Retriever(ABC):
    """Turns queries and passages into embeddings, whose dot product is the score of a passage."""

    notes: tuple[str, ...] = ()
    """What is worth knowing about how it was loaded, a line each."""
    batch_size: int = 64
    """Texts that are encoded at once."""

    @property
    def device(self) -> torch.device:
        """Where embeddings are put."""
        return torch.device("cpu")

    @property
    def settings(self) -> Mapping[str, Any]:
        """What all sites of a federation must have alike beside the weights, by the names of the config."""
        return {}

    @property
    @abstractmethod
    def dimension(self) -> int:
        """Length of an embedding."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of all that passage embeddings depend on; a knowledge store of another one is refused."""

    @abstractmethod
    def encode_queries(self, queries: Sequence[str], progress: Progress | None = None) -> Tensor:
        """Encode queries without gradient; see `encode_passages`."""

    @abstractmethod
    def encode_passages(self, texts: Sequence[str], progress: Progress | None = None) -> Tensor:
        """Encode passages without gradient.

        Args:
            texts: The passages.
            progress: Called with the number of texts done after each batch.

        Returns:
            Finite float32 tensor of shape (len(texts), dimension) on `device`.

        Raises:
            DataError: A text is empty.
        """

    def passage_batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Tensor]]:
        """Encode passages, one batch after the other, in an order that may differ from that of the texts.

        Yields:
            The positions of a batch's texts, and their embeddings as `encode_passages` returns them. Leaving out the
            texts of the first batches gives the others in the same batches.
        """
        for start in range(0, len(texts), self.batch_size):
            batch = list(texts[start : start + self.batch_size])
            yield list(range(start, start + len(batch))), self.encode_passages(batch)

    def measure(self, texts: Sequence[str], kind: str, *, queries: bool) -> Lengths:
        """Measure queries or passages, which messages call `kind`, beside the most that is read of a text."""
        return Lengths(kind, len(texts))


class TrainableRetriever(Retriever):
    """A retriever with weights that trainers tune: one encoder for queries and passages, or two."""

    query_encoder: Any
    """The `nn.Module` that encodes queries."""
    passage_encoder: Any
    """The `nn.Module` that encodes passages; the same object where it is shared."""

    @property
    def is_shared(self) -> bool:
        """Whether queries and passages use the same encoder."""
        return self.query_encoder is self.passage_encoder

    @abstractmethod
    def separate_encoders(self) -> None:
        """Give queries a copy of the shared encoder, so that tuning it leaves the passage side as it is."""

    @abstractmethod
    def with_query_encoder(self, encoder: Any, *, shared: bool) -> TrainableRetriever:
        """Return a retriever with the same settings around another query encoder, of passages too where shared."""

    @abstractmethod
    def features(self, texts: Sequence[str], *, queries: bool) -> dict[str, Any]:
        """Turn texts into what `embed` takes, on the CPU, to be moved to the encoder's device."""

    @abstractmethod
    def embed(self, encoder: nn.Module, features: Mapping[str, Any]) -> Tensor:
        """Run an encoder on features, with gradient where the caller allows it; returns as `encode_passages`."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the encoders; the config's `tuned_in(directory)` names them."""
