"""How many tokens an encoder of sentence-transformers reads of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch import nn

from fedrag_cli.errors import ModelError
from fedrag_cli.rag.lengths import Lengths

_TOKENISED_AT_ONCE = 4096


def measure_texts(encoder: SentenceTransformer, texts: Sequence[str], kind: str, *, splittable: bool) -> Lengths:
    """Measure texts, with their prompts, beside an encoder's limit; `splittable` says whether they could be split."""
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
    limits: list[int | None] = []
    for module in encoder.modules():
        if not isinstance(module, Transformer):
            continue
        config = module.model.config.get_text_config()
        table = next(
            (
                part
                for name, part in module.named_modules()
                if name.endswith("position_embeddings") and isinstance(part, nn.Embedding)
            ),
            None,
        )
        if table is not None:
            limits.append(table.num_embeddings - (table.padding_idx + 1 if table.padding_idx is not None else 0))
        elif not getattr(config, "relative_attention", False):
            limits.append(getattr(config, "max_position_embeddings", None))
    return min((int(limit) for limit in limits if limit), default=None)


def set_length_limit(encoder: SentenceTransformer, wanted: int | None, reference: str) -> None:
    """Let an encoder cut texts at the config's `max_length`; None leaves its own limit, as far as it has positions.

    Raises:
        ModelError: The encoder has fewer positions, reads texts of any length, or would read no text at all.
    """
    own, positions = length_limit(encoder), position_limit(encoder)
    if wanted is None:
        if own is not None and positions is not None and own > positions:
            encoder.max_seq_length = positions
        return
    setting = f"rag_system.retriever.max_length is {wanted}, but the retriever '{reference}'"
    if own is None:
        raise ModelError(
            f"{setting} has no limit that it could set: its {type(encoder[0]).__name__} reads texts of any length.",
            "Leave it out.",
        )
    if positions is not None and wanted > positions:
        raise ModelError(f"{setting} has {positions} positions.", f"Set it to {positions} or less, or leave it out.")
    # What tokenizers put around a text, which the limit counts too.
    added = len(encoder.tokenizer("")["input_ids"]) if callable(encoder.tokenizer) else 0
    if wanted <= added:
        raise ModelError(
            f"{setting} puts {added} tokens around each text, so it would read nothing of it.",
            f"Set it to more than {added}, or leave it out.",
        )
    encoder.max_seq_length = wanted


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
