"""Config dataclasses of retriever, generator and knowledge store, and their registration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from fedrag_cli.config.fields import (
    CollectionName,
    FolderStr,
    Fraction,
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
from fedrag_cli.config.problems import Finding, KeyPath
from fedrag_cli.registry import Registry

if TYPE_CHECKING:
    from fedrag_cli.config.schema import Config

DType = Literal["auto", "float32", "bfloat16", "float16"]

NODES_FILE = "nodes.jsonl"
EMBEDDINGS_FILE = "embeddings.safetensors"
INDEX_FILE = "index.faiss"
STORE_FILE = "store.json"
LEXICAL_FILE = "lexical.json"
# What the client of Qdrant writes into its folder, by its own names.
QDRANT_META_FILE, QDRANT_LOCK_FILE, QDRANT_COLLECTIONS = "meta.json", ".lock", "collection"
# Earlier versions appended the changes of a store in memory to it.
OLD_CHANGES_FILE = "changes.jsonl"


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

    def check(self, config: Config, path: KeyPath) -> Iterator[Finding]:
        """Yield which models are missing or named twice."""
        separate = (self.query_model, self.passage_model)
        if self.model is None and None in separate:
            yield path, "needs 'model', or both 'query_model' and 'passage_model'"
        if self.model is not None and separate != (None, None):
            yield path, "has 'model' beside 'query_model' or 'passage_model'; keep one or the other"

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
    adapter: FolderStr | None = None
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

    def check(self, config: Config, path: KeyPath) -> Iterator[Finding]:
        """Yield what does not go together with the device, the model's format, or tuning all weights."""
        if self.device_map is not None and config.run.device not in ("auto", "cuda"):
            message = f"takes all GPUs, but run.device is {config.run.device}; set that to auto or cuda, or remove it"
            yield (*path, "device_map"), message
        if self.quantization is not None and self.model.endswith(".gguf"):
            message = "is not for GGUF files, which transformers turns into plain weights; remove it"
            yield (*path, "quantization"), message
        lora = ("trainer", "generator", "lora")
        tunes_all_weights = config.trainer.mode != "retriever" and config.trainer.generator.lora is None
        if tunes_all_weights and self.adapter is not None:
            yield lora, "null tunes all weights, but rag_system.generator has an adapter; remove one of the two"
        if tunes_all_weights and self.quantization is not None:
            yield lora, "is needed, because the weights of a quantised generator cannot be tuned themselves"

    def tuned_in(self, directory: Path) -> CausalLMConfig:
        """Return the config of what the generator has saved in a directory: a model, or an adapter of this one."""
        if (directory / "adapter_config.json").is_file():
            return dataclasses.replace(self, adapter=str(directory))
        return dataclasses.replace(self, model=str(directory), adapter=None, revision=None)


@config_class
class BM25Config:
    """BM25 over the words of the passages, beside the dense retriever."""

    type: Literal["bm25"] = "bm25"
    """Names this retriever."""
    language: NonEmptyStr | None = None
    """Language of stemming and stop words, such as english or german."""
    stemming: bool = False
    """Reduce words to their stems (extra `stemming`), which inflected languages need."""
    stop_words: bool = False
    """Leave out the language's commonest words."""
    k1: NonNegativeFloat = 1.5
    """How fast a word that is repeated in a passage loses weight; 0 counts it once."""
    b: Fraction = 0.75
    """How much long passages are discounted, from 0 to 1."""
    fields: dict[NonEmptyStr, PositiveInt] = dataclasses.field(default_factory=dict)
    """Metadata whose words count too, and how often each counts, for instance {title: 2}."""

    def check(self, config: Config, path: KeyPath) -> Iterator[Finding]:
        """Yield what a language is missing for, or given for in vain."""
        if self.language is None and (self.stemming or self.stop_words):
            yield (*path, "language"), "is missing, which stemming and stop_words need"
        if self.language is not None and not (self.stemming or self.stop_words):
            yield (*path, "language"), "has no effect without stemming or stop_words; remove it, or set one of them"


@config_class
class KnowledgeStoreConfig:
    """What every part of fedrag asks of a knowledge store's settings; those of a plug-in inherit it.

    With the answers here a store is kept nowhere, and each command fills it anew. The settings of a store that is saved
    in a folder inherit `FolderStoreConfig` instead; one that a server keeps says where by `place`, and answers
    `unplaced` and `in_folder`. What the store itself has to do is told in `knowledge_stores.base`.
    """

    type: str
    """Names this store."""

    @property
    def place(self) -> str | None:
        """Where the store is kept, in words for people; None where each command fills it anew."""
        return None if self.folder is None else str(self.folder)

    @property
    def folder(self) -> Path | None:
        """The folder that holds the saved store and nothing else, because saving replaces it as a whole."""
        return None

    @property
    def number_format(self) -> str:
        """The number format that the store rounds embeddings to."""
        return "float32"

    @property
    def one_process(self) -> str | None:
        """Words that name what only one process at a time can open; None where several can."""
        return None

    def in_folder(self, folder: Path) -> Self | None:
        """Return the settings of the same store saved in a folder; None where it cannot be."""
        return None

    def unplaced(self) -> Self:
        """Return the settings of a store of this kind that is kept nowhere."""
        return self

    def unfiltered(self) -> Self:
        """Return the settings without what hides some of the passages from searches."""
        return self


@config_class
class FolderStoreConfig(KnowledgeStoreConfig):
    """Settings of a knowledge store that is saved in a folder.

    A plug-in that leaves `save` and `load` of the store as they are needs nothing else.
    """

    own_files: ClassVar[frozenset[str]] = frozenset({NODES_FILE, EMBEDDINGS_FILE})
    """The names that a folder of this kind of store may hold; with any other it is not replaced."""

    path: PathStr | None = None
    """Folder of the saved store (`fedrag index` writes it); without it the store is built anew each time."""

    @property
    def folder(self) -> Path | None:
        """The folder that holds the saved store and nothing else."""
        return None if self.path is None else Path(self.path)

    def in_folder(self, folder: Path) -> Self | None:
        """Return the settings of the same store saved in a folder."""
        return dataclasses.replace(self, path=str(folder))

    def unplaced(self) -> Self:
        """Return the settings of a store of this kind that is kept nowhere."""
        return dataclasses.replace(self, path=None)

    def as_built(self) -> Self | None:
        """Return these settings as what lies in the folder was built with them; None where it is of another kind.

        Where it is damaged, opening it tells that best.
        """
        found = {entry.name for entry in Path(self.path).iterdir()} if self.path is not None else set()
        return self if found and found <= self.own_files else None


EmbeddingFormat = Literal["float32", "float16", "bfloat16"]
_FORMATS: dict[str, EmbeddingFormat] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@config_class
class MemoryStoreConfig(FolderStoreConfig):
    """Exact search over embeddings held in memory, or left on disk."""

    own_files: ClassVar[frozenset[str]] = frozenset({NODES_FILE, EMBEDDINGS_FILE, OLD_CHANGES_FILE})

    type: Literal["memory"] = "memory"
    """Names this store."""
    memory_map: bool = False
    """Leaves the saved embeddings and passages on disk, where a search reads all embeddings block by block; a change
    takes them into memory."""
    dtype: EmbeddingFormat = "float32"
    """Number format of the saved and searched embeddings. The last two round them to half the space; scores are
    computed in float32 all the same, and `fedrag index` reports what the rounding loses where it rounds all of them."""

    def check(self, config: Config, path: KeyPath) -> Iterator[Finding]:
        """Yield what memory_map lacks."""
        yield from _check_memory_map(self, path)

    @property
    def number_format(self) -> str:
        """The number format that the store rounds embeddings to."""
        return self.dtype

    def as_built(self) -> Self | None:
        """Return these settings with the number format of the folder's embeddings."""
        file = Path(self.path or "") / EMBEDDINGS_FILE
        if not file.exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="np") as found:
                format = _FORMATS[found.get_slice("embeddings").get_dtype()]
        except (SafetensorError, OSError, KeyError):
            return self
        return dataclasses.replace(self, dtype=format)


@config_class
class FaissStoreConfig(FolderStoreConfig):
    """Search by FAISS (extra `faiss`): exact, or approximate and much faster over millions of passages."""

    own_files: ClassVar[frozenset[str]] = frozenset({NODES_FILE, INDEX_FILE, STORE_FILE})

    type: Literal["faiss"] = "faiss"
    """Names this store."""
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

    def check(self, config: Config, path: KeyPath) -> Iterator[Finding]:
        """Yield settings of another kind of index, and what memory_map lacks."""
        index_of = {"nlist": "ivf", "nprobe": "ivf", "m": "hnsw", "ef_construction": "hnsw", "ef_search": "hnsw"}
        for name, index in index_of.items():
            if getattr(self, name) is not None and self.index != index:
                yield (*path, name), f"has no effect with index: {self.index}; remove it"
        yield from _check_memory_map(self, path)

    def as_built(self) -> Self | None:
        """Return these settings with those that the folder's index was built with."""
        folder = Path(self.path or "")
        if not (folder / STORE_FILE).exists() or (folder / QDRANT_META_FILE).exists():
            return None
        try:
            built_with = json.loads((folder / STORE_FILE).read_text(encoding="utf-8"))["settings"]
            return dataclasses.replace(self, **built_with)
        except (OSError, ValueError, TypeError, KeyError):
            return self


@config_class
class QdrantStoreConfig(FolderStoreConfig):
    """Search by Qdrant (extra `qdrant`): a server or cluster at `url`, or embedded in the process."""

    own_files: ClassVar[frozenset[str]] = frozenset(
        {QDRANT_COLLECTIONS, QDRANT_META_FILE, QDRANT_LOCK_FILE, STORE_FILE}
    )

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

    def check(self, config: Config, path: KeyPath) -> Iterator[Finding]:
        """Yield settings of a server beside those of a folder."""
        if self.path is not None and self.url is not None:
            yield (*path, "path"), "stands beside url; keep one or the other"
        if self.api_key is not None and self.url is None:
            yield (*path, "api_key"), "has no effect without url; remove it"

    @property
    def place(self) -> str | None:
        """The server and the collection, or the folder of the embedded store."""
        return self.path if self.url is None else f"{self.url}/collections/{self.collection}"

    @property
    def one_process(self) -> str | None:
        """Words that name the folder, which the embedded store locks."""
        return None if self.path is None else f"Qdrant opens the folder '{self.path}'"

    def in_folder(self, folder: Path) -> Self | None:
        """Return the settings of the embedded store saved in a folder."""
        return dataclasses.replace(self, path=str(folder), url=None, api_key=None)

    def unplaced(self) -> Self:
        """Return the settings of an embedded store in memory."""
        return dataclasses.replace(self, path=None, url=None)

    def unfiltered(self) -> Self:
        """Return the settings without the filter."""
        return dataclasses.replace(self, filter={})

    def as_built(self) -> Self | None:
        """Return these settings with the collection that the folder holds."""
        file = Path(self.path or "") / QDRANT_META_FILE
        if not file.exists():
            return None
        try:
            names = list(json.loads(file.read_text(encoding="utf-8"))["collections"])
        except (OSError, ValueError, TypeError, KeyError):
            return self
        return self if self.collection in names or not names else dataclasses.replace(self, collection=names[0])


def _check_memory_map(store: MemoryStoreConfig | FaissStoreConfig, path: KeyPath) -> Iterator[Finding]:
    if store.memory_map and store.path is None:
        yield (*path, "memory_map"), "needs a path, the folder of the saved store"


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
        "lexical",
        "bm25",
        BM25Config,
        "fedrag_cli.rag.lexical:LexicalIndex.from_config",
        "BM25 over the passages' words, fused with the retriever",
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
