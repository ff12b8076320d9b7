"""LM likelihoods of answers given passages, computed once for each pair of an example and the passages of a prompt.

A likelihood cannot change while the language model is frozen, so it is cached by model, prompt, example and passages.
The cache is a file that only grows: a run that was killed goes on with exactly the numbers it had computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import DataError, TrainingError
from fedrag_cli.rag.generators.base import Generator, TokenPair
from fedrag_cli.rag.lengths import TruncationCount
from fedrag_cli.runs.files import append_line, os_errors, whole_lines
from fedrag_cli.runs.reporter import Reporter, SilentReporter

Pair = tuple[Example, Sequence[KnowledgeNode]]


class LikelihoodCache:
    """Log-likelihoods by key, in memory and, where a path is given, in a file of JSON lines.

    Args:
        path: The file; each line holds one scored batch.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Read what the file holds; a line that a kill cut off is dropped."""
        self._values: dict[str, float] = {}
        self._new: dict[str, float] = {}
        self._path = path
        if path is None:
            return
        with os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._read(path)

    def __len__(self) -> int:
        """Return the number of likelihoods."""
        return len(self._values)

    def get(self, key: str) -> float | None:
        """Return a likelihood, or None where it was not computed yet."""
        return self._values.get(key)

    def put(self, keys: Sequence[str], values: Sequence[float]) -> None:
        """Keep one batch of likelihoods."""
        added = dict(zip(keys, values, strict=True))
        self._values.update(added)
        self._new.update(added)
        if self._path is None:
            return
        with os_errors(self._path):
            append_line(self._path, {"keys": list(keys), "values": list(values)})

    def known(self) -> dict[str, float]:
        """Return all likelihoods by key."""
        return dict(self._values)

    def take_new(self) -> dict[str, float]:
        """Return what was put in since the last call."""
        new, self._new = self._new, {}
        return new

    def _read(self, path: Path) -> None:
        try:
            for line in whole_lines(path):
                record = json.loads(line)
                self._values.update(zip(record["keys"], record["values"], strict=True))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"The likelihood cache '{path}' is damaged: {error}",
                "Remove the file; the likelihoods are computed anew.",
            ) from error


class LikelihoodScorer:
    """Scores pairs of an example and the passages of its prompt with a generator, through a cache.

    Args:
        generator: The language model; its weights must not change while the scorer is used.
        cache_directory: Where the cache file goes; without it the cache lives in memory.
    """

    def __init__(self, generator: Generator, cache_directory: Path | None = None) -> None:
        """Open the cache that belongs to the generator's weights and prompt."""
        self.generator = generator
        self.fingerprint = generator.fingerprint()
        self.truncation = TruncationCount()
        """How many of the prompts so far were cut."""
        self._identified: dict[tuple[str, ...], tuple[str, int]] = {}
        self._cache_directory = cache_directory
        path = cache_directory / f"likelihoods-{self._identity()}.jsonl" if cache_directory is not None else None
        self.cache = LikelihoodCache(path)

    def serves(self, generator: Generator, cache_directory: Path | None) -> bool:
        """Return whether this scorer's likelihoods are those of a generator as it is now, kept in the given folder."""
        same_place = cache_directory == self._cache_directory
        return same_place and generator is self.generator and generator.fingerprint() == self.fingerprint

    def score(self, pairs: Sequence[Pair], reporter: Reporter | None = None) -> tuple[Tensor, Tensor]:
        """Return log p(response | passages, query) and the response's length for each pair.

        Pairs that are not cached are scored in batches of prompts that begin alike, and of equal length. A run that was
        killed between two batches forms the same batches of the rest, so a resumed run gets bit-identical numbers.

        Args:
            pairs: Examples, each with the passages of one prompt, best first.
            reporter: Shows the progress.

        Returns:
            Sums of log-probabilities (float32) and numbers of tokens (int64), each of shape (len(pairs),).
        """
        known: list[tuple[str, int]] = []
        missing: dict[str, TokenPair] = {}
        for example, nodes in pairs:
            texts = (example.query, example.response, self.generator.context(nodes))
            identity = self._identified.get(texts)
            if identity is None or self.cache.get(identity[0]) is None:
                prompt = self.generator.encode_pair(example.query, nodes, example.response, with_end=False)
                pair = (prompt.ids, prompt.answer)
                if identity is None:
                    self.truncation.add(prompt.tokens, prompt.dropped_tokens)
                    key = hashlib.blake2b(json.dumps(pair).encode(), digest_size=12).hexdigest()
                    identity = self._identified[texts] = (key, len(prompt.answer))
                if self.cache.get(identity[0]) is None:
                    missing[identity[0]] = pair
            known.append(identity)
        self._score_missing(missing, reporter or SilentReporter())
        totals = torch.tensor([self.cache.get(key) for key, _ in known], dtype=torch.float32)
        return totals, torch.tensor([length for _, length in known])

    def _score_missing(self, missing: dict[str, TokenPair], reporter: Reporter) -> None:
        keys, pairs = list(missing), list(missing.values())

        def keep(positions: list[int], totals: Tensor) -> None:
            if not bool(torch.isfinite(totals).all()):
                raise TrainingError(
                    "The generator's likelihoods are not finite, so they cannot teach the retriever.",
                    "Look for broken weights in the generator's model, or set its dtype and precision to float32.",
                )
            self.cache.put([keys[position] for position in positions], totals.tolist())
            advance(len(positions))

        with reporter.task("Scoring answers", len(pairs), "pair") as advance:
            self.generator.log_probs_of_ids(pairs, keep)

    def _identity(self) -> str:
        # The keys hold the token ids themselves, so the prompt's settings need no mention here.
        settings = [self.fingerprint, *self.generator.scoring_settings]
        return hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
