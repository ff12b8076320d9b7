"""Prompts of instruct models: those that a model declares in its files, and how they are put before texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import PreTrainedTokenizerBase

from fedrag_cli.rag.config import SentenceTransformerConfig

# In the order in which sentence-transformers looks for them.
_QUERY_NAMES = ("query",)
_PASSAGE_NAMES = ("document", "passage", "corpus")


def with_own_prompts(
    config: SentenceTransformerConfig, query_model: SentenceTransformer, passage_model: SentenceTransformer
) -> SentenceTransformerConfig:
    """Return a config without open prompts: what it leaves open is what the models declare, or nothing.

    Args:
        config: The retriever's settings.
        query_model: Its declaration for queries counts; `default_prompt_name` does not, as in `encode_query`.
        passage_model: Its declaration for documents, passages or a corpus counts.
    """
    query, passage = config.query_prompt, config.passage_prompt
    return dataclasses.replace(
        config,
        query_prompt=query if query is not None else _declared(query_model, _QUERY_NAMES),
        passage_prompt=passage if passage is not None else _declared(passage_model, _PASSAGE_NAMES),
    )


def _declared(model: SentenceTransformer, names: Sequence[str]) -> str:
    return next((str(model.prompts[name]) for name in names if model.prompts.get(name)), "")


def prompts_note(given: SentenceTransformerConfig, settled: SentenceTransformerConfig) -> str:
    """Return which prompts come from the models, in words; empty where none does."""
    used = [
        f"{getattr(settled, name)!r} before {texts}"
        for name, texts in (("query_prompt", "queries"), ("passage_prompt", "passages"))
        if getattr(given, name) is None and getattr(settled, name)
    ]
    if not used:
        return ""
    return f"The retriever's own prompts are used: {', '.join(used)} (query_prompt and passage_prompt change them)."


def take_texts_as_text(encoder: SentenceTransformer, prompts: Sequence[str]) -> None:
    """Let an encoder's tokenizer split control tokens in texts, such as [SEP], unless a prompt has some of its own."""
    for module in encoder.modules():
        tokenizer = getattr(module, "tokenizer", None)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            special = tokenizer.all_special_tokens
            tokenizer.split_special_tokens = not any(token in prompt for token in special for prompt in prompts)


def prompted_features(encoder: SentenceTransformer, texts: Sequence[str], prompt: str) -> dict[str, Any]:
    """Tokenise texts with a prompt before each."""
    if prompt and pools_without_prompt(encoder):
        return dict(encoder.preprocess(list(texts), prompt=prompt))
    return dict(encoder.preprocess([prompt + text for text in texts]))


def pools_without_prompt(encoder: SentenceTransformer) -> bool:
    """Return whether a model leaves the tokens of its prompt out of the embedding, as Instructor does."""
    return any(isinstance(module, Pooling) and not module.include_prompt for module in encoder)
