"""How long texts are beside the limits of the models that read them, and what to set where they are cut."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch import nn

from fedrag_cli.errors import ModelError

_TOKENISED_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Texts beside the limit of what reads them.

    Args:
        kind: What the texts are, such as passages.
        texts: How many they are.
        truncated: How many are longer than the limit.
        tokens: Tokens of all texts; 0 where nothing can be cut, because there is no limit.
        dropped: Tokens beyond the limit, which are cut off.
        limit: Most tokens of a text; None where there is no limit.
        advice: What to do about it, in a sentence.
    """

    kind: str
    texts: int
    truncated: int = 0
    tokens: int = 0
    dropped: int = 0
    limit: int | None = None
    advice: str = ""

    @property
    def share(self) -> float:
        """Share of all tokens that is cut off."""
        return self.dropped / self.tokens if self.tokens else 0.0

    @property
    def message(self) -> str:
        """What is cut and what to do about it; empty where nothing is cut."""
        if not self.truncated:
            return ""
        return (
            f"{self.truncated} of {self.texts} {self.kind} do not fit into {self.limit} tokens, so "
            f"{100 * self.share:.3g} % of all tokens of {self.kind} are cut off. {self.advice}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, share and message among them."""
        return {**dataclasses.asdict(self), "share": self.share, "message": self.message}


def measure_texts(encoder: SentenceTransformer, texts: Sequence[str], kind: str, *, splittable: bool) -> Lengths:
    """Measure texts beside an encoder's limit.

    Args:
        encoder: The encoder; one that reads texts of any length cuts nothing.
        texts: The texts, with their prompts.
        kind: What they are.
        splittable: Whether they could be split, as passages can.
    """
    limit = length_limit(encoder)
    if limit is None:
        return Lengths(kind, len(texts))
    lengths = list(_token_counts(encoder, texts))
    cut = [length - limit for length in lengths if length > limit]
    positions = position_limit(encoder)
    if positions is None or positions > limit:
        most = f" to at most {positions}" if positions is not None else ""
        advice = f"Raise rag_system.retriever.max_length{most}"
    else:
        advice = "Take an encoder that reads longer texts"
    advice += ", or split the passages smaller (dataset.corpus.split.size)." if splittable else "."
    return Lengths(kind, len(texts), len(cut), sum(lengths), sum(cut), limit, advice)


def length_limit(encoder: SentenceTransformer) -> int | None:
    """Return the most tokens of a text that an encoder reads; None for one that reads texts of any length."""
    limit = getattr(encoder[0], "max_seq_length", None)
    return int(limit) if limit and limit != math.inf else None


def position_limit(encoder: SentenceTransformer) -> int | None:
    """Return for how many tokens an encoder has positions; None for one whose positions have no end, or that has none.

    RoBERTa and its kin leave the first positions of their table out: they count from behind that of padding.
    """
    limits = []
    for module in encoder.modules():
        if not isinstance(module, Transformer):
            continue
        config = module.model.config.get_text_config()
        table = next(
            (part for name, part in module.named_modules() if name.endswith("position_embeddings") and _is_table(part)),
            None,
        )
        if table is not None:
            limits.append(table.num_embeddings - (table.padding_idx + 1 if table.padding_idx is not None else 0))
        elif not getattr(config, "relative_attention", False):
            limits.append(getattr(config, "max_position_embeddings", None))
    known = [int(limit) for limit in limits if limit]
    return min(known) if known else None


def set_length_limit(encoder: SentenceTransformer, wanted: int | None, reference: str) -> None:
    """Let an encoder cut texts at a length for which it has positions.

    Args:
        encoder: The encoder.
        wanted: The config's `max_length`; None leaves the encoder's own limit, as far as it has positions.
        reference: What the config calls the encoder, for the message.

    Raises:
        ModelError: The encoder has fewer positions, reads texts of any length, or would read no text at all.
    """
    own, positions = length_limit(encoder), position_limit(encoder)
    if wanted is None:
        if own is not None and positions is not None and own > positions:
            encoder.max_seq_length = positions
        return
    if own is None:
        raise ModelError(
            f"rag_system.retriever.max_length is {wanted}, but the retriever '{reference}' has no limit that it could "
            f"set: its {type(encoder[0]).__name__} reads texts of any length.",
            "Leave it out.",
        )
    if positions is not None and wanted > positions:
        raise ModelError(
            f"rag_system.retriever.max_length is {wanted}, but the retriever '{reference}' has {positions} positions.",
            f"Set it to {positions} or less, or leave it out.",
        )
    # What tokenizers put around a text, which the limit counts too.
    added = len(encoder.tokenizer("")["input_ids"]) if callable(encoder.tokenizer) else 0
    if wanted <= added:
        raise ModelError(
            f"rag_system.retriever.max_length is {wanted}, but the retriever '{reference}' puts {added} tokens around "
            "each text, so it would read nothing of it.",
            f"Set it to more than {added}, or leave it out.",
        )
    encoder.max_seq_length = wanted


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _token_counts(encoder: SentenceTransformer, texts: Sequence[str]) -> Iterator[int]:
    tokenizer = encoder.tokenizer
    # Every text is tokenised: one character may be several tokens, so the number of characters tells nothing.
    for start in range(0, len(texts), _TOKENISED_AT_ONCE):
        some = list(texts[start : start + _TOKENISED_AT_ONCE])
        if callable(tokenizer):
            yield from map(len, tokenizer(some, truncation=False, verbose=False)["input_ids"])
        else:
            # The word tokenizers of sentence-transformers.
            yield from (len(tokenizer.tokenize(text)) for text in some)
