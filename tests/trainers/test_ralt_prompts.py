"""RALT's instances and batches: loss on the answer and its end token, and on nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import data_rows

from fedrag_cli.config import PromptConfig
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import DataError
from fedrag_cli.rag.build import build_knowledge_store
from fedrag_cli.rag.config import CausalLMConfig, SentenceTransformerConfig
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.runs.reporter import SilentReporter
from fedrag_cli.trainers.config import RALTConfig
from fedrag_cli.trainers.huggingface import HuggingFaceTrainerForRALT
from fedrag_cli.trainers.huggingface.generator import answer_loss

ROWS = [
    {"query": "what is the colour of the cat ?", "response": "red"},
    {"query": "where ?", "response": "in the red house near the old tree"},
    {"query": "where is the owl and the fox and the hen and the cow ?", "response": "barn"},
]


def trainer_of(models: dict[str, Path], name: str = "generator", *, window: int | None = None, **settings: Any) -> Any:
    retriever = SentenceTransformerRetriever.from_config(
        SentenceTransformerConfig(model=str(models["retriever"])), device="cpu"
    )
    nodes = [KnowledgeNode(row["id"], row["text"]) for row in data_rows()["corpus"]]
    generator = CausalLMGenerator.from_config(
        CausalLMConfig(model=str(models[name]), max_new_tokens=40, context_window=window),
        prompt=PromptConfig(),
        device="cpu",
    )
    system = RAGSystem(retriever, build_knowledge_store(retriever, nodes, SilentReporter()), generator, top_k=2)
    return HuggingFaceTrainerForRALT(system, ROWS, config=RALTConfig(**{"top_k": 3, "lora": None, **settings}))


@pytest.mark.parametrize("name", ["generator", "chat_generator", "gpt2"])
def test_supervised_tokens_are_the_answers_and_the_end_token_and_nothing_else(
    models: dict[str, Path], name: str
) -> None:
    trainer = trainer_of(models, name)
    tokenizer = trainer.rag_system.generator.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    instances = trainer.instances(trainer.train_examples)
    batch = trainer._collate(instances)
    assert len({len(item.prompt) + len(item.answer) for item in instances}) > 3
    answers = [row["response"] for row in ROWS for _ in range(3)]
    for row, answer in enumerate(answers):
        ids, labels, mask = (batch[key][row] for key in ("input_ids", "labels", "attention_mask"))
        supervised = labels != -100
        text = answer if name == "chat_generator" else " " + answer
        expected = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert labels[supervised].tolist() == expected
        assert ids[supervised].tolist() == expected
        # They stand together at the very end; the padding is on the left.
        width, length = len(mask), int(mask.sum())
        assert supervised.nonzero().flatten().tolist() == list(range(width - len(expected), width))
        assert mask.tolist() == [0] * (width - length) + [1] * length
        assert ids[: width - length].eq(tokenizer.pad_token_id).all()
        assert batch["position_ids"][row, width - length :].tolist() == list(range(length))
        prompt = tokenizer.decode(ids[width - length : width - len(expected)])
        assert ROWS[row // 3]["query"] in prompt
        assert tokenizer.eos_token not in prompt.removesuffix("<|end|><|assistant|>")


@pytest.mark.parametrize("name", ["generator", "gpt2"])
def test_the_models_loss_on_a_batch_is_that_of_the_answers_alone(models: dict[str, Path], name: str) -> None:
    trainer = trainer_of(models, name)
    instances = trainer.instances(trainer.train_examples)
    batch = trainer._collate(instances)
    labels = batch.pop("labels")
    with torch.no_grad():
        outputs = trainer.model(**batch)
        loss = float(answer_loss(outputs, labels))
    # Logits are computed where they are needed only.
    assert outputs.logits.shape[1] == max(len(item.answer) for item in instances) + 1
    totals = trainer.rag_system.generator.log_probs_of_ids([(item.prompt, item.answer) for item in instances])
    tokens = sum(len(item.answer) for item in instances)
    assert loss == pytest.approx(-float(totals.sum()) / tokens, abs=1e-4)


def test_separate_passages_make_an_instance_each_and_together_one(models: dict[str, Path]) -> None:
    separate, together = trainer_of(models), trainer_of(models, passages="together")
    tokenizer = separate.rag_system.generator.tokenizer
    found = separate.rag_system.batch_retrieve([row["query"] for row in ROWS], 3)
    alone = separate.instances(separate.train_examples)
    joined = together.instances(together.train_examples)
    assert (len(alone), len(joined)) == (9, 3)
    for row, scored in enumerate(found):
        texts = [item.node.text for item in scored]
        for column, own in enumerate(texts):
            prompt = tokenizer.decode(alone[3 * row + column].prompt)
            assert [text in prompt for text in texts] == [text == own for text in texts]
        assert "\n".join(texts) in tokenizer.decode(joined[row].prompt)
        assert alone[3 * row].answer == joined[row].answer


def test_a_long_context_is_cut_and_question_and_answer_stay(models: dict[str, Path]) -> None:
    trainer = trainer_of(models, window=110, passages="together", top_k=10)
    tokenizer = trainer.rag_system.generator.tokenizer
    instances = trainer._prepare(None, None)
    for item, row in zip(instances, ROWS, strict=True):
        assert len(item.prompt) + len(item.answer) <= 110
        assert tokenizer.decode(item.prompt).endswith(f"Question: {row['query']}\nAnswer:")
        assert tokenizer.decode(item.answer) == f" {row['response']}<|end|>"
    assert trainer._counts()["prompts"]["truncated"] == 3


def test_an_example_without_an_answer_is_refused(models: dict[str, Path]) -> None:
    trainer = trainer_of(models)
    with pytest.raises(DataError):
        HuggingFaceTrainerForRALT(trainer.rag_system, [{"query": "q", "response": "  "}], config=RALTConfig(lora=None))
