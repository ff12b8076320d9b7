"""Tiny models with random weights and a small data set, made once a session, so that fast tests run the real code."""

from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

    from fedrag_cli.config import Config
    from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run in a process for each core, and tiny models gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first, so that no process works on one alone at the end."""
    items.sort(key=lambda item: -max((mark.args[0] for mark in item.iter_markers("timeout")), default=0))


ANIMALS = ["cat", "dog", "owl", "fox", "hen", "cow", "pig", "bat", "elk", "ant", "bee", "eel"]
COLOURS = ["red", "blue", "green", "black", "white", "brown", "grey", "pink", "gold", "silver", "violet", "orange"]
TEXT = (
    "the a is what colour of animal answer question context with few words from : ? . ! , "
    "system user assistant you are helpful which where who lives in barn house tree water"
)
WORDS = TEXT.split()
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _tokenizer(folder: Path, *, bert: bool) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    text = [
        TEXT,
        " ".join(ANIMALS),
        " ".join(COLOURS),
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",
    ]
    special = (
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        if bert
        else ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<unk>"]
    )
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]" if bert else "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([line for line in text for _ in range(3)], trainer)
    if bert:
        ids = [("[CLS]", tokenizer.token_to_id("[CLS]")), ("[SEP]", tokenizer.token_to_id("[SEP]"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="[PAD]",
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            model_max_length=64,
        )
    else:
        # The padding token is the end token, as in many language models.
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="<|end|>",
            pad_token="<|end|>",
            unk_token="<unk>",
            model_max_length=256,
        )
    folder.mkdir(parents=True, exist_ok=True)
    return fast


def make_retriever(folder: Path, *, seed: int = 0, dropout: float = 0.0) -> Path:
    """Write a tiny sentence-transformers model (BERT, mean pooling, normalised)."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    tokenizer = _tokenizer(folder, bert=True)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    base = folder.with_name(folder.name + "-base")
    BertModel(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    encoder = Transformer(str(base), max_seq_length=64)
    SentenceTransformer(modules=[encoder, Pooling(32), Normalize()], device="cpu").save(
        str(folder), create_model_card=False
    )
    return folder


def make_generator(folder: Path, *, architecture: str = "llama", chat: bool = False, seed: int = 0) -> Path:
    """Write a tiny causal language model: llama (rotary positions) or gpt2 (absolute positions)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = _tokenizer(folder, bert=False)
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    end = tokenizer.eos_token_id
    model: Any
    if architecture == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=256,
                bos_token_id=None,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_embd=32,
                n_layer=2,
                n_head=2,
                n_positions=256,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=end,
                eos_token_id=end,
            )
        )
    with torch.no_grad():
        # Larger weights than the usual initialisation, so that different inputs give clearly different likelihoods.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models: retriever, other_retriever, generator, chat_generator, gpt2."""
    folder = tmp_path_factory.mktemp("models")
    made = {
        "retriever": make_retriever(folder / "retriever"),
        "other_retriever": make_retriever(folder / "other_retriever", seed=1),
        "generator": make_generator(folder / "generator"),
        "chat_generator": make_generator(folder / "chat_generator", chat=True),
        "gpt2": make_generator(folder / "gpt2", architecture="gpt2"),
    }
    # Every training collects garbage, which takes long over all that the libraries hold.
    gc.collect()
    gc.freeze()
    return made


def data_rows() -> dict[str, list[dict[str, Any]]]:
    """Return a corpus of 24 passages and questions about them, in three splits."""
    pairs = list(zip(ANIMALS, COLOURS, strict=True))
    corpus = [{"id": f"colour-{a}", "text": f"the colour of the {a} is {c} .", "title": a} for a, c in pairs]
    corpus += [{"id": f"home-{a}", "text": f"the {a} lives in the {c} house .", "title": a} for a, c in pairs]
    questions = [
        {"query": f"what is the colour of the {a} ?", "response": c, "relevant_ids": [f"colour-{a}"], "site": n % 2}
        for n, (a, c) in enumerate(pairs)
    ]
    questions += [
        {"query": f"where is the {a} ?", "response": [f"{c} house", c], "relevant_ids": [f"home-{a}"], "site": n % 2}
        for n, (a, c) in enumerate(pairs)
    ]
    random.Random(0).shuffle(questions)
    return {"corpus": corpus, "train": questions[:14], "validation": questions[14:18], "test": questions[18:]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def write_config(tmp_path: Path, models: dict[str, Path]) -> Callable[..., Path]:
    """Return a function that writes data and a config for the tiny models; keyword arguments replace whole sections."""

    def write(folder: str = ".", **sections: Any) -> Path:
        import yaml

        home = tmp_path / folder
        for name, rows in data_rows().items():
            write_rows(home / f"{name}.jsonl", rows)
        config: dict[str, Any] = {
            "run": {"name": "tiny", "output_dir": str(home / "runs")},
            "rag_system": {
                "retriever": {"model": str(models["retriever"])},
                "generator": {"model": str(models["generator"]), "max_new_tokens": 4},
                "top_k": 2,
            },
            "dataset": {name: {"path": f"{name}.jsonl"} for name in ("corpus", "train", "validation", "test")},
            "trainer": {
                "mode": "retriever",
                "retriever": {"top_k": 4, "batch_size": 4, "learning_rate": 1e-3, "epochs": 2},
                "generator": {"top_k": 2, "batch_size": 4, "learning_rate": 1e-2, "epochs": 1},
            },
            "evaluation": {"resamples": 200},
        }
        for name, section in sections.items():
            config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
        path = home / "config.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that takes the number of texts of every batch that goes through an encoder."""
    from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever

    sizes: list[int] = []
    embed = SentenceTransformerRetriever.embed

    def counting(self: SentenceTransformerRetriever, encoder: Any, features: Any) -> torch.Tensor:
        sizes.append(len(features["input_ids"]))
        return embed(self, encoder, features)

    monkeypatch.setattr(SentenceTransformerRetriever, "embed", counting)
    return sizes


@pytest.fixture
def config_of(write_config: Callable[..., Path], models: dict[str, Path], tmp_path: Path) -> Callable[..., Config]:
    """Return a function that gives a config with batches of 4 and a store at a place."""
    from fedrag_cli.config import load_config

    def made(
        place: str = "store",
        store: dict[str, Any] | None = None,
        rows: list[dict[str, Any]] | None = None,
        **retriever: Any,
    ) -> Config:
        section = {
            "retriever": {"model": str(models["retriever"]), "batch_size": 4, **retriever},
            "knowledge_store": {**(store or {}), "path": str(tmp_path / place)},
        }
        path = write_config(rag_system=section)
        if rows is not None:
            write_rows(tmp_path / "corpus.jsonl", rows)
        return load_config(path)

    return made


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an authority, a certificate of localhost, and keys of the nodes north and south."""
    from fedrag_cli.federated.keys import write_authority, write_node_key, write_server_certificate

    folder = tmp_path_factory.mktemp("keys")
    write_authority(folder)
    write_server_certificate(folder, ["localhost", "127.0.0.1"])
    for name in ("north", "south"):
        write_node_key(folder, name)
    return folder


SIMULATED_TRAINER = {
    "mode": "retriever",
    "retriever": {"top_k": 4, "batch_size": 4, "learning_rate": 1e-3, "epochs": 1, "validation": {"every": "never"}},
    "generator": {"top_k": 2, "batch_size": 4, "learning_rate": 1e-2, "max_steps": 2, "validation": {"every": "never"}},
}


@pytest.fixture
def simulate(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Return a function that simulates, and returns the run directory and the summary."""

    def run(*arguments: str, folder: str = "a", code: int = 0, **sections: Any) -> tuple[Path, dict[str, Any]]:
        config = write_config(folder, trainer=SIMULATED_TRAINER, federated={"rounds": 2}, **sections)
        capsys.readouterr()
        from fedrag_cli.cli.main import main

        assert main(["simulate", str(config), *arguments, "--json", "--quiet"]) == code
        document = json.loads(capsys.readouterr().out)
        return Path(document.get("run_dir", "")), document

    return run
