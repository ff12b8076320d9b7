"""The federation's pure parts: wire format, screening, agreement, strategies' state, saved rounds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from toy_federation import asking

from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.errors import ConnectionFailedError, FederationError, FedRAGError, ModelError
from fedrag_cli.federated.aggregation import weighted_mean
from fedrag_cli.federated.checkpoint import RoundState, load_newest_round, save_missing, save_round
from fedrag_cli.federated.fleet._flower import PIECE_BYTES, Incoming, Outgoing, Packer
from fedrag_cli.federated.fleet.auth import Claim
from fedrag_cli.federated.fleet.state import FleetState
from fedrag_cli.federated.handshake import Agreement, base_fingerprint, differences
from fedrag_cli.federated.validate_update import RefusedUpdateError, Update, screen_update
from fedrag_cli.federated.weights import (
    BLOCK,
    FileArray,
    Manifest,
    ScratchFile,
    from_wire,
    manifest_of,
    record_bytes,
    to_ndarrays,
    to_wire,
    weights_digest,
)

WEIGHTS = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[0.5]])}
MANIFEST = {"a": [1, 1], "b": [2]}
REFERENCE = to_wire({"a": torch.zeros(1, 1), "b": torch.zeros(2)})


def content(arrays: dict[str, Any] | None = None, **metrics: Any) -> RecordDict:
    chosen = {"a": np.ones((1, 1), np.float32), "b": np.ones(2, np.float32)} if arrays is None else arrays
    record = ArrayRecord({name: value if isinstance(value, Array) else Array(value) for name, value in chosen.items()})
    return RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 3, **metrics})})


def screen(given: RecordDict, manifest: Manifest, reference: ArrayRecord, **settings: Any) -> Update:
    return screen_update(given, manifest, reference, FederatedConfig(**{"metrics": (), **settings}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_cross_the_wire_as_float32_by_name(dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}
    record = to_wire(weights)
    assert list(record) == ["a", "b"]
    assert {array.dtype for array in record.values()} == {"float32"}
    back = from_wire(record)
    assert all(torch.equal(back[name], weights[name].float()) for name in weights)
    back["a"].add_(1)  # owns its memory


def test_float16_on_the_wire_rounds_once_and_halves_the_bytes() -> None:
    weights = {"w": torch.tensor([0.1, -65504.0, 1.0 + 2**-12, 3e-8])}
    record = to_wire(weights, "float16")
    assert record["w"].dtype == "float16"
    assert record_bytes(record) == 4 * 2 + 128
    back = from_wire(record)["w"]
    assert back.dtype == torch.float32
    assert torch.equal(back, weights["w"].half().float())
    assert torch.equal(from_wire(record, release=True)["w"], back)
    assert len(record) == 0


@pytest.mark.parametrize("value", [1e5, -65504.1, float("inf")])
def test_what_float16_cannot_carry_is_refused_by_the_tensors_name(value: float) -> None:
    weights = {"fits": torch.ones(2), "layer.weight": torch.tensor([1.0, value])}
    with pytest.raises(FederationError, match=r"layer\.weight holds values above 65504") as error:
        to_wire(weights, "float16")
    assert "transport_dtype" in error.value.hint


def test_an_update_in_float16_is_screened_as_float32() -> None:
    given = {"a": np.full((1, 1), 0.1, np.float16), "b": np.zeros(2, np.float16)}
    before = to_wire({"a": torch.full((1, 1), 3.0), "b": torch.ones(2)})
    update = screen(content(given), MANIFEST, before, transport_dtype="float16")
    (arrays,) = update.content().array_records.values()
    assert {array.dtype for array in arrays.values()} == {"float32"}
    assert arrays["a"].numpy().tolist() == [[float(np.float32(3) + np.float32(np.float16(0.1)))]]
    assert arrays["b"].numpy().tolist() == [1.0, 1.0]
    assert update.norm == pytest.approx(float(np.float16(0.1)), rel=1e-12)
    with pytest.raises(RefusedUpdateError, match="above the bound"):
        screen(content(given), MANIFEST, before, transport_dtype="float16", max_update_norm=0.09)
    with pytest.raises(RefusedUpdateError, match="a is float16, not float32"):
        screen(content(given), MANIFEST, REFERENCE)
    with pytest.raises(RefusedUpdateError, match="a is float32, not float16"):
        screen(content(), MANIFEST, REFERENCE, transport_dtype="float16")
    liar = Array(dtype="float16", shape=(1, 1), stype="numpy.ndarray", data=Array(np.ones((1, 1), np.float32)).data)
    with pytest.raises(RefusedUpdateError, match="not what its header says"):
        screen(content({**given, "a": liar}), MANIFEST, REFERENCE, transport_dtype="float16")


def test_manifest_bytes_and_digest() -> None:
    assert manifest_of(WEIGHTS) == MANIFEST
    assert record_bytes(to_wire(WEIGHTS)) == 3 * 4 + 2 * 128
    changed = {**WEIGHTS, "a": WEIGHTS["a"] + 1e-6}
    assert weights_digest(WEIGHTS) == weights_digest(dict(reversed(WEIGHTS.items())))
    assert weights_digest(WEIGHTS) != weights_digest(changed)


def test_an_update_that_passes() -> None:
    given = {"b": np.array([3, 4], np.float32), "a": np.array([[12]], np.float32)}
    update = screen(content(given, loss=0.5, secret=1.0), MANIFEST, REFERENCE, metrics=["loss"], max_update_norm=13.0)
    assert update.norm == 13.0
    assert (update.examples, update.metrics) == (3, {"loss": 0.5})
    assert list(update.arrays) == ["a", "b"]
    (metrics,) = update.content().metric_records.values()
    assert dict(metrics) == {"num-examples": 3, "train_loss": 0.5}


@pytest.mark.parametrize(
    ("arrays", "metrics", "reason"),
    [
        ({"a": np.ones((1, 1), np.float32)}, {}, "the tensor b is missing"),
        ({"a": np.ones((1, 1), np.float32), "b": np.ones(2, np.float32), "c": np.ones(1)}, {}, "not agreed on"),
        ({"a": np.ones((1, 1), np.float32), "b": np.ones(3, np.float32)}, {}, "b has the shape (3,), not (2,)"),
        ({"a": np.ones((1, 1), np.float64), "b": np.ones(2, np.float32)}, {}, "a is float64, not float32"),
        ({"a": np.ones((1, 1), np.float32), "b": np.array([1, np.nan], np.float32)}, {}, "b holds values that are not"),
        ({"a": np.array([[np.inf]], np.float32), "b": np.ones(2, np.float32)}, {}, "a holds values that are not"),
        ({"a": np.array([[3e38]], np.float32), "b": np.full(2, -3e38, np.float32)}, {}, "its norm 5.196e+38 is above"),
        (None, {"num-examples": 0}, "no training example"),
        (None, {"num-examples": -5}, "no whole number"),
        (None, {"num-examples": 1.5}, "no whole number"),
        (None, {"loss": float("nan")}, "its loss is not finite"),
        (None, {"loss": [1.0, 2.0]}, "its loss is not finite"),
        (None, {"loss": 1e308}, "its loss is not finite"),
        (None, {"validation-examples": 1e308}, "validation examples is no whole number"),
        (None, {"validation-examples": -1}, "validation examples is no whole number"),
    ],
)
def test_updates_that_are_refused(arrays: dict[str, Any] | None, metrics: dict[str, Any], reason: str) -> None:
    with pytest.raises(RefusedUpdateError) as refusal:
        screen(content(arrays, **metrics), MANIFEST, REFERENCE, metrics=["loss"], max_update_norm=1e6)
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"garbage", "a cannot be read"),
        (b"", "a cannot be read"),
        (b"PK\x03\x04" + b"\0" * 60, "a cannot be read"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999,), }", "a cannot be"),
    ],
)
def test_arrays_that_lie_about_themselves(data: bytes, reason: str) -> None:
    liar = Array(dtype="float32", shape=(1, 1), stype="numpy.ndarray", data=data)
    with pytest.raises(RefusedUpdateError, match=reason):
        screen(content({"a": liar, "b": np.ones(2, np.float32)}), MANIFEST, REFERENCE)
    other = Array(np.ones((5, 5), np.float32))
    liar = Array(dtype="float32", shape=(1, 1), stype="numpy.ndarray", data=other.data)
    with pytest.raises(RefusedUpdateError, match="not what its header says"):
        screen(content({"a": liar, "b": np.ones(2, np.float32)}), MANIFEST, REFERENCE)


def test_no_tensors_and_no_metrics_are_refused() -> None:
    with pytest.raises(RefusedUpdateError, match="no tensors"):
        screen(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), MANIFEST, REFERENCE)
    arrays = content().array_records["arrays"]
    with pytest.raises(RefusedUpdateError, match="no metrics"):
        screen(RecordDict({"arrays": arrays}), MANIFEST, REFERENCE)


AGREEMENT = Agreement(1, "retriever", MANIFEST, {"generator": "00"}, {"trainer.retriever.top_k": 8})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"protocol": 2}, ["protocol 2, but the server speaks 1 (use the same version of fedrag)"]),
        ({"side": "generator"}, ["tunes the generator, but the server the retriever (trainer.mode)"]),
        ({"models": {"generator": "01"}}, ["another generator model"]),
        ({"models": {}}, ["another generator model"]),
        (
            {"settings": {"trainer.retriever.top_k": 4, "x": None}},
            [
                "trainer.retriever.top_k is 4, but the server has 8",
                "x is null, but the server has not set",
            ],
        ),
        ({"manifest": {"a": [1, 1], "b": [3]}}, ["trained tensor b is of shape (3,), but on the server of shape (2,)"]),
        ({"manifest": {"a": [1, 1]}}, ["trained tensor b is missing, but on the server of shape (2,)"]),
    ],
)
def test_differences_are_said_in_words(change: dict[str, Any], words: list[str]) -> None:
    assert differences(AGREEMENT, dataclasses.replace(AGREEMENT, **change)) == words


def test_an_agreement_survives_the_wire_and_garbage_does_not() -> None:
    assert Agreement.from_json(AGREEMENT.to_json()) == AGREEMENT
    for text in (
        "",
        "[]",
        "{}",
        "nonsense",
        '{"protocol": 1}',
        json.dumps({**json.loads(AGREEMENT.to_json()), "manifest": 5}),
    ):
        with pytest.raises(ConnectionFailedError, match="handshake cannot be read"):
            Agreement.from_json(text)
    values = json.loads(AGREEMENT.to_json())
    with pytest.raises(ConnectionFailedError):
        Agreement.from_json(json.dumps({**values, "manifest": {"a": [float("inf")]}}))
    long = Agreement.from_json(json.dumps({**values, "side": "x" * 10_000, "settings": {"k" * 10_000: "v" * 10_000}}))
    assert len(" ".join(differences(AGREEMENT, long))) < 500


def test_the_base_fingerprint_ignores_number_format_and_adapters(models: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    from fedrag_cli.trainers.config import LoRAConfig
    from fedrag_cli.trainers.huggingface.generator import add_adapter

    model = AutoModelForCausalLM.from_pretrained(models["generator"])
    known = base_fingerprint(model, {"a": 1})
    assert base_fingerprint(model, {"a": 2}) != known
    assert base_fingerprint(model.to(torch.bfloat16), {"a": 1}) == known
    adapted = add_adapter(model, LoRAConfig(r=2), seed=1)
    assert base_fingerprint(adapted, {"a": 1}) == known
    other = AutoModelForCausalLM.from_pretrained(models["chat_generator"])
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    assert base_fingerprint(other, {"a": 1}) != known


def test_rounds_are_saved_whole_and_the_newest_two_are_kept(tmp_path: Path) -> None:
    assert load_newest_round(tmp_path) is None
    for number in range(4):
        weights = {"a": torch.full((2,), float(number))}
        strategy = {"m_t/dict/a": np.full(2, number / 2)}
        state = RoundState(number, weights, strategy, [{"round": number}], {"0": {"server": {"n": 1}}})
        save_round(tmp_path, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-0002", "round-0003"]
    newest = load_newest_round(tmp_path)
    assert newest is not None
    assert (newest.number, newest.history, newest.weights["a"].tolist()) == (3, [{"round": 3}], [3.0, 3.0])
    assert newest.strategy["m_t/dict/a"].tolist() == [1.5, 1.5]
    # While the weights are on their way, who has got them is saved without them.
    save_missing(tmp_path, dataclasses.replace(newest, weights={}, missing=["b"]))
    newest = load_newest_round(tmp_path)
    assert newest is not None
    assert (newest.missing, newest.weights["a"].tolist()) == (["b"], [3.0, 3.0])
    (tmp_path / "round-0003" / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match="cannot be read") as error:
        load_newest_round(tmp_path)
    assert "round-0003" in error.value.message


def received(sent: Outgoing, folder: Path, most: int = 2**30) -> Incoming:
    """Return a message that has come with all its pieces."""
    incoming = Incoming(sent.head, sent.tree, folder, most)
    for object_id in incoming.missing:
        assert incoming.put(object_id, sent.piece(object_id) or b"")
    return incoming


def test_a_message_crosses_in_pieces_and_its_tensors_lie_in_a_file_without_a_name(tmp_path: Path) -> None:
    # Zeros are one piece that occurs often; small tensors share a piece.
    tensors = {"zeros": torch.zeros(1_000_000), "noise": torch.randn(300_000), "one": torch.tensor(1.5)}
    tensors |= {f"small{number}": torch.full((3,), float(number)) for number in range(200)}
    sent = RecordDict({"arrays": to_wire(tensors), "metrics": MetricRecord({"num-examples": 3})})
    outgoing = Packer().pack(asking(sent), "id")
    total = record_bytes(sent.array_records["arrays"])
    assert len(outgoing.tree.children) == -(-total // PIECE_BYTES)
    assert len({child.object_id for child in outgoing.tree.children}) < len(outgoing.tree.children)
    # The bare message has no numbers of the tensors.
    assert outgoing.head.ByteSize() < 30_000
    content = received(outgoing, tmp_path).content()
    assert content["metrics"] == sent["metrics"]
    arrays = content.array_records["arrays"]
    assert list(tmp_path.iterdir()) == []
    assert record_bytes(arrays) == total
    assert list(arrays) == list(sent.array_records["arrays"])
    for name, tensor in tensors.items():
        assert isinstance(arrays[name], FileArray)
        assert torch.equal(from_wire(arrays)[name], tensor)
        assert arrays[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_the_same_record_to_many_clients_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    monkeypatch.setattr(hashlib, "sha256", lambda data, real=hashlib.sha256: hashed.append(len(data)) or real(data))
    packer, record = Packer(), to_wire({"w": torch.zeros(100_000)})
    packed = [packer.pack(asking(RecordDict({"arrays": record})), str(number)) for number in range(50)]
    assert len(hashed) == 1
    other = packer.pack(asking(RecordDict({"arrays": to_wire({"w": torch.ones(100_000)})})), "other")
    assert (
        other.tree.children[0].object_id
        != packed[0].tree.children[0].object_id
        == packed[49].tree.children[0].object_id
    )


def test_a_piece_that_is_not_what_was_announced_is_not_taken(tmp_path: Path) -> None:
    outgoing = Packer().pack(asking(RecordDict({"arrays": to_wire({"w": torch.randn(200_000)})})), "id")
    incoming = Incoming(outgoing.head, outgoing.tree, tmp_path, 2**30)
    first, second = incoming.missing
    piece = bytearray(outgoing.piece(first) or b"")
    piece[1000] ^= 1
    for wrong in (bytes(piece), bytes(piece[:-1]), b"", outgoing.piece(second) or b""):
        assert not incoming.put(first, wrong)
    assert not incoming.put("0" * 64, b"never announced")
    assert incoming.missing == [first, second]
    assert incoming.put(first, outgoing.piece(first) or b"")
    assert incoming.missing == [second]


def test_a_message_that_lies_about_its_size_is_none(tmp_path: Path) -> None:
    outgoing = Packer().pack(asking(RecordDict({"arrays": to_wire({"w": torch.zeros(4_000_000)})})), "id")
    # What would become huge is seen before it does.
    with pytest.raises(ValueError, match="larger than agreed"):
        Incoming(outgoing.head, outgoing.tree, tmp_path, 12_000_000)
    tree = outgoing.tree
    del tree.children[-1]
    with pytest.raises(ValueError, match="do not add up"):
        Incoming(outgoing.head, tree, tmp_path, 2**30)
    array = outgoing.head.content.items[0].array_record.items[0].value
    array.data = b"all of it"
    with pytest.raises(ValueError, match="how large"):
        Incoming(outgoing.head, outgoing.tree, tmp_path, 2**30)


def test_a_disk_that_takes_no_reply_ends_the_round_in_words(tmp_path: Path) -> None:
    state = FleetState(tmp_path / "never made", 2**30)
    client = state.activate(Claim(b"key", f"{state._start}-0-session", 1, "", "127.0.0.1"))
    question = asking(RecordDict())
    question.metadata.__dict__["_dst_node_id"] = client.member.node_id
    message_id = state.ask(question)
    content = RecordDict({"arrays": to_wire({"w": torch.zeros(3)})})
    reply = Packer().pack(Message(content, reply_to=question), "reply")
    with pytest.raises(OSError, match="No such file"):
        state.announce(client, reply.head, reply.tree)
    with pytest.raises(FedRAGError, match=r"Cannot write .*never made"):
        state.take(message_id)


def test_the_mean_is_summed_in_float64_wherever_the_updates_lie(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    # Longer than two blocks; and so far apart that float32 sums would lose the small ones.
    tensors = [torch.randn(2 * BLOCK + 7, generator=generator) * scale for scale in (1e4, 1.0, 1e-3)]
    examples = [3, 1_000_001, 7]
    updates = []
    for tensor, count in zip(tensors, examples, strict=True):
        array = to_wire({"w": tensor})["w"]
        file = ScratchFile(tmp_path)
        file.write(array.data, 6)
        lying = FileArray(array.dtype, array.shape, array.stype, file, 6, len(array.data))
        updates.append(Update({"w": lying if count == 7 else array}, count, {}, 0.0))
    mean = weighted_mean(updates, {"w": [2 * BLOCK + 7]})["w"]
    exact = sum(tensor.double() * count for tensor, count in zip(tensors, examples, strict=True)) / sum(examples)
    assert torch.equal(mean, exact.float())
    assert torch.equal(weighted_mean(updates[:1], {"w": [2 * BLOCK + 7]})["w"], tensors[0])


def test_the_memory_of_the_mean_does_not_grow_with_the_clients(tmp_path: Path) -> None:
    size = 4_000_000
    data = to_wire({"w": torch.arange(float(size))})["w"].data
    reference = to_wire({"w": torch.zeros(size)})
    updates = []
    for _ in range(6):
        file = ScratchFile(tmp_path)
        file.write(data, 0)
        updates.append(Update({"w": FileArray("float32", (size,), "numpy.ndarray", file, 0, len(data))}, 2, {}, 0.0))
    tracemalloc.start()
    mean = weighted_mean(updates, {"w": [size]})["w"]
    update = RecordDict({"arrays": ArrayRecord(), "metrics": MetricRecord({"num-examples": 1})})
    update.array_records["arrays"]["w"] = updates[0].arrays["w"]
    screened = screen(update, {"w": [size]}, reference)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(mean, torch.arange(float(size)))
    assert screened.norm == pytest.approx(float(mean.double().norm()), rel=1e-12)
    # The mean, and a block of each client; the updates alone would be six times as large.
    assert peak < 3 * 4 * size


@pytest.mark.parametrize("cut", [-4, 4])
def test_an_array_that_ends_elsewhere_than_it_says_is_refused(cut: int) -> None:
    honest = Array(np.ones(2, np.float32))
    data = honest.data[:cut] if cut < 0 else honest.data + b"\0" * cut
    liar = Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=data)
    with pytest.raises(RefusedUpdateError, match="b cannot be read"):
        screen(content({"a": np.ones((1, 1), np.float32), "b": liar}), MANIFEST, REFERENCE)
    columns = Array(np.asfortranarray(np.arange(4, dtype=np.float32).reshape(2, 2)))
    with pytest.raises(RefusedUpdateError, match="c cannot be read"):
        screen(content({"c": columns}), {"c": [2, 2]}, to_wire({"c": torch.zeros(2, 2)}))


def test_arrays_of_the_classic_api_are_ordered_by_name() -> None:
    assert [array.shape for array in to_ndarrays(WEIGHTS)] == [(1, 1), (2,)]
