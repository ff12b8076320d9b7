"""Lexical retrieval: BM25 over the words of passages, by bm25s.

Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009), in Lucene's variant
(Kamphuis et al., "Which BM25 Do You Mean?", ECIR 2020), whose idf is never negative.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import regex
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.splitting import WITHOUT_BLANKS, ZERO_WIDTH_SPACE
from fedrag_cli.errors import ConfigError, KnowledgeStoreError
from fedrag_cli.rag.config import LEXICAL_FILE, BM25Config
from fedrag_cli.runs.files import replace_directory_atomically

_VERSION = 1
_RUN = regex.compile(
    rf"(?P<unspaced>(?:(?={WITHOUT_BLANKS})\X{ZERO_WIDTH_SPACE}?)+)|(?:(?!{WITHOUT_BLANKS})[\w\p{{M}}])+", regex.V1
)
_CHARACTER = regex.compile(r"\X")


class Tokenizer:
    """Splits texts into the words that BM25 counts.

    Words are runs of letters, digits and marks, compared without case and in Unicode's compatibility form. Scripts
    without blanks between words (Chinese, Japanese, Thai, ...) are split into overlapping pairs of characters, which
    needs no dictionary; inflected languages need `stemming`.

    Args:
        settings: Language, stemming and stop words.

    Raises:
        ConfigError: The language has no stemmer or no list of stop words, or PyStemmer is not installed.
    """

    def __init__(self, settings: BM25Config) -> None:
        """Look stemmer and stop words up."""
        self._stem = _stemmer(settings.language) if settings.stemming else None
        self._stop_words = _stop_words(settings.language) if settings.stop_words else frozenset()

    def __call__(self, text: str) -> list[str]:
        """Return the words of a text, in their order."""
        words: list[str] = []
        for match in _RUN.finditer(unicodedata.normalize("NFKC", text).casefold()):
            if match["unspaced"] is None:
                words.append(match[0])
                continue
            characters = _CHARACTER.findall(match[0].replace(ZERO_WIDTH_SPACE, ""))
            pairs = [first + second for first, second in itertools.pairwise(characters)]
            words += pairs or characters
        if self._stop_words:
            words = [word for word in words if word not in self._stop_words]
        return self._stem(words) if self._stem is not None else words


class LexicalIndex:
    """BM25 scores of all passages, by the positions that they have in the knowledge store.

    Args:
        settings: How texts are split, and the parameters of BM25.
        index: The scores by word, as bm25s holds them.
        count: Number of passages.
        fingerprint: That of the passages' texts.
    """

    def __init__(self, settings: BM25Config, index: bm25s.BM25, count: int, fingerprint: str) -> None:
        """Keep the parts; `build` and `load` make them."""
        self.settings = settings
        self.fingerprint = fingerprint
        self._count = count
        self._index = index
        self._tokenize = Tokenizer(settings)

    def __len__(self) -> int:
        """Return the number of passages."""
        return self._count

    @property
    def _vocabulary(self) -> dict[str, int]:
        """The numbers of the words; bm25s has none where no passage has a word."""
        return getattr(self._index, "vocab_dict", {})

    @classmethod
    def from_config(
        cls,
        settings: BM25Config,
        nodes: Sequence[KnowledgeNode],
        folder: Path | None,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> LexicalIndex:
        """Open the index that is saved in a folder, or build it where there is none.

        Args:
            settings: How texts are split, and the parameters of BM25.
            nodes: The passages, in the order of their positions.
            folder: Where the index may be; None where it is kept nowhere. It stays on disk, memory-mapped.
            progress: Called with the number of passages that were split.

        Raises:
            KnowledgeStoreError: It is damaged, of other passages, or was built with other settings.
        """
        if folder is None or not folder.exists():
            return cls.build(nodes, settings, progress)
        index = cls.load(folder, settings, memory_map=True)
        if index.fingerprint != texts_fingerprint(nodes, settings):
            raise KnowledgeStoreError(
                f"The lexical index in '{folder}' is of other passages than the knowledge store.",
                "Refresh it with 'fedrag index CONFIG'.",
            )
        return index

    @classmethod
    def build(
        cls,
        nodes: Sequence[KnowledgeNode],
        settings: BM25Config,
        progress: Callable[[int], None] | None = None,
    ) -> LexicalIndex:
        """Count the words of passages.

        Args:
            nodes: The passages, in the order of their positions.
            settings: How texts are split, and the parameters of BM25.
            progress: Called with the number of passages that were split.
        """
        tokenize = Tokenizer(settings)
        vocabulary: dict[str, int] = {}
        passages: list[list[int]] = []
        for node in nodes:
            words = tokenize(node.text)
            for name, weight in settings.fields.items():
                words += tokenize(_field(node, name)) * weight
            passages.append([vocabulary.setdefault(word, len(vocabulary)) for word in words])
            if progress is not None:
                progress(1)
        index = bm25s.BM25(k1=settings.k1, b=settings.b, method="lucene")
        if vocabulary:
            index.index((passages, vocabulary), create_empty_token=False, show_progress=False)
        return cls(settings, index, len(nodes), texts_fingerprint(nodes, settings))

    def scores(self, query: str) -> NDArray[np.float32]:
        """Return the score of every passage, of shape (passages,); 0 where no word of the query is in it."""
        vocabulary = self._vocabulary
        known = [vocabulary[word] for word in self._tokenize(query) if word in vocabulary]
        if not known:
            return np.zeros(self._count, dtype=np.float32)
        found: NDArray[np.float32] = self._index.get_scores_from_ids(known)
        return found

    def search(self, queries: Iterable[str], top_k: int) -> tuple[Tensor, Tensor]:
        """Find the best passages of each query.

        Args:
            queries: The questions.
            top_k: How many, from 1 to the number of passages.

        Returns:
            Scores and positions, both of shape (queries, top_k), best first; equal scores by position.
        """
        rows = [self._best(self.scores(query), top_k) for query in queries]
        positions = np.stack([row for _, row in rows]) if rows else np.empty((0, top_k), dtype=np.int64)
        scores = np.stack([row for row, _ in rows]) if rows else np.empty((0, top_k), dtype=np.float32)
        return torch.from_numpy(scores), torch.from_numpy(positions)

    def scores_at(self, queries: Sequence[str], positions: Tensor) -> Tensor:
        """Return the scores of chosen passages; `positions` and the result have the shape (queries, passages)."""
        rows = [self.scores(query)[row] for query, row in zip(queries, positions.cpu().numpy(), strict=True)]
        return torch.from_numpy(np.stack(rows)) if rows else torch.empty(positions.shape)

    @staticmethod
    def _best(scores: NDArray[np.float32], top_k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        # Everything that reaches the last score is ordered, so that equal ones are taken by position.
        least = np.partition(scores, len(scores) - top_k)[len(scores) - top_k]
        candidates = np.flatnonzero(scores >= least) if least > 0 else _reaching_zero(scores, top_k)
        order = candidates[np.lexsort((candidates, -scores[candidates]))][:top_k]
        return scores[order], order

    def save(self, directory: Path) -> None:
        """Write the index into a folder of its own; a kill leaves the old one or the new one, never half."""
        with replace_directory_atomically(directory) as target:
            if self._vocabulary:
                self._index.save(target, show_progress=False)
            stamp = {
                "version": _VERSION,
                "passages": self._count,
                "words": len(self._vocabulary),
                "fingerprint": self.fingerprint,
                "settings": settings_stamp(self.settings),
            }
            (target / LEXICAL_FILE).write_text(json.dumps(stamp, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, settings: BM25Config, *, memory_map: bool = False) -> LexicalIndex:
        """Open a saved index.

        Args:
            directory: Its folder.
            settings: What the config wants; an index of other settings is refused.
            memory_map: Leave the scores on disk.

        Raises:
            KnowledgeStoreError: It is damaged, or was built with other settings.
        """
        try:
            stamp = json.loads((directory / LEXICAL_FILE).read_text(encoding="utf-8"))
            wanted, built = settings_stamp(settings), stamp["settings"]
            if stamp["version"] != _VERSION or built != wanted:
                changed = ", ".join(name for name in wanted if built.get(name) != wanted[name]) or "its version"
                raise KnowledgeStoreError(
                    f"The lexical index in '{directory}' was built with other settings ({changed}).",
                    "Build it anew with 'fedrag index CONFIG', or put the settings back; a run's own has only those.",
                )
            index = bm25s.BM25(k1=settings.k1, b=settings.b, method="lucene")
            if stamp["words"]:
                index = bm25s.BM25.load(directory, mmap=memory_map, show_progress=False)
            return cls(settings, index, int(stamp["passages"]), str(stamp["fingerprint"]))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError) as error:
            raise KnowledgeStoreError(
                f"The lexical index in '{directory}' is damaged: {error}", "Build it anew with 'fedrag index CONFIG'."
            ) from error


def settings_stamp(settings: BM25Config) -> dict[str, Any]:
    """Return what of the settings an index depends on, as JSON has it."""
    names = ("language", "stemming", "stop_words", "k1", "b")
    return {name: getattr(settings, name) for name in names} | {"fields": dict(settings.fields)}


def texts_fingerprint(nodes: Sequence[KnowledgeNode], settings: BM25Config) -> str:
    """Return a hash of 16 hexadecimal digits over what BM25 reads of passages, in their order."""
    digest = hashlib.blake2b(digest_size=8)
    for node in nodes:
        digest.update(json.dumps([node.text, *(_field(node, name) for name in settings.fields)]).encode())
    return digest.hexdigest()


def _field(node: KnowledgeNode, name: str) -> str:
    value = node.metadata.get(name)
    return "" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _reaching_zero(scores: NDArray[np.float32], top_k: int) -> NDArray[np.int64]:
    """Return the passages with a score, and the first of the others, so that there are `top_k`."""
    found = np.flatnonzero(scores > 0)
    others = np.flatnonzero(scores <= 0)[: max(top_k - len(found), 0)]
    return np.concatenate([found, others])


def _stemmer(language: str | None) -> Callable[[list[str]], list[str]]:
    try:
        import Stemmer
    except ImportError as error:
        raise ConfigError(
            "Stemming needs PyStemmer, which is not installed.", "Run: pip install 'fedrag-cli[stemming]'"
        ) from error
    known = Stemmer.algorithms()
    if language not in known:
        raise ConfigError(f"There is no stemmer for '{language}'.", f"Languages: {', '.join(known)}.")
    stem: Callable[[list[str]], list[str]] = Stemmer.Stemmer(language).stemWords
    return stem


def _stop_words(language: str | None) -> frozenset[str]:
    from bm25s import stopwords

    prefix = "STOPWORDS_"
    lists = {name.removeprefix(prefix).lower(): words for name, words in vars(stopwords).items() if prefix in name}
    lists["english"] = lists["en"]
    if language not in lists:
        known = ", ".join(sorted(name for name in lists if not name.startswith("en_") and name != "en"))
        raise ConfigError(f"There is no list of stop words for '{language}'.", f"Languages: {known}.")
    return frozenset(lists[language])
