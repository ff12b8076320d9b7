"""Search by Qdrant: a server that many share, or embedded in the process."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.config import QdrantStoreConfig
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore, SearchResult, check_new
from fedrag_cli.rag.knowledge_stores.qdrant_collection import (
    QdrantClient,
    connect,
    copy_store,
    create_collection,
    create_filter_indexes,
    in_memory,
    metadata_filter,
    models,
    open_folder,
    payload_key,
    point_id,
    qdrant_errors,
    read_passages,
    read_vectors,
    seal_folder,
    version_of_folder,
    write_points,
)
from fedrag_cli.rag.knowledge_stores.store_files import Passages
from fedrag_cli.runs.files import replace_directory_atomically

FORMAT = "fedrag-qdrant-store-1"


class QdrantKnowledgeStore(KnowledgeStore):
    """Passages with their embeddings in a Qdrant collection; with a filter, those of them that pass it.

    What a server or a folder holds is only read, because others may be searching it: a change takes the passages into
    an embedded Qdrant in memory first. `save` and `publish` write.

    Args:
        config: Names, the filter and sizes of batches.
        device: Where results are put.
        client: The Qdrant that holds the collection already; without it an embedded one in memory that is empty.
    """

    def __init__(
        self,
        config: QdrantStoreConfig | None = None,
        device: torch.device | str = "cpu",
        client: QdrantClient | None = None,
    ) -> None:
        """Start empty, or with what the client's collection holds."""
        self.config: QdrantStoreConfig
        super().__init__(config or QdrantStoreConfig(), device)
        self._filter = metadata_filter(self.config.filter)
        self._is_own = client is None
        self._client = client if client is not None else in_memory()
        self._dimension = self._end = 0
        self._set_passages([], [])
        if client is not None:
            self._open_collection()

    @classmethod
    def from_config(cls, config: QdrantStoreConfig, *, device: torch.device | str = "cpu") -> Self:
        """Open the collection on the server or in the folder; see `KnowledgeStore.from_config`."""
        if config.url is None:
            return super().from_config(config, device=device)
        client = connect(config)
        with qdrant_errors(config.url):
            exists = client.collection_exists(config.collection)
        return cls(config, device, client if exists else None)

    @property
    def dimension(self) -> int:
        """How many numbers an embedding has; 0 where the store is empty."""
        return self._dimension

    def add(self, nodes: Sequence[KnowledgeNode], embeddings: Tensor) -> None:
        """Add or replace passages; see `KnowledgeStore.add`."""
        check_new(nodes, embeddings, self.dimension)
        if not nodes:
            return
        self._take_over()
        if not self._dimension:
            self._start_collection(embeddings.shape[1])
        places, end = [], self._end
        for node in nodes:
            position = self._passages.positions.get(node.id)
            places.append(end if position is None else self._places[position])
            end += position is None
        self._write(nodes, embeddings, places)
        if self._filter is not None:
            self._set_passages(*read_passages(self._client, self.config.collection, self._filter))
        else:
            known = len(self)
            _, fresh = self._passages.put(nodes)
            self._places += [places[row] for row in fresh]
            self._number(known)
        self._end = end

    def delete(self, ids: Sequence[str]) -> int:
        """Remove passages and return how many were there."""
        gone = [id for id in dict.fromkeys(ids) if id in self._passages.positions]
        if gone:
            self._take_over()
            self._client.delete(self.config.collection, [point_id(id) for id in gone])
            kept = self._passages.remove(gone)
            self._set_passages(self._passages.nodes, [self._places[position] for position in kept])
            if not self._client.count(self.config.collection).count:
                self._dimension = 0
        return len(gone)

    def clear(self) -> None:
        """Remove all passages, their embeddings and the fingerprints; a server or a folder keeps its own."""
        self.encoder_fingerprint = self.corpus_fingerprint = self.rounded_to = None
        self._client, self._is_own, self._dimension = in_memory(), True, 0
        self._set_passages([], [])

    @property
    def _hidden(self) -> str:
        return f" that pass the filter {self.config.filter}" if self.config.filter else ""

    def nearest(self, queries: Tensor, wanted: int) -> SearchResult:
        """Ask for the passages that pass the filter."""
        found = self._ask(queries, wanted, exact=self.config.exact)
        short = [row for row, points in enumerate(found) if len(points) < wanted]
        if short:
            # The walk through a graph may end early; comparing with every passage does not.
            for row, points in zip(short, self._ask(queries[short], wanted, exact=True), strict=True):
                found[row] = points
        try:
            positions = [[self._position_of[id] for id, _ in points] for points in found]
            scores = [[score for _, score in points] for points in found]
            return torch.tensor(scores).view(-1, wanted), torch.tensor(positions).view(-1, wanted)
        except (KeyError, ValueError, RuntimeError) as error:
            raise self._changed_meanwhile() from error

    def embeddings_at(self, positions: Tensor) -> Tensor:
        """Return embeddings for a tensor of positions of any shape; the result has one dimension more."""
        if not positions.numel():
            return torch.zeros(*positions.shape, self.dimension, device=self.device)
        unique, rows = positions.cpu().unique(return_inverse=True)
        ids = [point_id(self._passages.nodes[position].id) for position in unique.tolist()]
        with qdrant_errors(self._place):
            try:
                vectors = read_vectors(self._client, self.config.collection, ids)
            except KeyError as error:
                raise self._changed_meanwhile() from error
        return vectors[rows].to(self.device)

    def build_report(self) -> dict[str, Any]:
        """Return the name of the collection."""
        return {"collection": self.config.collection}

    def save(self, directory: Path) -> None:
        """Write the passages that pass the filter into an embedded Qdrant, whose folder replaces the old."""
        with replace_directory_atomically(directory) as target:
            client = QdrantClient(path=str(target))
            try:
                create_collection(client, self.config.collection, max(self.dimension, 1), self.about(FORMAT))
                copy_store(self, client, self.config.collection, self.config.batch_size)
            finally:
                client.close()
            seal_folder(target)

    @classmethod
    def load(cls, directory: Path, config: Any = None, *, device: torch.device | str = "cpu") -> Self:
        """Read a store that `save` wrote; its folder stays locked against other processes as long as it is in use."""
        client = open_folder(directory, version_of_folder(directory))
        config = config or QdrantStoreConfig(path=str(directory))
        if not client.collection_exists(config.collection):
            names = ", ".join(collection.name for collection in client.get_collections().collections)
            raise KnowledgeStoreError(
                f"'{directory}' has no collection '{config.collection}', but {names}.",
                "Set rag_system.knowledge_store.collection.",
            )
        return cls(config, device, client)

    @property
    def is_kept_elsewhere(self) -> bool:
        """Whether the server holds the store just as it is."""
        return self.config.url is not None and not self._is_own

    def require_own_place(self, config: QdrantStoreConfig) -> None:
        """Refuse a server's collection that fedrag did not write."""
        if config.url is not None:
            _published_collection(connect(config), config)

    def publish(self, source: KnowledgeStore, config: QdrantStoreConfig) -> KnowledgeStore:
        """Write a store into a new collection, and let the configured name point to it when it is complete.

        Whoever searches sees the old passages or the new ones, never half; the old collection is removed afterwards.
        """
        if config.url is None:
            return super().publish(source, config)
        server, name = connect(config), f"{config.collection}-{uuid.uuid4().hex[:8]}"
        old = _published_collection(server, config)
        with qdrant_errors(config.url):
            try:
                create_collection(server, name, source.dimension, source.about(FORMAT))
                create_filter_indexes(server, name, config.filter)
                copy_store(source, server, name, config.batch_size)
                _point_to(server, config.collection, name, replaces=old is not None)
            except BaseException:
                # The first error is the one to report.
                with contextlib.suppress(Exception):
                    server.delete_collection(name)
                raise
            if old is not None:
                server.delete_collection(old)
        return QdrantKnowledgeStore(config, client=server)

    def refresh_place(self, config: QdrantStoreConfig) -> None:
        """Let the server find what passes a filter with which the collection was not published."""
        if config.url is None or not config.filter:
            return
        server = connect(config)
        name = _published_collection(server, config)
        with qdrant_errors(config.url):
            if name is not None:
                known = server.get_collection(name).payload_schema or {}
                missing = {key: value for key, value in config.filter.items() if payload_key(key) not in known}
                create_filter_indexes(server, name, missing)

    @property
    def _place(self) -> str:
        return self.config.url or self.config.path or "memory"

    def _open_collection(self) -> None:
        name = self.config.collection
        with qdrant_errors(self._place):
            described = self._client.get_collection(name).config
            about: dict[str, Any] = described.metadata or {}
            vectors = described.params.vectors
            size = getattr(vectors, "size", None)
            if about.get("format") != FORMAT or size is None:
                raise KnowledgeStoreError(
                    f"The collection '{name}' at {self._place} was not written by fedrag, or by a server before 1.16, "
                    "which keeps no metadata.",
                    "Set rag_system.knowledge_store.collection to another name, and run 'fedrag index CONFIG'.",
                )
            count = self._client.count(name).count
            if count != about["passages"]:
                raise KnowledgeStoreError(
                    f"The collection '{name}' at {self._place} has {count} passages in the place of "
                    f"{about['passages']}.",
                    "Build it anew with 'fedrag index CONFIG --rebuild'.",
                )
            self._set_passages(*read_passages(self._client, name, self._filter))
        self._dimension = int(size) if count else 0
        self.take_about(about)

    def _ask(self, queries: Tensor, wanted: int, *, exact: bool) -> list[list[tuple[str, float]]]:
        """Return ids and scores of the best points of each query, up to `wanted` of each."""
        options: dict[str, Any] = {"limit": wanted, "filter": self._filter, "params": models.SearchParams(exact=exact)}
        found: list[list[tuple[str, float]]] = []
        with qdrant_errors(self._place):
            for batch in queries.split(self.config.batch_size):
                requests = [models.QueryRequest(query=query.tolist(), **options) for query in batch]
                for answer in self._client.query_batch_points(self.config.collection, requests):
                    found.append([(str(point.id), float(point.score)) for point in answer.points])
        return found

    def _changed_meanwhile(self) -> KnowledgeStoreError:
        return KnowledgeStoreError(
            f"The collection '{self.config.collection}' at {self._place} has changed since it was opened.",
            "Run the command again.",
        )

    def _take_over(self) -> None:
        """Go on in memory with a copy of what a server or a folder holds."""
        if self._is_own:
            return
        embeddings = self.embeddings
        self._client, self._is_own, self._dimension = in_memory(), True, 0
        if len(self):
            self._start_collection(embeddings.shape[1])
            self._write(self._passages.nodes, embeddings, self._places)

    def _start_collection(self, dimension: int) -> None:
        self._client.delete_collection(self.config.collection)
        create_collection(self._client, self.config.collection, dimension, {})
        self._dimension = dimension

    def _write(self, nodes: Sequence[KnowledgeNode], embeddings: Tensor, places: Sequence[int]) -> None:
        vectors = embeddings.detach().to("cpu", torch.float32)
        write_points(self._client, self.config.collection, nodes, vectors, places, self.config.batch_size)

    def _set_passages(self, nodes: list[KnowledgeNode], places: list[int]) -> None:
        self._passages, self._places = Passages(nodes), places
        self._end = places[-1] + 1 if places else 0
        self._position_of: dict[str, int] = {}
        self._number(0)

    def _number(self, start: int) -> None:
        for position in range(start, len(self._passages)):
            self._position_of[point_id(self._passages.nodes[position].id)] = position


def _published_collection(server: QdrantClient, config: QdrantStoreConfig) -> str | None:
    """Return the collection that the configured name points to; None where nothing has this name yet.

    Raises:
        ConnectionFailedError: The server cannot be reached, or refuses the key.
        KnowledgeStoreError: The name belongs to a collection that fedrag did not write.
    """
    with qdrant_errors(config.url or ""):
        aliases = server.get_aliases().aliases
        old = next((entry.collection_name for entry in aliases if entry.alias_name == config.collection), None)
        if old is None and server.collection_exists(config.collection):
            raise KnowledgeStoreError(
                f"'{config.collection}' is a collection of its own, which fedrag did not write and leaves alone.",
                "Set rag_system.knowledge_store.collection to another name.",
            )
    return old


def _point_to(server: QdrantClient, alias: str, name: str, *, replaces: bool) -> None:
    create = models.CreateAliasOperation(create_alias=models.CreateAlias(collection_name=name, alias_name=alias))
    delete = models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=alias))
    server.update_collection_aliases([delete, create] if replaces else [create])
