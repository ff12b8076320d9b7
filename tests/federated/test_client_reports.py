"""What a client tells the server and its own log: its loss, what it measured, and how much it sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fl_tasks import SECTIONS, make_manager, make_task
from flwr.app import ConfigRecord, Message, RecordDict
from torch import Tensor
from toy_federation import Recorder, asking

from fedrag_cli.commands.run_data import load_run_data
from fedrag_cli.config import load_config
from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.federated.client import ClientHandler
from fedrag_cli.federated.messages import EVALUATE_FIRST, ROUNDS, SERVER_ROUND
from fedrag_cli.federated.task import FLTask
from fedrag_cli.federated.weights import Weights, from_wire, to_wire
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.trainer_managers.build import build_manager


def train_once(
    task: FLTask, weights: Weights, *, evaluate_first: bool = False, reporter: Recorder | None = None
) -> Message:
    """Let a client train round 1 of 2 from some weights, and return its reply."""
    config = ConfigRecord({SERVER_ROUND: 1, ROUNDS: 2, EVALUATE_FIRST: evaluate_first})
    content = RecordDict({"arrays": to_wire(weights, task.settings.transport_dtype), "config": config})
    return ClientHandler(task, "a", reporter)(asking(content))


def metrics_of(reply: Message) -> dict[str, Any]:
    (record,) = reply.content.metric_records.values()
    return dict(record)


@torch.no_grad()
def answer_log_probs(rag: RAGSystem, example: Example, node: KnowledgeNode, *, with_end: bool) -> Tensor:
    """Return the log-probability of each token of an answer, from the plain logits of the language model."""
    generator = rag.require_generator()
    encoded = generator.prompts.encode_pair(example.query, [node], example.response, with_end=with_end)
    prompt, answer = encoded.ids, encoded.answer
    logits = generator.model(torch.tensor([prompt + answer])).logits[0].double()
    found = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1]
    return found.gather(1, torch.tensor(answer)[:, None])[:, 0]


def nearest(rag: RAGSystem, query: str, top_k: int) -> tuple[list[KnowledgeNode], Tensor]:
    """Return the best passages and their scores, by multiplying with every passage."""
    store = rag.knowledge_store
    scores = store.embeddings.double() @ rag.retriever.encode_queries([query])[0].double()
    best = scores.argsort(descending=True)[:top_k]
    return [store.nodes[place] for place in best.tolist()], scores[best]


def lsr_by_hand(rag: RAGSystem, examples: list[Example]) -> float:
    """KL(softmax(mean log-likelihood / 0.1) || softmax(similarity / 0.05)) over the best 4 passages."""
    total = 0.0
    for example in examples:
        nodes, scores = nearest(rag, example.query, 4)
        likelihoods = torch.stack([answer_log_probs(rag, example, node, with_end=False).mean() for node in nodes])
        teacher, learner = (likelihoods / 0.1).softmax(0), (scores / 0.05).softmax(0)
        total += float((teacher * (teacher.log() - learner.log())).sum())
    return total / len(examples)


def ralt_by_hand(rag: RAGSystem, examples: list[Example]) -> float:
    """Mean negative log-likelihood of the answers' tokens, each answer after each of its best 2 passages."""
    found: list[Tensor] = []
    for example in examples:
        for node in nearest(rag, example.query, 2)[0]:
            found.append(answer_log_probs(rag, example, node, with_end=True))
    return -float(torch.cat(found).mean())


@pytest.mark.parametrize(("side", "by_hand"), [("retriever", lsr_by_hand), ("generator", ralt_by_hand)])
def test_the_reported_loss_is_that_of_the_clients_own_data(
    write_config: Callable[..., Path], side: str, by_hand: Callable[[RAGSystem, list[Example]], float]
) -> None:
    """With all examples in a single step, the loss of training is that of the weights that were received."""
    task = make_task(write_config, side, batch_size=64)
    start, examples = task.weights(), task.trainer.train_examples
    expected = [by_hand(task.trainer.rag_system, part) for part in (examples[:5], examples[5:])]
    assert abs(expected[0] - expected[1]) > 1e-3
    for part, loss in zip((examples[:5], examples[5:]), expected, strict=True):
        sent = metrics_of(train_once(task.around(None, part), start))
        assert sent["num-examples"] == len(part)
        assert sent["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("side", ["retriever", "generator"])
def test_the_reported_loss_of_many_steps_is_the_mean_of_those_of_training(
    write_config: Callable[..., Path], side: str
) -> None:
    for part in (slice(0, 5), slice(5, 14)):
        section = {**SECTIONS[side][side], "epochs": 2, "batch_size": 2}  # type: ignore[dict-item]
        config = load_config(write_config(trainer={"mode": side, side: section}))
        data, recorder = load_run_data(config), Recorder()
        system = build_rag_system(config, nodes=data.nodes)
        build_manager(config, system, train=data.train[part], validation=[], reporter=recorder).train()
        losses = [event["loss"] for event in recorder.events if event["event"] == "train_step"]
        assert len(losses) > 4
        task = make_task(write_config, side, epochs=2, batch_size=2)
        client = task.around(None, task.trainer.train_examples[part])
        sent = metrics_of(train_once(client, client.weights()))
        assert sent["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_a_client_measures_the_weights_that_it_received(write_config: Callable[..., Path]) -> None:
    settings = FederatedConfig(metrics=("loss", "validation_loss", "mrr"))
    manager = make_manager(write_config, "retriever", learning_rate=3e-2, epochs=4)
    task = manager.get_federated_task(settings)
    own, draw = task.weights(), torch.Generator().manual_seed(3)
    received = {name: tensor + 0.02 * torch.randn(tensor.shape, generator=draw) for name, tensor in own.items()}
    expected = task.evaluate(received).metrics
    assert set(expected) == {"validation_loss", "mrr"}
    # What the model held before, and what it holds after training, are measured differently.
    before = task.evaluate(own).metrics
    recorder = Recorder()
    reply = train_once(task, received, evaluate_first=True, reporter=recorder)
    (arrays,) = reply.content.array_records.values()
    after = task.evaluate(from_wire(arrays)).metrics
    sent = metrics_of(reply)
    assert sent["validation-examples"] == 4
    for name in ("validation_loss", "mrr"):
        assert sent[name] == pytest.approx(expected[name], abs=1e-6), name
        assert abs(sent[name] - after[name]) > 1e-3, name
    assert abs(sent["validation_loss"] - before["validation_loss"]) > 1e-3
    (event,) = [event for event in recorder.events if event["event"] == "client_evaluation"]
    # The weights that round 1 begins with are those after round 0.
    assert event["round"] == 0
    assert event["metrics"] == pytest.approx(expected, abs=1e-6)


def size_of(weights: Mapping[str, Tensor], width: int) -> int:
    """Return the bytes of tensors on the wire: their numbers, and a head of 128 bytes each."""
    return sum(tensor.numel() * width + 128 for tensor in weights.values())


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("float16", 2)])
@pytest.mark.parametrize("side", ["retriever", "generator"])
def test_a_client_says_what_it_sends(write_config: Callable[..., Path], side: str, dtype: Any, width: int) -> None:
    task = make_manager(write_config, side).get_federated_task(FederatedConfig(transport_dtype=dtype))
    start, recorder = task.weights(), Recorder()
    reply = train_once(task, start, evaluate_first=True, reporter=recorder)
    (arrays,) = reply.content.array_records.values()
    size = size_of(start, width)
    assert sum(len(array.data) for array in arrays.values()) == size
    measured = task.evaluate(start).metrics["validation_loss"]
    assert recorder.notes == [
        f"Round 1 of 2: received the global model, {size / 1e6:.1f} MB",
        f"The global model on 4 validation questions (round 1, before training): validation_loss {measured:.4f}",
        f"Round 1 of 2: sending {len(start)} tensors, {size / 1e6:.1f} MB, with num-examples 14, "
        "validation-examples, loss, validation_loss; then waiting",
    ]
    (event,) = [event for event in recorder.events if event["event"] == "client_round"]
    assert (event["bytes_sent"], event["bytes_received"], event["examples"]) == (size, size, 14)
    # Nothing leaves the client that the line does not name.
    assert set(metrics_of(reply)) == {"num-examples", "validation-examples", "loss", "validation_loss"}
    assert set(reply.content) == {"arrays", "metrics"}
