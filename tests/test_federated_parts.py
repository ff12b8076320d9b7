"""The federation's pure parts: wire format, screening, agreement, strategies' state, saved rounds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from fedrag_cli.errors import ConnectionFailedError, ModelError
from fedrag_cli.federated.agreement import Agreement, base_fingerprint, differences
from fedrag_cli.federated.rounds import RoundState, load_newest_round, save_round
from fedrag_cli.federated.screening import RefusedUpdateError, screen_update
from fedrag_cli.federated.weights import (
    from_wire,
    manifest_of,
    record_bytes,
    record_digest,
    to_arrays,
    to_wire,
)

WEIGHTS = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([[0.5]])}
MANIFEST = {"a": [1, 1], "b": [2]}
REFERENCE = {"a": np.zeros((1, 1), np.float32), "b": np.zeros(2, np.float32)}


def content(arrays: dict[str, Any] | None = None, **metrics: Any) -> RecordDict:
    chosen = {"a": np.ones((1, 1), np.float32), "b": np.ones(2, np.float32)} if arrays is None else arrays
    record = ArrayRecord({name: value if isinstance(value, Array) else Array(value) for name, value in chosen.items()})
    return RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 3, **metrics})})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_cross_the_wire_as_float32_by_name(dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}
    record = to_wire(weights)
    assert list(record) == ["a", "b"]
    assert {array.dtype for array in record.values()} == {"float32"}
    back = from_wire(record)
    assert all(torch.equal(back[name], weights[name].float()) for name in weights)
    back["a"].add_(1)  # owns its memory


def test_manifest_bytes_and_digest() -> None:
    assert manifest_of(WEIGHTS) == MANIFEST
    assert record_bytes(to_wire(WEIGHTS)) == 3 * 4 + 2 * 128
    changed = {**WEIGHTS, "a": WEIGHTS["a"] + 1e-6}
    assert record_digest(to_wire(WEIGHTS)) == record_digest(to_wire(dict(reversed(WEIGHTS.items()))))
    assert record_digest(to_wire(WEIGHTS)) != record_digest(to_wire(changed))


def test_an_update_that_passes() -> None:
    given = {"b": np.array([3, 4], np.float32), "a": np.array([[12]], np.float32)}
    update = screen_update(content(given, loss=0.5, secret=1.0), MANIFEST, REFERENCE, metrics=["loss"], max_norm=13.0)
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
        screen_update(content(arrays, **metrics), MANIFEST, REFERENCE, metrics=["loss"], max_norm=1e6)
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
        screen_update(content({"a": liar, "b": np.ones(2, np.float32)}), MANIFEST, REFERENCE)
    other = Array(np.ones((5, 5), np.float32))
    liar = Array(dtype="float32", shape=(1, 1), stype="numpy.ndarray", data=other.data)
    with pytest.raises(RefusedUpdateError, match="not what its header says"):
        screen_update(content({"a": liar, "b": np.ones(2, np.float32)}), MANIFEST, REFERENCE)


def test_no_tensors_and_no_metrics_are_refused() -> None:
    with pytest.raises(RefusedUpdateError, match="no tensors"):
        screen_update(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), MANIFEST, REFERENCE)
    arrays = content().array_records["arrays"]
    with pytest.raises(RefusedUpdateError, match="no metrics"):
        screen_update(RecordDict({"arrays": arrays}), MANIFEST, REFERENCE)


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
    from fedrag_cli.trainers.huggingface.adapters import add_adapter

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
    (tmp_path / "round-0003" / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match="cannot be read") as error:
        load_newest_round(tmp_path)
    assert "round-0003" in error.value.message


def test_a_small_reply_that_would_become_huge_is_seen_before_it_does() -> None:
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    from fedrag_cli.federated.fleet.state import expanded_bytes

    record = ArrayRecord({"w": Array(np.zeros(4_000_000, np.float32))})
    contents = {key: value.deflate() for key, value in get_all_nested_objects(record).items()}
    # Zeros are one piece that occurs three times, and a last shorter one.
    assert sum(map(len, contents.values())) < 12_000_000
    assert 16_000_000 <= expanded_bytes(contents) < 16_001_000
    with pytest.raises((KeyError, ValueError)):
        expanded_bytes({"x": b"garbage"})


def test_to_arrays_is_ordered_by_name() -> None:
    assert list(to_arrays(WEIGHTS)) == ["a", "b"]
