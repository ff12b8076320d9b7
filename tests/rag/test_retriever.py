"""The retriever: order, length, prompts, one encoder or two, saving and loading, fingerprints and errors."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Pooling,
)

from fedrag_cli.errors import DataError, ModelError
from fedrag_cli.rag.config import SentenceTransformerConfig
from fedrag_cli.rag.models import weights_fingerprint
from fedrag_cli.rag.retrievers.sentence_transformer import (
    SentenceTransformerRetriever,
    prompted_features,
    structure_fingerprint,
)

TEXTS = [
    "the cat",
    "the colour of the owl is blue and the colour of the cat is red .",
    "a",
    "where is the dog ?",
    "the the the the the the the",
    "where is the cat ?",
]
LONG = " ".join(["the cat lives in the red house and the owl in the tree"] * 12)


def load(folder: Path | str | None, *, device: str = "cpu", **settings: Any) -> SentenceTransformerRetriever:
    model = {} if folder is None else {"model": str(folder)}
    return SentenceTransformerRetriever.from_config(SentenceTransformerConfig(**model, **settings), device=device)


def nudge(encoder: SentenceTransformer) -> None:
    with torch.no_grad():
        next(encoder.parameters()).add_(0.05 * torch.arange(32))


# Encoding


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_order_is_kept_and_the_batch_size_does_not_matter(models: dict[str, Path], batch_size: int) -> None:
    retriever, done = load(models["retriever"], batch_size=batch_size), []
    together = retriever.encode_passages(TEXTS, done.append)
    single = torch.cat([load(models["retriever"]).encode_passages([text]) for text in TEXTS])
    assert (together - single).abs().max() < 1e-6
    assert torch.cdist(single, single).add(torch.eye(len(TEXTS))).min() > 1e-3
    assert sum(done) == len(TEXTS)
    assert torch.equal(retriever.encode_queries(TEXTS), together)


def test_embeddings_equal_those_of_sentence_transformers(models: dict[str, Path]) -> None:
    plain = SentenceTransformer(str(models["retriever"]), device="cpu").encode(TEXTS, convert_to_tensor=True)
    assert (load(models["retriever"]).encode_passages(TEXTS) - plain).abs().max() < 1e-6


def test_cosine_gives_unit_length_and_dot_leaves_the_length(models: dict[str, Path]) -> None:
    full = SentenceTransformer(str(models["retriever"]), device="cpu")
    without_normalisation = SentenceTransformer(modules=list(full)[:2], device="cpu")
    cosine = SentenceTransformerRetriever(without_normalisation, None, SentenceTransformerConfig(model="m"))
    dot = SentenceTransformerRetriever(
        without_normalisation, None, SentenceTransformerConfig(model="m", similarity="dot")
    )
    assert torch.allclose(cosine.encode_queries(TEXTS).norm(dim=1), torch.ones(len(TEXTS)), atol=1e-6)
    raw = dot.encode_queries(TEXTS)
    assert (raw.norm(dim=1) - 1).abs().min() > 0.1
    assert torch.allclose(torch.nn.functional.normalize(raw, dim=1), cosine.encode_queries(TEXTS), atol=1e-6)


def test_embeddings_carry_no_gradient_and_no_dropout_and_may_be_used_in_training(tmp_path: Path) -> None:
    from conftest import make_retriever

    retriever = load(make_retriever(tmp_path / "model", dropout=0.5))
    retriever.query_encoder.train()
    first, second = retriever.encode_queries(TEXTS), retriever.encode_queries(TEXTS)
    assert torch.equal(first, second)
    assert retriever.query_encoder.training
    assert not first.requires_grad
    weight = torch.ones(32, requires_grad=True)
    (first.clone() * weight).sum().backward()
    assert weight.grad is not None


def test_a_forward_pass_with_gradient_equals_encoding(models: dict[str, Path]) -> None:
    retriever = load(models["retriever"], query_prompt="query: ", passage_prompt="passage: ")
    for queries, expected in ((True, retriever.encode_queries(TEXTS)), (False, retriever.encode_passages(TEXTS))):
        embeddings = retriever.embed(retriever.query_encoder, retriever.features(TEXTS, queries=queries))
        assert embeddings.requires_grad
        assert torch.allclose(embeddings.detach(), expected, atol=1e-6)


def test_prompts_are_put_in_front(models: dict[str, Path]) -> None:
    plain = load(models["retriever"])
    prompted = load(models["retriever"], query_prompt="query: ", passage_prompt="passage: ")
    assert torch.equal(prompted.encode_queries(TEXTS), plain.encode_queries(["query: " + text for text in TEXTS]))
    assert torch.equal(prompted.encode_passages(TEXTS), plain.encode_passages(["passage: " + text for text in TEXTS]))
    assert not torch.allclose(prompted.encode_queries(TEXTS), prompted.encode_passages(TEXTS), atol=1e-3)


@pytest.mark.parametrize("blank", ["", "  ", "\n"])
def test_a_blank_text_is_refused_by_position(models: dict[str, Path], blank: str) -> None:
    retriever = load(models["retriever"], query_prompt="query: ")
    with pytest.raises(DataError, match="Text 1 to encode is empty"):
        retriever.encode_queries(["a", blank])


def test_what_follows_the_first_batches_is_the_same_without_them(models: dict[str, Path]) -> None:
    retriever = load(models["retriever"], batch_size=2)
    batches = list(retriever.passage_batches(TEXTS))
    lengths = [len(TEXTS[position]) for positions, _ in batches for position in positions]
    assert lengths == sorted(lengths, reverse=True)
    first = batches[0][0]
    rest = [position for position in range(len(TEXTS)) if position not in first]
    again = list(retriever.passage_batches([TEXTS[position] for position in rest]))
    for (positions, embeddings), (others, expected) in zip(again, batches[1:], strict=True):
        assert [rest[position] for position in positions] == others
        assert torch.equal(embeddings, expected)


def test_no_texts_give_no_embeddings(models: dict[str, Path]) -> None:
    assert len(load(models["retriever"]).encode_passages([])) == 0


def test_the_dimension_and_the_device_are_those_of_the_model(models: dict[str, Path]) -> None:
    retriever = load(models["retriever"])
    assert (retriever.dimension, retriever.device) == (32, torch.device("cpu"))


# Prompts of the model itself


def instructed(models: dict[str, Path], folder: Path, *, names: tuple[str, str] = ("query", "document")) -> Path:
    """Write the tiny retriever with prompts of its own."""
    model = SentenceTransformer(str(models["retriever"]), device="cpu", prompts={names[0]: "ask: ", names[1]: "read: "})
    model.default_prompt_name = names[0]
    model.save(str(folder), create_model_card=False)
    return folder


def test_a_models_own_prompts_are_used_as_sentence_transformers_does(models: dict[str, Path], tmp_path: Path) -> None:
    folder = instructed(models, tmp_path / "model")
    retriever, plain = load(folder), SentenceTransformer(str(folder), device="cpu")
    assert (plain.encode_query(TEXTS, convert_to_tensor=True) - retriever.encode_queries(TEXTS)).abs().max() < 1e-6
    assert (plain.encode_document(TEXTS, convert_to_tensor=True) - retriever.encode_passages(TEXTS)).abs().max() < 1e-6
    given = load(models["retriever"], query_prompt="ask: ", passage_prompt="read: ")
    assert torch.equal(given.encode_queries(TEXTS), retriever.encode_queries(TEXTS))
    assert given.fingerprint() == retriever.fingerprint()
    assert given.query_fingerprint() == retriever.query_fingerprint()
    assert given.notes == ()
    assert retriever.notes == (
        "The retriever's own prompts are used: 'ask: ' before queries, 'read: ' before passages "
        "(query_prompt and passage_prompt change them).",
    )
    assert retriever.measure(["z" * 60], "texts", queries=True).truncated == 1
    assert load(models["retriever"]).measure(["z" * 60], "texts", queries=True).truncated == 0


def test_an_empty_prompt_switches_the_models_own_off(models: dict[str, Path], tmp_path: Path) -> None:
    folder, plain = instructed(models, tmp_path / "model"), load(models["retriever"])
    off = load(folder, query_prompt="", passage_prompt="")
    assert torch.equal(off.encode_queries(TEXTS), plain.encode_queries(TEXTS))
    assert (off.fingerprint(), off.query_fingerprint()) == (plain.fingerprint(), plain.query_fingerprint())
    assert off.notes == ()
    half = load(folder, passage_prompt="")
    assert half.fingerprint() == plain.fingerprint()
    assert half.query_fingerprint() != plain.query_fingerprint()
    assert half.notes[0].count("before") == 1


def test_a_model_without_prompts_keeps_the_fingerprint_that_it_had(models: dict[str, Path]) -> None:
    for settings in ({}, {"query_prompt": "", "passage_prompt": ""}):
        retriever = load(models["retriever"], **settings)
        parts = ("", 64, "cosine", structure_fingerprint(retriever.passage_encoder))
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).hexdigest()
        assert retriever.fingerprint() == f"{weights_fingerprint(retriever.passage_encoder)}-{digest}"


def test_a_prompt_for_passages_goes_by_other_names_too(models: dict[str, Path], tmp_path: Path) -> None:
    for name in ("passage", "corpus"):
        assert load(instructed(models, tmp_path / name, names=("query", name))).passage_prompt == "read: "
    tasks = load(instructed(models, tmp_path / "tasks", names=("web_search", "sts")))
    assert (tasks.query_prompt, tasks.passage_prompt) == ("", "")


@pytest.mark.parametrize("separate", [False, True])
def test_a_models_own_prompts_survive_saving_tuning_and_two_encoders(
    models: dict[str, Path], tmp_path: Path, separate: bool
) -> None:
    retriever = load(instructed(models, tmp_path / "model"))
    if separate:
        retriever.separate_encoders()
        nudge(retriever.query_encoder)
    retriever.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.is_shared is not separate
    assert (again.query_prompt, again.passage_prompt) == ("ask: ", "read: ")
    assert again.fingerprint() == retriever.fingerprint()
    other = retriever.with_query_encoder(load(models["other_retriever"]).query_encoder, shared=False)
    assert (other.query_prompt, other.passage_prompt) == ("ask: ", "read: ")
    two = load(None, query_model=str(tmp_path / "model"), passage_model=str(models["other_retriever"]))
    assert (two.query_prompt, two.passage_prompt) == ("ask: ", "")


def test_a_prompt_that_is_not_pooled_is_left_out_of_the_embedding(models: dict[str, Path], tmp_path: Path) -> None:
    folder = instructed(models, tmp_path / "model")
    pooled, plain = load(folder), SentenceTransformer(str(folder), device="cpu")
    plain.set_pooling_include_prompt(False)
    plain.save(str(tmp_path / "instructor"), create_model_card=False)
    retriever = load(tmp_path / "instructor")
    queries = retriever.encode_queries(TEXTS)
    assert (plain.encode_query(TEXTS, convert_to_tensor=True) - queries).abs().max() < 1e-6
    assert (pooled.encode_queries(TEXTS) - queries).abs().max() > 1e-3
    with_gradient = retriever.embed(retriever.query_encoder, retriever.features(TEXTS, queries=True))
    assert torch.allclose(with_gradient.detach(), queries, atol=1e-6)


# One encoder or two


def test_a_shared_encoder_is_one_object_until_it_is_separated(models: dict[str, Path]) -> None:
    retriever = load(models["retriever"])
    assert retriever.is_shared
    before = retriever.encode_passages(TEXTS)
    retriever.separate_encoders()
    assert not retriever.is_shared
    shared_memory = {p.data_ptr() for p in retriever.query_encoder.parameters()} & {
        p.data_ptr() for p in retriever.passage_encoder.parameters()
    }
    assert not shared_memory
    assert torch.equal(retriever.encode_queries(TEXTS), before)
    nudge(retriever.query_encoder)
    assert torch.equal(retriever.encode_passages(TEXTS), before)
    assert not torch.allclose(retriever.encode_queries(TEXTS), before, atol=1e-3)


def test_separating_twice_keeps_a_tuned_query_encoder(models: dict[str, Path]) -> None:
    retriever = load(models["retriever"])
    retriever.separate_encoders()
    nudge(retriever.query_encoder)
    tuned = retriever.encode_queries(TEXTS)
    retriever.separate_encoders()
    assert torch.equal(retriever.encode_queries(TEXTS), tuned)


def test_two_models_encode_queries_and_passages_each(models: dict[str, Path]) -> None:
    both = load(None, query_model=str(models["other_retriever"]), passage_model=str(models["retriever"]))
    assert not both.is_shared
    assert torch.equal(both.encode_queries(TEXTS), load(models["other_retriever"]).encode_queries(TEXTS))
    assert torch.equal(both.encode_passages(TEXTS), load(models["retriever"]).encode_passages(TEXTS))


# Saving and loading


@pytest.mark.parametrize(
    "settings", [{}, {"query_prompt": "query: ", "passage_prompt": "passage: "}, {"max_length": 10}]
)
@pytest.mark.parametrize("separate", [False, True])
def test_what_is_saved_gives_the_same_embeddings_in_sentence_transformers_and_here(
    models: dict[str, Path], tmp_path: Path, separate: bool, settings: dict[str, Any]
) -> None:
    retriever = load(models["retriever"], **settings)
    if separate:
        retriever.separate_encoders()
        nudge(retriever.query_encoder)
    queries, passages = retriever.encode_queries([*TEXTS, LONG]), retriever.encode_passages([*TEXTS, LONG])
    retriever.save(tmp_path / "saved")
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert (plain.encode_query([*TEXTS, LONG], convert_to_tensor=True) - queries).abs().max() < 1e-6
    assert (plain.encode_document([*TEXTS, LONG], convert_to_tensor=True) - passages).abs().max() < 1e-6
    again = load(tmp_path / "saved", **settings)
    assert again.is_shared is not separate
    assert (again.encode_queries([*TEXTS, LONG]) - queries).abs().max() < 1e-6
    assert (again.encode_passages([*TEXTS, LONG]) - passages).abs().max() < 1e-6
    assert again.fingerprint() == retriever.fingerprint()
    assert again.query_fingerprint() == retriever.query_fingerprint()
    again.save(tmp_path / "twice")
    twice = load(tmp_path / "twice", **settings)
    assert (twice.encode_queries(TEXTS) - queries[:-1]).abs().max() < 1e-6
    assert not [file for file in (tmp_path / "saved").rglob("*") if file.suffix in {".bin", ".pt", ".pkl"}]


# Fingerprints


def test_the_fingerprint_is_that_of_what_passage_embeddings_depend_on(models: dict[str, Path]) -> None:
    base = load(models["retriever"]).fingerprint()
    assert load(models["retriever"]).fingerprint() == base
    assert load(models["retriever"], query_prompt="query: ", batch_size=3).fingerprint() == base
    others = [
        load(models["retriever"], passage_prompt="passage: ").fingerprint(),
        load(models["retriever"], max_length=10).fingerprint(),
        load(models["retriever"], similarity="dot").fingerprint(),
        load(models["other_retriever"]).fingerprint(),
    ]
    assert len({base, *others}) == 5


def test_the_fingerprint_sees_number_format_pooling_and_tokenizer(models: dict[str, Path], tmp_path: Path) -> None:
    """What changes passage embeddings without changing a weight must not pass for the same encoder."""

    base = load(models["retriever"])
    cls_pooling = SentenceTransformer(modules=[base.passage_encoder[0], Pooling(32, "cls")], device="cpu")
    shutil.copytree(models["retriever"], tmp_path / "lower")
    file = next((tmp_path / "lower").rglob("tokenizer.json"))
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    others = [
        load(models["retriever"], dtype="bfloat16"),
        SentenceTransformerRetriever(cls_pooling, None, SentenceTransformerConfig(model="m")),
        load(tmp_path / "lower"),
    ]
    text = ["Where is the OWL ?"]
    for other in others:
        assert (other.encode_passages(text) - base.encode_passages(text)).abs().max() > 1e-4
    assert len({retriever.fingerprint() for retriever in (base, *others)}) == 4
    assert len({retriever.query_fingerprint() for retriever in (base, *others)}) == 4


def test_the_fingerprint_follows_the_weights_of_the_passage_encoder_only(models: dict[str, Path]) -> None:
    retriever = load(models["retriever"])
    base, query_base = retriever.fingerprint(), retriever.query_fingerprint()
    retriever.separate_encoders()
    nudge(retriever.query_encoder)
    assert retriever.fingerprint() == base
    assert retriever.query_fingerprint() != query_base
    nudge(retriever.passage_encoder)
    changed = retriever.fingerprint()
    assert changed != base
    retriever.passage_encoder.load_state_dict(load(models["retriever"]).passage_encoder.state_dict())
    assert retriever.fingerprint() == base
    retriever.passage_encoder = load(models["other_retriever"]).passage_encoder
    assert retriever.fingerprint() == load(models["other_retriever"]).fingerprint()


# Errors


def broken_model(models: dict[str, Path], tmp_path: Path, kind: str) -> str:
    if kind == "hub id":
        return "no-such-owner/no-such-model"
    folder = tmp_path / "model"
    if kind == "empty folder":
        folder.mkdir()
        return str(folder)
    shutil.copytree(models["retriever"], folder)
    weights = next(folder.rglob("*.safetensors"))
    if kind == "no weights":
        weights.unlink()
    if kind == "torn weights":
        weights.write_bytes(weights.read_bytes()[:500])
    if kind == "broken modules.json":
        (folder / "modules.json").write_text("{", encoding="utf-8")
    if kind == "no tokenizer":
        for file in folder.rglob("tokenizer*"):
            file.unlink()
    return str(folder)


@pytest.mark.parametrize(
    "kind", ["hub id", "empty folder", "no weights", "torn weights", "broken modules.json", "no tokenizer"]
)
def test_a_missing_or_broken_model_is_a_model_error_with_a_hint(
    models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    reference = broken_model(models, tmp_path, kind)
    with pytest.raises(ModelError, match=r"The retriever '.*' cannot be loaded") as caught:
        SentenceTransformerRetriever.from_config(SentenceTransformerConfig(model=reference), device="cpu")
    assert reference in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("reference", ["package://no_such_package_here/x", "/no/such/folder"])
def test_a_model_that_is_nowhere_is_a_model_error_with_a_hint(reference: str) -> None:
    with pytest.raises(ModelError) as caught:
        SentenceTransformerRetriever.from_config(SentenceTransformerConfig(model=reference), device="cpu")
    assert caught.value.hint


def test_a_file_is_no_model_of_a_retriever(tmp_path: Path) -> None:
    for name in ("weights.bin", "model.gguf"):
        (tmp_path / name).touch()
        with pytest.raises(ModelError):
            SentenceTransformerRetriever.from_config(
                SentenceTransformerConfig(model=str(tmp_path / name)), device="cpu"
            )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without cuda")
def test_an_absent_device_is_a_model_error(models: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="no device 'cuda'"):
        load(models["retriever"], device="cuda")


def test_control_tokens_in_texts_are_text_unless_a_prompt_has_some(models: dict[str, Path]) -> None:
    def separators(**prompts: str) -> int:
        config = SentenceTransformerConfig(model=str(models["retriever"]), **prompts)
        retriever = SentenceTransformerRetriever.from_config(config, device="cpu")
        tokenizer = retriever.passage_encoder.tokenizer
        ids = prompted_features(retriever.passage_encoder, ["the cat [SEP] the owl"], retriever.passage_prompt)
        return ids["input_ids"][0].tolist().count(tokenizer.sep_token_id)

    assert separators() == 1
    assert separators(passage_prompt="passage: ") == 1
    assert separators(passage_prompt="passage [SEP] ") == 3
