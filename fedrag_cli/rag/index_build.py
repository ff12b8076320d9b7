"""Building the knowledge store on disk or on a server, from what it holds already and what has to be encoded."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrag_cli.config import Config
from fedrag_cli.data.corpora import load_corpus
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import RunInterruptedError
from fedrag_cli.rag.build import corpus_fingerprint, load_retriever
from fedrag_cli.rag.config import KnowledgeStoreConfig
from fedrag_cli.rag.hybrid import refresh_lexical_index, require_own_lexical_folder
from fedrag_cli.rag.index_convert import PreviousStore, open_previous, require_place, store_report, write_store
from fedrag_cli.rag.index_resume import PartialIndex, partial_index
from fedrag_cli.rag.knowledge_stores.base import KnowledgeStore
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore
from fedrag_cli.rag.retrievers.base import Retriever
from fedrag_cli.runs.interrupt import terminable
from fedrag_cli.runs.reporter import Reporter


@dataclass(frozen=True)
class Changes:
    """How a corpus differs from the passages of an old store."""

    reused: dict[int, int]
    """The positions of embeddings in the old store that stay right, by the rows of their passages."""
    encoded: list[int]
    """The rows of the passages that have to be encoded, ascending."""
    removed: int
    """How many of the old store's passages the corpus no longer has."""
    only_appends: bool
    """Whether the corpus is the old store's passages with others behind them."""


def find_changes(old: Sequence[KnowledgeNode], nodes: Sequence[KnowledgeNode], *, reusable: bool) -> Changes:
    """Compare a corpus with the passages of an old store, whose embeddings may be those that the encoder would compute.

    An embedding depends on a passage's text alone, so that one that only has another id or other metadata keeps it.
    """
    position_of_id = {node.id: position for position, node in enumerate(old)}
    position_of_text = {node.text: position for position, node in enumerate(old)} if reusable else {}
    reused: dict[int, int] = {}
    encoded = []
    for row, node in enumerate(nodes):
        position = position_of_id.get(node.id)
        # The passage's own embedding first: that of the same text elsewhere may differ in its last bits.
        if position is None or old[position].text != node.text:
            position = position_of_text.get(node.text)
        if reusable and position is not None:
            reused[row] = position
        else:
            encoded.append(row)
    removed = len(position_of_id.keys() - {node.id for node in nodes})
    return Changes(reused, encoded, removed, reusable and list(nodes[: len(old)]) == list(old))


def build_index(config: Config, reporter: Reporter, *, rebuild: bool = False) -> dict[str, Any]:
    """Bring the store at the place that `rag_system.knowledge_store` names up to date with corpus and encoder.

    Only passages are encoded whose text the store there does not hold with an embedding of the same encoder. A call
    that was killed or interrupted goes on where it was.

    Args:
        config: Names corpus, encoder and store.
        reporter: Told what is being done and why, and shown how far the encoding is.
        rebuild: Whether to encode everything anew, whatever the old store holds; what goes on with a rebuild is one.

    Returns:
        Where the store is, its numbers of passages (all; encoded now; encoded by an interrupted call before; kept with
        their embeddings; removed; cut to the encoder's limit), the share of all tokens that this cuts off, whether the
        old store was of another encoder, its fingerprints, what its kind reports (such as recall@10), and the time.

    Raises:
        ConfigError: The config names no place, or a folder that holds anything else than a store.
        ConnectionFailedError: The server cannot be reached; nothing was encoded.
        KnowledgeStoreError: The old store is damaged and not to be rebuilt, or another process is building it.
        RunInterruptedError: Ctrl-C or SIGTERM came while passages were being encoded.
    """
    settings = config.rag_system.knowledge_store
    require_place(settings)
    require_own_lexical_folder(config)
    path, place = _partial_folder(config)
    with terminable(), partial_index(path, place, reporter) as partial:
        # Before anything is encoded, because a server may be out of reach, and a store damaged.
        previous = open_previous(settings, reporter, rebuild=rebuild or partial.is_rebuild)
        nodes = load_corpus(config.dataset.corpus)
        started = time.monotonic()
        retriever = load_retriever(config, reporter)
        encoder = retriever.fingerprint()
        previous_encoder = previous.store.encoder_fingerprint if previous is not None else None
        partial.begin(encoder, reporter, rebuild=rebuild)
        if partial.is_rebuild and not rebuild:
            reporter.note(f"Going on with the rebuild that was interrupted; removing {path} would keep the old store.")
        changes = find_changes(
            previous.nodes if previous is not None else [],
            nodes,
            reusable=not partial.is_rebuild and _is_reusable(previous, settings, encoder, reporter),
        )
        with _with_resume_hint([nodes[row] for row in changes.encoded], partial, path):
            missing = [nodes[row] for row in changes.encoded if nodes[row] not in partial]
            _encode(retriever, missing, partial, reporter)
            update = _Update(nodes, changes, previous, partial, retriever.dimension, encoder)
            written, source = update.write(settings)
        lexical = refresh_lexical_index(config, nodes, reporter, rebuild=partial.is_rebuild)
    lengths = retriever.measure([node.text for node in nodes], "passages", queries=False)
    if lengths.truncated:
        reporter.note(lengths.message)
    report = store_report(
        written,
        source,
        settings,
        started,
        encoded=len(missing),
        resumed=len(changes.encoded) - len(missing),
        kept=len(changes.reused),
        removed=changes.removed,
        truncated=lengths.truncated,
        truncated_share=round(lengths.share, 4),
        encoder_changed=previous is not None and previous_encoder != encoder,
    )
    return report if lexical is None else {**report, "lexical": lexical}


def _is_reusable(
    previous: PreviousStore | None, wanted: KnowledgeStoreConfig, encoder: str, reporter: Reporter
) -> bool:
    """Return whether the old embeddings are those that the encoder gives, and say why where they are not."""
    if previous is None:
        return False
    if previous.store.encoder_fingerprint != encoder:
        reporter.note("The old knowledge store is of another encoder, so all passages are encoded anew.")
        return False
    if previous.number_format not in ("float32", wanted.number_format):
        reporter.note(
            f"The old knowledge store is rounded to {previous.number_format}, so all passages are encoded anew."
        )
        return False
    rounded_to = previous.store.rounded_to
    if rounded_to not in (None, wanted.number_format):
        reporter.note(
            f"The old embeddings were rounded to {rounded_to} before they were moved there, and stay so; "
            "--rebuild encodes them with all digits."
        )
    return True


@contextmanager
def _with_resume_hint(nodes: Sequence[KnowledgeNode], partial: PartialIndex, path: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        done = sum(node in partial for node in nodes)
        if not done:
            raise
        raise RunInterruptedError(
            f"Interrupted; {done} of {len(nodes)} passages are encoded and kept in {path}.",
            "The same command goes on from there.",
        ) from error


def _encode(retriever: Retriever, nodes: Sequence[KnowledgeNode], partial: PartialIndex, reporter: Reporter) -> None:
    if not nodes:
        return
    if len(partial):
        reporter.note(f"Going on where an unfinished index was: {len(partial)} passages are encoded.")
    with reporter.task("Encoding passages", len(nodes), "passage") as advance:
        for positions, embeddings in retriever.passage_batches([node.text for node in nodes]):
            partial.append([nodes[position] for position in positions], embeddings.cpu())
            advance(len(positions))


@dataclass(frozen=True)
class _Update:
    """A corpus, all of whose passages are encoded, in an old store or by now."""

    nodes: Sequence[KnowledgeNode]
    changes: Changes
    previous: PreviousStore | None
    partial: PartialIndex
    dimension: int
    encoder: str

    def write(self, settings: KnowledgeStoreConfig) -> tuple[KnowledgeStore, KnowledgeStore]:
        """Write the store in the quickest way that gives the corpus's order; return it and what it was made of."""
        corpus, changes = corpus_fingerprint(self.nodes), self.changes
        store = self.previous.store if self.previous is not None and changes.reused else None
        if store is not None and self.previous is not None and self.previous.is_as_wanted:
            if store.corpus_fingerprint == corpus and not changes.encoded:
                store.refresh_place(settings)
                return store, store
            # A store that builds its index anew at any other change had better do so once than twice.
            if settings.folder is not None and changes.only_appends:
                fresh = range(len(store), len(self.nodes))
                store.add(self.nodes[len(store) :], self._embeddings(fresh))
                store.corpus_fingerprint = corpus
                store.save(settings.folder)
                return store, store
        source = InMemoryKnowledgeStore()
        source.add(self.nodes, self._embeddings(range(len(self.nodes))))
        source.encoder_fingerprint, source.corpus_fingerprint = self.encoder, corpus
        # What is rounded already stays so, and must not pass for the full digits when the loss by rounding is measured.
        source.rounded_to = store.rounded_to if store is not None else None
        return write_store(source, settings), source

    def _embeddings(self, rows: Sequence[int]) -> Tensor:
        embeddings = torch.empty(len(rows), self.dimension)
        kept = {slot: self.changes.reused[row] for slot, row in enumerate(rows) if row in self.changes.reused}
        if kept and self.previous is not None:
            embeddings[list(kept)] = self.previous.store.embeddings_at(torch.tensor(list(kept.values()))).cpu()
        fresh = {slot: self.nodes[row] for slot, row in enumerate(rows) if slot not in kept}
        self.partial.copy_embeddings(fresh, embeddings)
        return embeddings


def _partial_folder(config: Config) -> tuple[Path, Path]:
    """Return the folder of what is encoded before the store is whole, and the place that errors of writing name."""
    settings = config.rag_system.knowledge_store
    if settings.folder is not None:
        return settings.folder.with_name(f".{settings.folder.name}.partial"), settings.folder
    # A server has no folder here.
    output = Path(config.run.output_dir)
    name = hashlib.blake2b(str(settings.place).encode(), digest_size=4).hexdigest()
    return output / f".index-{name}.partial", output
