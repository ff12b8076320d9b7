"""How many tokens a retriever reads of a text: its limit, that of its positions, and what is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    BoW,
    Pooling,
    StaticEmbedding,
    Transformer,
    WordEmbeddings,
)
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from transformers import AutoTokenizer

from fedrag_cli.errors import ModelError
from fedrag_cli.rag.config import SentenceTransformerConfig
from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever

TEXTS = ["the cat", "the colour of the owl is blue and the colour of the cat is red .", "a", "where is the dog ?"]
LONG = " ".join(["the cat lives in the red house and the owl in the tree"] * 12)


def load(folder: Path | str, **settings: Any) -> SentenceTransformerRetriever:
    config = SentenceTransformerConfig(model=str(folder), **settings)
    return SentenceTransformerRetriever.from_config(config, device="cpu")


def tokens(retriever: SentenceTransformerRetriever, text: str) -> int:
    return len(retriever.passage_encoder.tokenizer(text, truncation=False, verbose=False)["input_ids"])


@pytest.mark.parametrize("max_length", [1, 2])
def test_a_limit_that_leaves_nothing_of_a_text_is_refused(models: dict[str, Path], max_length: int) -> None:
    with pytest.raises(ModelError, match=rf"max_length is {max_length}, but .* puts 2 tokens around each text"):
        load(models["retriever"], max_length=max_length)
    three = load(models["retriever"], max_length=3)
    assert not torch.equal(*three.encode_queries(["cat", "dog"]))


def test_max_length_cuts_what_is_longer(models: dict[str, Path]) -> None:
    short = load(models["retriever"], max_length=10)
    assert not torch.allclose(
        short.encode_passages([LONG]), load(models["retriever"]).encode_passages([LONG]), atol=1e-3
    )
    fitting = "z" * 8
    assert tokens(short, fitting) == 10
    assert torch.allclose(
        short.encode_passages([fitting + " dog"]), short.encode_passages([fitting + " owl"]), atol=1e-6
    )


@pytest.mark.parametrize("text", ["a", "cat ", "🦉", "ﷺ", "日"])
@pytest.mark.parametrize("max_length", [None, 12])
def test_truncated_texts_are_counted_exactly(models: dict[str, Path], text: str, max_length: int | None) -> None:
    retriever = load(models["retriever"], max_length=max_length)
    limit = max_length or 64
    texts = [text * count for count in range(1, 70)]
    expected = sum(tokens(retriever, row) > limit for row in texts)
    assert 0 < expected < len(texts)
    assert retriever.measure(texts, "texts", queries=False).truncated == expected
    # What is not counted really reaches the encoder whole.
    whole = [row for row in texts if tokens(retriever, row) <= limit]
    features = retriever.features(whole, queries=False)
    assert features["attention_mask"].sum(dim=1).tolist() == [tokens(retriever, row) for row in whole]


def test_a_corpus_is_tokenised_in_parts(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    retriever, sizes = load(models["retriever"], max_length=10), []
    tokenizer = retriever.passage_encoder.tokenizer

    def counting(texts: list[str], **settings: Any) -> Any:
        sizes.append(len(texts))
        return tokenizer(texts, **settings)

    monkeypatch.setattr(type(retriever.passage_encoder), "tokenizer", property(lambda _: counting))
    assert retriever.measure(["a", LONG] * 3000, "texts", queries=False).truncated == 3000
    assert sizes == [4096, 1904]


def test_prompts_count_as_length(models: dict[str, Path]) -> None:
    retriever = load(models["retriever"], query_prompt="the " * 40, max_length=40)
    assert retriever.measure(TEXTS, "texts", queries=True).truncated == len(TEXTS)
    assert retriever.measure(TEXTS, "texts", queries=False).truncated == 0
    assert retriever.measure([], "texts", queries=True).truncated == 0


def test_a_length_limit_holds_for_a_saved_pair_too(models: dict[str, Path], tmp_path: Path) -> None:
    retriever = load(models["retriever"])
    retriever.separate_encoders()
    retriever.save(tmp_path / "saved")
    short, expected = load(tmp_path / "saved", max_length=10), load(models["retriever"], max_length=10)
    assert (short.query_encoder.max_seq_length, short.passage_encoder.max_seq_length) == (10, 10)
    assert (short.encode_queries([LONG]) - expected.encode_queries([LONG])).abs().max() < 1e-6
    assert (short.encode_passages([LONG]) - expected.encode_passages([LONG])).abs().max() < 1e-6
    assert short.measure([LONG], "texts", queries=True).truncated == 1


def _saved(folder: Path, *modules: torch.nn.Module) -> str:
    SentenceTransformer(modules=list(modules), device="cpu").save(str(folder), create_model_card=False)
    return str(folder)


def _words(**options: Any) -> WordEmbeddings:
    words = ["the", "cat", "is", "red"]
    return WordEmbeddings(WhitespaceTokenizer(words, stop_words=set()), torch.rand(4, 8).numpy(), **options)


def test_encoders_without_a_limit_cut_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models["retriever"])
    static = _saved(tmp_path / "static", StaticEmbedding(tokenizer, embedding_dim=8))
    words = _saved(tmp_path / "words", BoW(["the", "cat", "is", "red"]))
    for model in (static, words):
        retriever = load(model)
        assert retriever.measure([LONG, "the cat"], "texts", queries=True).truncated == 0
        assert retriever.measure([LONG], "passages", queries=False).message == ""
        assert retriever.encode_queries(["the cat", LONG]).shape[0] == 2
        with pytest.raises(ModelError, match=r"max_length is 5, but the retriever .* reads texts of any length"):
            load(model, max_length=5)


def test_word_embeddings_are_cut_at_their_own_limit(tmp_path: Path) -> None:
    model = _saved(tmp_path / "words", _words(max_seq_length=3), Pooling(8))
    measured = load(model).measure(["the cat is red", "the cat"], "passages", queries=False)
    assert (measured.truncated, measured.tokens, measured.dropped, measured.limit) == (1, 6, 1, 3)
    assert load(model, max_length=4).measure(["the cat is red"], "texts", queries=False).truncated == 0


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "MPNet", "DistilBert"])
def test_a_limit_above_the_positions_is_refused_and_one_at_them_works(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """RoBERTa and MPNet leave the first two of their 34 positions out."""
    size = 34 if kind in ("Roberta", "MPNet") else 32
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "DistilBert":
        sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    config = getattr(transformers, f"{kind}Config")(vocab_size=400, max_position_embeddings=size, **sizes)
    if size == 34:
        config.pad_token_id = 1
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(models["retriever"])
    tokenizer.model_max_length = 1000
    tokenizer.save_pretrained(tmp_path / "base")
    model = _saved(tmp_path / "model", Transformer(str(tmp_path / "base")), Pooling(16))
    with pytest.raises(ModelError, match=r"max_length is 33, but the retriever .* has 32 positions") as caught:
        load(model, max_length=33)
    assert caught.value.hint == "Set it to 32 or less, or leave it out."
    for limit in (32, None):
        retriever = load(model, max_length=limit)
        assert retriever.encode_passages([LONG * 10]).shape == (1, 16)
        measured = retriever.measure([LONG * 10], "passages", queries=False)
        assert (measured.truncated, measured.limit) == (1, 32)
        assert measured.advice.startswith("Take an encoder that reads longer texts, or split")
