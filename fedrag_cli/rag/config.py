"""Config dataclasses of retriever, generator and knowledge store, and their registration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from fedrag_cli.config.fields import (
    CollectionName,
    HttpUrlStr,
    ModelStr,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PathStr,
    PositiveInt,
    SecretStr,
    config_class,
)
from fedrag_cli.registry import Registry

DType = Literal["auto", "float32", "bfloat16", "float16"]


@config_class
class SentenceTransformerConfig:
    """A bi-encoder of sentence-transformers: one shared encoder, or one each for queries and passages."""

    type: Literal["sentence_transformer"] = "sentence_transformer"
    """Names this retriever."""
    model: ModelStr | None = None
    """The shared encoder: hub id, directory, or package://name/path. A saved `retriever/` of a run fits here."""
    query_model: ModelStr | None = None
    """Encoder of queries, where it is another than that of passages."""
    passage_model: ModelStr | None = None
    """Encoder of passages, where it is another than that of queries."""
    revision: str | None = None
    """Branch, tag or commit of hub models."""
    trust_remote_code: bool = False
    """Runs Python code that comes with the model (`auto_map`, modules of its own), with all your rights; without it a
    model that needs such code is refused."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """Score of a query and a passage."""
    query_prompt: str | None = None
    """Text put before each query (for instance `query: ` for E5); by default what the model itself declares for
    queries, if anything. An empty text switches that off."""
    passage_prompt: str | None = None
    """Text put before each passage; by default what the model itself declares for documents, if anything."""
    max_length: PositiveInt | None = None
    """Most tokens of a text; the model's own limit by default."""
    batch_size: PositiveInt = 64
    """Texts encoded at once."""
    dtype: DType = "auto"
    """Number format of the weights; auto keeps float32."""

    def tuned_in(self, directory: Path) -> SentenceTransformerConfig:
        """Return the config of what the retriever has saved in a directory."""
        return dataclasses.replace(self, model=str(directory), query_model=None, passage_model=None, revision=None)


@config_class
class CausalLMConfig:
    """A causal language model of transformers."""

    type: Literal["causal_lm"] = "causal_lm"
    """Names this generator."""
    model: ModelStr
    """Hub id, directory, GGUF file, or package://name/path."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Runs Python code that comes with the model (`auto_map`, modules of its own), with all your rights; without it a
    model that needs such code is refused."""
    adapter: PathStr | None = None
    """Directory of a saved LoRA adapter that is put on the model."""
    context_window: PositiveInt | None = None
    """Most tokens of prompt and answer; the model's own limit by default."""
    max_new_tokens: PositiveInt = 32
    """Most tokens of an answer."""
    temperature: NonNegativeFloat = 0.0
    """0 takes the likeliest token each time; above 0 samples among the 50 likeliest, with the run's seed."""
    batch_tokens: PositiveInt = 4096
    """Tokens, padding included, that are scored or generated at once."""
    dtype: DType = "auto"
    """Number format of the weights; auto takes bfloat16 on cuda where it is supported, and float32 elsewhere."""
    precision: Literal["weights", "bfloat16", "fast"] = "weights"
    """bfloat16 computes matrix products in bfloat16 (autocast); fast does so where the device has it in hardware, where
    it is several times faster, and keeps the weights' own format elsewhere, where it would be many times slower."""
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    """Spread a model that is too large for one GPU over all that the process sees: balanced fills them evenly, as auto
    does, sequential one after the other. On a machine without GPU the model is on the CPU as a whole."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Load the weights in fewer bits (extra `quantization`): 8bit is LLM.int8(), 4bit the NF4 of QLoRA with double
    quantization. Training the generator then needs lora. Slow on a CPU; not for GGUF files."""

    def tuned_in(self, directory: Path) -> CausalLMConfig:
        """Return the config of what the generator has saved in a directory: a model, or an adapter of this one."""
        if (directory / "adapter_config.json").is_file():
            return dataclasses.replace(self, adapter=str(directory))
        return dataclasses.replace(self, model=str(directory), adapter=None, revision=None)


@config_class
class MemoryStoreConfig:
    """Exact search over embeddings held in memory, or left on disk."""

    type: Literal["memory"] = "memory"
    """Names this store."""
    path: PathStr | None = None
    """Folder of the saved store (`fedrag index` writes it); without it the store is built anew each time."""
    memory_map: bool = False
    """Leaves the saved embeddings and passages on disk, where a search reads all embeddings block by block; a change
    takes them into memory."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Number format of the saved and searched embeddings. The last two round them to half the space; scores are
    computed in float32 all the same, and `fedrag index` reports what the rounding loses where it rounds all of them."""


@config_class
class FaissStoreConfig:
    """Search by FAISS (extra `faiss`): exact, or approximate and much faster over millions of passages."""

    type: Literal["faiss"] = "faiss"
    """Names this store."""
    path: PathStr | None = None
    """Folder of the saved store (`fedrag index` writes it); without it the store is built anew each time."""
    index: Literal["flat", "ivf", "hnsw"] = "flat"
    """flat is exact; ivf looks into the nearest of nlist clusters; hnsw walks a graph of neighbours."""
    nlist: PositiveInt | None = None
    """Clusters of ivf; 4 times the root of the passages by default. At most one for every 39 passages are made."""
    nprobe: PositiveInt | None = None
    """Clusters that ivf looks into for each query, 16 by default; more find more and take longer."""
    m: PositiveInt | None = None
    """Neighbours of a passage in the graph of hnsw, 32 by default."""
    ef_construction: PositiveInt | None = None
    """Candidates that hnsw weighs for each passage's neighbours while it builds, 200 by default."""
    ef_search: PositiveInt | None = None
    """Candidates that hnsw keeps for each query, 128 by default and never below top_k."""
    seed: NonNegativeInt = 0
    """Seed of the clusters of ivf."""
    memory_map: bool = False
    """Leaves the saved embeddings on disk and reads what a search touches; a change takes them into memory."""


@config_class
class QdrantStoreConfig:
    """Search by Qdrant (extra `qdrant`): a server or cluster at `url`, or embedded in the process."""

    type: Literal["qdrant"] = "qdrant"
    """Names this store."""
    path: PathStr | None = None
    """Folder of the embedded store, for one process at a time and some 20,000 passages. Open only folders that you
    trust: Qdrant keeps points there as Python pickles."""
    url: HttpUrlStr | None = None
    """Address of a server, such as http://localhost:6333. Without url and path the store is built anew each time."""
    api_key: SecretStr | None = None
    """Key of the server, always as a reference: ${oc.env:QDRANT_API_KEY}. Only the reference is written to runs."""
    collection: CollectionName = "fedrag"
    """Name of the collection; on a server it is an alias that points to the newest one built."""
    filter: dict[NonEmptyStr, str | bool | int] = dataclasses.field(default_factory=dict)
    """Restricts the store to passages whose metadata have these values, for instance {owner: clinic}."""
    exact: bool = False
    """Compares each query with every passage instead of walking the server's graph; the embedded store always does."""
    batch_size: PositiveInt = 256
    """Passages sent to the server, or questions asked, at once."""
    timeout: PositiveInt = 60
    """Seconds to wait for an answer of the server."""


def register(registry: Registry) -> None:
    """Register retriever, generator and knowledge store."""
    registry.register(
        "retriever",
        "sentence_transformer",
        SentenceTransformerConfig,
        "fedrag_cli.rag.retrievers.sentence_transformer:SentenceTransformerRetriever.from_config",
        "bi-encoder of sentence-transformers",
    )
    registry.register(
        "generator",
        "causal_lm",
        CausalLMConfig,
        "fedrag_cli.rag.generators.causal_lm:CausalLMGenerator.from_config",
        "causal language model of transformers",
    )
    registry.register(
        "knowledge_store",
        "memory",
        MemoryStoreConfig,
        "fedrag_cli.rag.knowledge_stores.memory:InMemoryKnowledgeStore.from_config",
        "exact search on torch, in memory or from disk",
    )
    registry.register(
        "knowledge_store",
        "faiss",
        FaissStoreConfig,
        "fedrag_cli.rag.knowledge_stores.faiss_store:FaissKnowledgeStore.from_config",
        "exact or approximate search by FAISS, saved and memory-mapped",
    )
    registry.register(
        "knowledge_store",
        "qdrant",
        QdrantStoreConfig,
        "fedrag_cli.rag.knowledge_stores.qdrant_store:QdrantKnowledgeStore.from_config",
        "search by a Qdrant server, or by Qdrant embedded in the process",
    )
