"""The transport over real sockets: who gets in, what is refused, and that no reply is lost."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_from_proto
from toy_federation import Notes, Raw, ToyClient, common, federate, new_key, node, serving, start

from fedrag_cli.errors import ConnectionFailedError
from fedrag_cli.federated.endpoint import ServerCertificate
from fedrag_cli.federated.fleet import http
from fedrag_cli.federated.fleet._flower import ACTIVATE, PULL_MESSAGES, PUSH_OBJECT, TYPES, Incoming, Outgoing, Packer
from fedrag_cli.federated.fleet.auth import COUNT_HEADER, Signer
from fedrag_cli.federated.fleet.server import FleetServer
from fedrag_cli.federated.fleet.state import limits_of
from fedrag_cli.federated.keys import (
    load_allowed_keys,
    load_private_key,
    write_authority,
)
from fedrag_cli.federated.weights import to_wire, update_to_wire

pytestmark = pytest.mark.fl
STEPS = ([1.0, 0.0, 0.0], [0.0, 2.0, 0.0])


def certificate(keys: Path) -> ServerCertificate:
    return ServerCertificate(keys / "server.crt", keys / "server.key")


def test_rounds_over_the_wire_give_the_weighted_mean_and_everybody_gets_it() -> None:
    clients = [ToyClient("a", STEPS[0], examples=1), ToyClient("b", STEPS[1], examples=3)]
    with serving() as server:
        state = federate(server, clients, rounds=3)
    assert state.weights["w"].tolist() == pytest.approx([0.75, 4.5, 0.0])
    for client in clients:
        assert client.final is not None
        assert torch.equal(client.final["w"], state.weights["w"])


def test_large_tensors_cross_in_many_pieces(tmp_path: Path) -> None:
    size, pieces = 4_000_000, tmp_path / "pieces"
    clients = [ToyClient(name, [0.5] * size, agreement=common(size)) for name in ("a", "b")]
    with serving(max_message_bytes=limits_of([4 * size]), pieces=pieces) as server:
        state = federate(server, clients, rounds=1)
        assert list(pieces.iterdir()) == []
    assert not pieces.exists()
    assert float(state.weights["w"].sum()) == size / 2


def test_liars_are_refused_by_name_and_the_rest_go_on() -> None:
    honest = [ToyClient("a", STEPS[0]), ToyClient("b", STEPS[1])]
    liars = {
        "nan": lambda weights: {"w": weights["w"] * float("nan")},
        "shape": lambda weights: {"w": torch.zeros(4)},
        "missing": lambda weights: {"v": weights["w"]},
        "huge": lambda weights: {"w": weights["w"] + 1e9},
        "surplus": lambda weights: {**weights, "x": torch.zeros(1)},
        "endless": lambda weights: {"w": torch.zeros(3_000_000)},
    }
    clients = [*honest, *(ToyClient(name, [0, 0, 0], change=change) for name, change in liars.items())]
    with serving(max_message_bytes=limits_of([12])) as server:
        state = federate(
            server, clients, rounds=2, min_clients=2, wait_for_clients=8, max_update_norm=1e6, round_timeout=10.0
        )
    assert state.weights["w"].tolist() == pytest.approx([1.0, 2.0, 0.0])
    for row in state.history:
        assert row["clients"] == ["a", "b"]
        assert set(row["refused"]) == set(liars)
        assert "not finite" in row["refused"]["nan"]
        assert "shape (4,), not (3,)" in row["refused"]["shape"]
        assert "w is missing" in row["refused"]["missing"]
        assert "above the bound" in row["refused"]["huge"]
        assert "not agreed on" in row["refused"]["surplus"]
        # What is too large is refused as soon as it is announced.
        assert row["refused"]["endless"] == "its reply is not taken: it is larger than agreed"


def test_another_number_format_is_refused() -> None:
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

    class Doubles(ToyClient):
        def __call__(self, message: Message) -> Message:
            reply = super().__call__(message)
            if message.metadata.message_type == "train":
                arrays = ArrayRecord({"w": Array(np.zeros(3))})
                reply.content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
            return reply

    clients = [ToyClient("a", STEPS[0]), Doubles("doubles", [0, 0, 0])]
    with serving() as server:
        state = federate(server, clients, rounds=1, min_clients=1, wait_for_clients=2)
    assert state.history[0]["refused"] == {"doubles": "w is float64, not float32"}


def test_80_rounds_of_identical_replies_in_three_processes_at_once() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parents[2] / "toy_federation.py"), "80", "4"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) for _ in range(3)]
    for process in running:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        assert json.loads(output) == {"w": [80.0, 40.0, 20.0], "answered": [4] * 80}


def test_only_the_routes_of_clients_exist() -> None:
    with serving() as server:
        base = f"http://127.0.0.1:{server.address[1]}"
        for path in (
            "/", "/docs", "/openapi.json", "/v1/control/start-run", "/v1/control/list-runs", "/v1/runtime/acquire-task",
            "/v1/runtime/push-object", "/v1/fleet/get-fab", "/v1/fleet/get-run", "/v1/fleet/unregister-node", "/health",
            "/v1/fleet/register-node", "/v1/fleet/confirm-message-received",
        ):  # fmt: skip
            assert httpx.post(base + path).status_code == 404, path
            assert httpx.get(base + path).status_code == 404, path
        assert httpx.get(base + "/v1/fleet/pull-messages").status_code == 404


def test_requests_are_bounded_and_signed() -> None:
    raw = Raw(Signer(new_key()))
    signer = raw.signer
    with serving() as server:
        base = f"http://127.0.0.1:{server.address[1]}"

        def endless() -> Iterator[bytes]:
            for _ in range(40):
                yield b"\0" * 2**20

        def post(path: str, body: Any, headers: dict[str, str]) -> tuple[int, str]:
            answer = httpx.post(base + path, content=body, headers=headers)
            return answer.status_code, answer.json()["detail"]

        hello = TYPES[ACTIVATE][0](public_key=signer.public_key).SerializeToString()
        assert post(ACTIVATE, hello, {}) == (401, "unsigned")
        # What nobody has named is no session.
        assert post(ACTIVATE, hello, signer.headers(ACTIVATE, hello)) == (401, "challenged")
        assert server.state.members() == []
        raw.connect(server)
        signed = signer.headers(ACTIVATE, hello)
        # Neither another route, nor another body, nor the same once more.
        assert post(PULL_MESSAGES, hello, signed) == (401, "signature")
        assert post(ACTIVATE, hello + b"x", signed) == (400, "damaged")
        assert post(ACTIVATE, hello, {**signed, COUNT_HEADER: "9"}) == (401, "signature")
        assert httpx.post(base + ACTIVATE, content=hello, headers=signed).status_code == 200
        assert post(ACTIVATE, hello, signed) == (401, "used")
        assert len(server.state.members()) == 1
        large = b"\0" * (17 * 2**20)
        assert post(PUSH_OBJECT, large, signer.headers(PUSH_OBJECT, large)) == (413, "size")
        assert post(PUSH_OBJECT, endless(), signer.headers(PUSH_OBJECT, b"")) == (413, "size")
        assert post(PULL_MESSAGES, b"\xff", signer.headers(PULL_MESSAGES, b"\xff")) == (400, "protobuf")
        assert post(PULL_MESSAGES, b"", Signer(new_key()).headers(PULL_MESSAGES, b"")) == (401, "client")


def test_where_a_request_comes_from_is_not_its_own_word() -> None:
    notes, signer = Notes(), Signer(new_key())
    forged = {"x-forwarded-for": b"6.6.6.6\x9b31mEvil", "x-forwarded-proto": "https"}
    hello = TYPES[ACTIVATE][0](public_key=signer.public_key).SerializeToString()
    with serving(reporter=notes) as server:
        url = f"http://127.0.0.1:{server.address[1]}{ACTIVATE}"
        Raw(signer).connect(server)
        assert httpx.post(url, headers=forged).status_code == 401
        answer = httpx.post(url, content=hello, headers={**signer.headers(ACTIVATE, hello), **forged})
    assert notes.lines == [
        "Refused a connection from 127.0.0.1: its request is none of a fedrag client of this version"
    ]
    # A known client's connection is kept, which the listener does only where it knows the connection.
    assert (answer.status_code, answer.headers.get("connection")) == (200, None)


def test_a_port_scan_and_garbage_disturb_nobody() -> None:
    clients = [ToyClient("a", STEPS[0]), ToyClient("b", STEPS[1])]
    with serving() as server:
        where = ("127.0.0.1", server.address[1])
        stop = threading.Event()

        def disturb() -> None:
            while not stop.wait(0.01):
                for data in (
                    b"",
                    b"\x00" * 4096,
                    b"GET / HTTP/1.1\r\n\r\n",
                    b"\x16\x03\x01\x02\x00\x01",
                    os.urandom(2048),
                ):
                    with socket.create_connection(where, 2) as probe:
                        probe.sendall(data)

        noise = threading.Thread(target=disturb, daemon=True)
        noise.start()
        state = federate(server, clients, rounds=10)
        stop.set()
        noise.join(5)
    assert state.weights["w"].tolist() == pytest.approx([5.0, 10.0, 0.0])


def test_an_open_connection_that_says_nothing_does_not_block(keys: Path) -> None:
    clients = [ToyClient("a", STEPS[0])]
    with serving() as server:
        silent = [socket.create_connection(("127.0.0.1", server.address[1])) for _ in range(50)]
        state = federate(server, clients, rounds=2)
        for connection in silent:
            connection.close()
    assert state.weights["w"].tolist() == [2.0, 0.0, 0.0]


def test_allowed_keys_have_the_names_of_their_files_and_others_stay_out(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "POLL_SECONDS", 1.0)
    allowed = load_allowed_keys(keys)
    assert set(allowed) == {"north", "south"}
    with serving(allowed=allowed, certificate=certificate(keys)) as server:
        options = {"tls": True, "ca": (keys / "ca.crt").read_bytes(), "address": f"localhost:{server.address[1]}"}
        clients = [ToyClient("i am south", STEPS[0]), ToyClient("", STEPS[1])]
        ends = [node(server, load_private_key(keys / f"{name}.key"), **dict(options)) for name in ("north", "south")]
        with pytest.raises(ConnectionFailedError, match="does not know this client's key"):
            node(server, **dict(options)).check()
        start(dict(zip(ends, clients, strict=True)))
        deadline = time.monotonic() + 20
        while len(server.state.members()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert {member.name for member in server.state.members()} == {"north", "south"}
        for client in clients:
            client.ended = True


def test_a_wrong_authority_and_a_wrong_host_are_not_trusted(keys: Path, tmp_path: Path) -> None:
    write_authority(tmp_path)
    with serving(certificate=certificate(keys)) as server:
        where = f"localhost:{server.address[1]}"
        with pytest.raises(ConnectionFailedError, match="is not trusted") as error:
            node(server, tls=True, ca=(tmp_path / "ca.crt").read_bytes(), address=where).check()
        assert error.value.exit_code == 4
        assert "ca_certificate" in error.value.hint
        with pytest.raises(ConnectionFailedError, match="is not trusted"):
            node(server, tls=True, address=where).check()
        assert node(server, tls=True, ca=(keys / "ca.crt").read_bytes(), address=where).check()


def test_plain_clients_at_a_tls_server_and_the_other_way_round(keys: Path) -> None:
    # A server that is not up yet behind a proxy looks the same, so this is tried for as long as that.
    with serving(certificate=certificate(keys)) as server:
        plain = node(server, connect_timeout=1.5)
        assert not plain.check()
        with pytest.raises(ConnectionFailedError, match=r"did not answer for \d s \(.*it may use TLS"):
            plain.run(ToyClient("a", STEPS[0]))
    with serving() as server, pytest.raises(ConnectionFailedError, match="speaks no TLS"):
        node(server, tls=True, ca=(keys / "ca.crt").read_bytes()).check()


def test_nobody_at_the_address_is_no_error_yet() -> None:
    with serving() as server:
        absent = node(server, address="127.0.0.1:9")
    assert not absent.check()


def test_a_second_process_with_the_same_key_supersedes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "POLL_SECONDS", 1.0)
    failures: list[Exception] = []
    key = new_key()

    def run(client: ToyClient) -> None:
        try:
            node(server, key).run(client)
        except ConnectionFailedError as error:
            failures.append(error)

    with serving() as server:
        first, second = ToyClient("first", STEPS[0]), ToyClient("second", STEPS[1])
        threads = [threading.Thread(target=run, args=(client,), daemon=True) for client in (first, second)]
        threads[0].start()
        while not server.state.members():
            time.sleep(0.02)
        threads[1].start()
        threads[0].join(20)
        assert not threads[0].is_alive()
        second.ended = True
        threads[1].join(20)
    assert "Another process has joined with this client's key" in str(failures[0])
    assert len(failures) == 1


def test_a_client_may_not_reply_for_another_nor_see_what_it_is_asked() -> None:
    mine, theirs = (Raw(Signer(new_key())) for _ in range(2))
    with serving() as server:
        assert server.grid is not None
        for raw in (mine, theirs):
            raw.connect(server)
        content = RecordDict({"arrays": to_wire({"w": torch.arange(3.0)})})
        (message_id,) = server.grid.push_messages([Message(content, theirs.node_id, "train")])
        (head,), (tree,) = theirs.pull()
        assert head.metadata.message_id == message_id
        (piece,) = (child.object_id for child in tree.children)
        assert theirs.piece(piece)
        assert mine.piece(piece) is None
        question = message_from_proto(head)
        reply = Packer().pack(Message(content, reply_to=question), "reply")
        # Neither as itself nor in the other's name.
        assert mine.announce(reply) is None
        assert not mine.push(piece, reply.piece(piece) or b"")
        assert server.grid.pull_messages([message_id]) == []
        assert theirs.announce(reply) == [piece]
        assert theirs.push(piece, reply.piece(piece) or b"")
        (came,) = server.grid.pull_messages([message_id])
    assert came.metadata.src_node_id == theirs.node_id


def test_what_one_client_announces_is_nothing_to_another() -> None:
    """A hostile client announces the very tensors that the others will send, and never sends them."""
    hostile, honest = Raw(Signer(new_key())), ToyClient("honest", STEPS[0])
    with serving() as server:
        assert server.grid is not None
        hostile.connect(server)
        record = RecordDict({"arrays": update_to_wire({"w": torch.tensor(STEPS[0])}, {"w": torch.zeros(3)}, "float32")})
        server.grid.push_messages([Message(RecordDict({"a": ConfigRecord({"x": 1})}), hostile.node_id, "train")])
        (head,), _ = hostile.pull()
        copied = Packer().pack(Message(record, reply_to=message_from_proto(head)), "reply")
        assert len(hostile.announce(copied) or []) == 1
        state = federate(server, [honest], rounds=1)
    assert state.history[0]["refused"] == {}
    assert state.weights["w"].tolist() == STEPS[0]


@pytest.mark.parametrize("kind", ["query", "evaluate"])
def test_only_training_is_answered_with_tensors(kind: str) -> None:
    raw = Raw(Signer(new_key()))
    with serving() as server:
        assert server.grid is not None
        raw.connect(server)
        asked = server.grid.push_messages([Message(RecordDict(), raw.node_id, kind)])
        (head,), _ = raw.pull()
        content = RecordDict({"arrays": to_wire({"w": torch.zeros(3)})})
        assert raw.announce(Packer().pack(Message(content, reply_to=message_from_proto(head)), "reply")) is None
        (reply,) = server.grid.pull_messages(asked)
    assert reply.error.reason == "it is larger than agreed"


def test_refused_announcements_leave_nothing_behind() -> None:
    raw = Raw(Signer(new_key()))
    with serving(max_message_bytes=limits_of([12])) as server:
        assert server.grid is not None
        raw.connect(server)
        (message_id,) = server.grid.push_messages([Message(RecordDict(), raw.node_id, "train")])
        (head,), _ = raw.pull()
        content = RecordDict({"arrays": to_wire({"w": torch.zeros(1000)})})
        gc.collect()
        before = sum(type(item) in (Incoming, Outgoing) for item in gc.get_objects())
        for number in range(200):
            reply = Packer().pack(Message(content, reply_to=message_from_proto(head)), f"reply-{number}")
            assert raw.announce(reply) is None
        del reply
        (answer,) = server.grid.pull_messages([message_id])
        assert "larger than agreed" in answer.error.reason
        assert server.state._asked == {}
        gc.collect()
        # The question itself is gone too.
        assert sum(type(item) in (Incoming, Outgoing) for item in gc.get_objects()) == before - 1


def test_a_port_that_is_taken_is_said_so() -> None:
    with serving() as server:
        taken = FleetServer("127.0.0.1", server.address[1])
        with pytest.raises(ConnectionFailedError, match=r"Cannot listen on 127\.0\.0\.1:\d+: Address already in use"):
            taken.__enter__()
