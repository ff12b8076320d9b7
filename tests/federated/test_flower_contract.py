"""What this package uses of Flower's internals, which may change with any release; each failure says what broke."""

from __future__ import annotations

import ast
import importlib
import inspect
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

import fedrag_cli
from fedrag_cli.federated.fleet import _flower as flower
from fedrag_cli.federated.keys import load_public_key, write_node_key
from fedrag_cli.federated.weights import NUMPY

FLOWER = f"flwr {version('flwr')}"
# What Flower's documentation names, for apps and for the classic API.
PUBLIC = {
    "flwr.app",
    "flwr.client",
    "flwr.clientapp",
    "flwr.common",
    "flwr.server",
    "flwr.server.client_proxy",
    "flwr.server.strategy",
    "flwr.serverapp",
    "flwr.serverapp.strategy",
}
NAMES = [
    ("flwr.app.exception", "AppExitException", "a strategy that fails would end the server without words"),
    ("flwr.app.message", "make_message", "a message could not be sent without its tensors"),
    ("flwr.common.constant", "ErrorCode", "a client could not say that its work failed"),
    ("flwr.common.serde", "message_from_proto", "messages could not be read"),
    ("flwr.common.serde", "message_to_proto", "messages could not be written"),
    ("flwr.supercore.constant", "FLEET_HTTP_PUBLIC_KEY_HEADER", "requests would carry no key"),
    ("flwr.supercore.constant", "FLEET_HTTP_SIGNATURE_HEADER", "requests would carry no signature"),
    ("flwr.supercore.primitives", "asymmetric", "requests could not be signed"),
    ("flwr.supercore.run", "Run", "no strategy could ask a grid for its run"),
    ("flwr.supercore.task_identity", "TaskIdentity", "no message could be made outside of Flower's own processes"),
]
SIGNATURES = [
    (flower.make_message, ["metadata", "content", "error"]),
    (flower.message_from_proto, ["message_proto"]),
    (flower.message_to_proto, ["message"]),
    (flower.asymmetric.bytes_to_public_key, ["public_key_bytes"]),
    (flower.asymmetric.public_key_to_bytes, ["public_key"]),
    (flower.asymmetric.sign_message, ["private_key", "message"]),
    (flower.asymmetric.verify_signature, ["public_key", "message", "signature"]),
    (flower.Run.create_empty, ["run_id"]),
    (flower.Error, ["code", "reason"]),
]
FIELDS = {
    flower.ACTIVATE: ({"public_key", "heartbeat_interval"}, {"node_id"}),
    flower.DEACTIVATE: ({"node_id"}, set()),
    flower.HEARTBEAT: ({"node"}, {"success"}),
    flower.PULL_MESSAGES: ({"node"}, {"messages_list", "message_object_trees"}),
    flower.PUSH_MESSAGES: (
        {"node", "messages_list", "message_object_trees"},
        {"results", "objects_to_push"},
    ),
    flower.PULL_OBJECT: ({"node", "object_id"}, {"object_found", "object_available", "object_content"}),
    flower.PUSH_OBJECT: ({"node", "object_id", "object_content"}, {"stored"}),
}


def test_only_one_module_knows_what_is_not_documented() -> None:
    """The linter bans what is known to be internal; this finds what it does not know."""
    root = Path(fedrag_cli.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else names
            found |= {(path.name, name) for name in names if name.split(".")[0] == "flwr" and name not in PUBLIC}
    assert {file for file, _ in found} == {"_flower.py"}, f"Import it from federated/fleet/_flower.py: {found}"


@pytest.mark.parametrize(("module", "name", "loss"), NAMES)
def test_a_name(module: str, name: str, loss: str) -> None:
    try:
        known = importlib.import_module(module)
    except ImportError as error:
        pytest.fail(f"{FLOWER} has no module {module} any more ({error}): {loss}.")
    assert hasattr(known, name), f"{FLOWER} has no {name} in {module} any more: {loss}."


@pytest.mark.parametrize(("function", "names"), SIGNATURES, ids=lambda value: getattr(value, "__qualname__", ""))
def test_a_signature(function: Any, names: list[str]) -> None:
    found = list(inspect.signature(function).parameters)
    assert found[: len(names)] == names, f"{FLOWER} calls the parameters of {function.__qualname__} {found}."
    more = [item for item in inspect.signature(function).parameters.values() if item.name not in names]
    assert all(item.default is not item.empty for item in more), f"{FLOWER} wants more of {function.__qualname__}."


@pytest.mark.parametrize("route", FIELDS)
def test_a_route(route: str) -> None:
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    asked, answered = flower.TYPES[route]
    theirs = PROTOBUF_REQUEST_TYPES.get(("POST", route))
    assert theirs is asked, f"{FLOWER} expects {theirs} on {route}, and not {asked.__name__}."
    for kind, fields in zip((asked, answered), FIELDS[route], strict=True):
        known = {field.name for field in kind.DESCRIPTOR.fields}
        assert fields <= known, f"{FLOWER} has no {fields - known} in {kind.__name__} any more."


def test_all_routes_are_listed() -> None:
    assert set(FIELDS) == set(flower.TYPES)


def test_messages() -> None:
    flower.identify()
    content = RecordDict({"config": ConfigRecord({"a": 1})})
    message = Message(content, 7, "query", ttl=5.0)
    flower.set_message_id(message, "mine")
    words = f"{FLOWER} keeps the id of a message elsewhere, so that replies find their questions no more."
    assert message.metadata.message_id == "mine", words
    message.metadata.ttl = 9.0
    assert (message.metadata.ttl, message.metadata.dst_node_id) == (9.0, 7)
    back = flower.message_from_proto(flower.message_to_proto(message))
    assert (back.metadata.message_id, back.metadata.message_type, back.content) == ("mine", "query", content)
    reply = flower.failed(message, "on fire")
    words = f"{FLOWER} does not tell a reply's question or error as before."
    assert (reply.metadata.reply_to_message_id, reply.error.reason) == ("mine", "on fire"), words
    assert reply.metadata.src_node_id == 7, words


def test_what_may_be_put_into_records() -> None:
    array = Array("float32", (2,), NUMPY, b"12345678")
    record = ArrayRecord()
    record["a"] = array
    assert record["a"] is array, f"{FLOWER} copies arrays that are put into a record, which doubles the memory."
    content = RecordDict({"arrays": record})
    assert content.array_records["arrays"] is record, f"{FLOWER} copies records, which doubles the memory."
    assert Array(np.ones(2, np.float32)).data[:6] == b"\x93NUMPY", f"{FLOWER} writes arrays in another format."


def test_a_grid_needs_what_ours_has() -> None:
    ours = {"create_message", "push_messages", "run", "set_run", "send_and_receive", "get_node_ids", "pull_messages"}
    more = Grid.__abstractmethods__ - ours
    assert not more, f"{FLOWER} wants more of a grid, so that none can be made: {sorted(more)}."
    assert {"node_id", "name"} <= {field.name for field in flower.NodeInfo.DESCRIPTOR.fields}


def test_a_public_key_is_what_flower_sends(tmp_path: Path) -> None:
    _, public = write_node_key(tmp_path, "a")
    content = load_public_key(public)
    key = flower.asymmetric.bytes_to_public_key(content)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert flower.asymmetric.public_key_to_bytes(key) == content, f"{FLOWER} writes public keys in another format."
