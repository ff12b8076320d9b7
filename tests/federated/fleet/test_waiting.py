"""What a client says of a server that it cannot reach, or that answers something else."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import random
import re
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from line import Line
from toy_federation import Notes, ToyClient, asking, common, new_key, node, rounds_of, serving, start

from fedrag_cli.errors import ConnectionFailedError
from fedrag_cli.federated.checkpoint import RoundState
from fedrag_cli.federated.endpoint import ServerAddress
from fedrag_cli.federated.fleet import client as client_module
from fedrag_cli.federated.fleet import http as routes
from fedrag_cli.federated.fleet._flower import ACTIVATE, PULL_MESSAGES, PULL_OBJECT, TYPES, Packer
from fedrag_cli.federated.fleet.auth import DIGEST_HEADER
from fedrag_cli.federated.fleet.client import FleetNode
from fedrag_cli.federated.fleet.server import FleetServer
from fedrag_cli.federated.fleet.state import limits_of
from fedrag_cli.federated.messages import ACTION, HANDSHAKE, STOP
from fedrag_cli.federated.weights import to_wire

pytestmark = pytest.mark.fl


class Clock:
    """Time that passes only where somebody waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(client_module, "time", self)

    def monotonic(self) -> float:
        """Return the time."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    def wait(self, seconds: float) -> bool:
        """Let time pass, in the place of an event that never comes."""
        self.now += seconds
        return False


def a_node(address: str, notes: Notes, timeout: float = 20.0) -> FleetNode:
    return FleetNode(ServerAddress(address, tls=False), new_key(), notes, connect_timeout=timeout)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextmanager
def answering(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """Serve the same answer to everything, and yield the address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.close_connection = True
            with suppress(OSError):
                answer(self)

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def with_code(code: int, **headers: str) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in {"content_length": "0", "connection": "close", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return answer


def eventually(true: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_timeout_is_kept_and_the_reason_said(monkeypatch: pytest.MonkeyPatch) -> None:
    address, notes = free_address(), Notes()
    clock = Clock(monkeypatch)
    end = a_node(address, notes, timeout=3.0)
    monkeypatch.setattr(end._ended, "wait", clock.wait)
    with pytest.raises(ConnectionFailedError) as error:
        end.run(ToyClient("a", [1.0]))
    assert error.value.message == f"The server at {address} did not answer for 3 s (connection refused)."
    assert clock.now == pytest.approx(1003.0)
    assert notes.lines == [f"The server at {address} does not answer (connection refused); trying again"]


@pytest.mark.parametrize(
    ("code", "words"), [(404, "no server of fedrag, or of another version"), (500, "an error within it")]
)
def test_an_answer_is_not_called_silence(monkeypatch: pytest.MonkeyPatch, code: int, words: str) -> None:
    notes = Notes()
    with answering(with_code(code)) as address:
        end = a_node(address, notes, timeout=2.0)
        monkeypatch.setattr(end._ended, "wait", Clock(monkeypatch).wait)
        with pytest.raises(ConnectionFailedError) as error:
            end.run(ToyClient("a", [1.0]))
    reason = f"(it answered {code}: {words})"
    assert error.value.message == f"The server at {address} refused this client's requests for 2 s {reason}."
    assert notes.lines == [f"The server at {address} refuses this client's requests {reason}; trying again"]


def test_what_is_below_http_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(*arguments: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with pytest.raises(httpx.ConnectError) as error:
        httpx.post("http://nowhere.invalid:1/")
    end = FleetNode(ServerAddress("x:1", tls=True), new_key(), Notes())
    assert end._in_words(error.value) == "no such host"
    assert end._in_words(httpx.ConnectTimeout("")) == "timed out"
    assert end._in_words(httpx.RemoteProtocolError("Server disconnected")) == "the connection broke"
    unreachable = httpx.ConnectError("")
    unreachable.__cause__ = OSError(113, "No route to host")
    assert end._in_words(unreachable) == "no route to host"
    # A handshake that takes too long says nothing about what the server speaks.
    end._raise_if_hopeless(httpx.ConnectTimeout("_ssl.c:989: The handshake operation timed out"))


def test_a_message_that_was_withdrawn_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    notes, client = Notes(), ToyClient("a", [1.0])
    with serving() as server:
        grid = server.grid
        assert grid is not None
        fetch, withdrawn = FleetNode._fetch, []

        def late(end: FleetNode, answer: Any) -> Any:
            if not withdrawn:
                withdrawn.append(answer.messages_list[0].metadata.message_id)
                grid.forget(withdrawn)
            return fetch(end, answer)

        monkeypatch.setattr(FleetNode, "_fetch", late)
        address = f"127.0.0.1:{server.address[1]}"
        (thread,) = start({a_node(address, notes): client})
        eventually(lambda: bool(server.state.members()))
        (member,) = server.state.members()

        def ask(action: str) -> list[str]:
            arrays = to_wire({"w": torch.zeros(3)})
            content = RecordDict({"config": ConfigRecord({ACTION: action}), "arrays": arrays})
            return grid.push_messages([Message(content, member.node_id, "query")])

        ids = ask(HANDSHAKE)
        eventually(lambda: withdrawn == ids)
        asked = ask(STOP)
        replies: list[Message] = []
        eventually(lambda: bool(replies.extend(grid.pull_messages(asked)) or replies))
        thread.join(20)
        # It has not connected a second time for it.
        assert [client.member.activation for client in server.state.clients()] == [1]
    assert notes.lines == [f"Connected to {address}"]


def test_a_server_that_was_started_again_is_no_silent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "POLL_SECONDS", 1.0)
    notes, client = Notes(), ToyClient("a", [1.0])
    with serving() as server:
        address = f"127.0.0.1:{server.address[1]}"
        start({a_node(address, notes): client})
        eventually(lambda: bool(server.state.members()))
        server.state._clients.clear()
        eventually(lambda: notes.lines[-1:] == ["Connected again"])
        client.ended = True
    assert re.fullmatch(
        rf"The server at {address} does not know this client any more \(.*\); trying again", notes.lines[1]
    )


# A hostile or confused server.


class Elsewhere:
    """Listens, and counts who comes."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def has_had_a_visit(self) -> bool:
        """Return whether somebody dialled."""
        self.listener.settimeout(0.5)
        try:
            self.listener.accept()[0].close()
        except TimeoutError:
            return False
        finally:
            self.listener.close()
        return True


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_client_is_not_sent_elsewhere(code: int) -> None:
    elsewhere = Elsewhere()
    where = f"http://127.0.0.1:{elsewhere.port}/v1/fleet/activate-node"
    with answering(with_code(code, location=where)) as address, pytest.raises(ConnectionFailedError) as error:
        a_node(address, Notes(), timeout=1.0).run(ToyClient("a", [1.0]))
    assert f"it answered {code}: it sends clients elsewhere, which is not followed" in error.value.message
    assert not elsewhere.has_had_a_visit()


BOMB = gzip.compress(bytes(64 * 2**20), 1)


def bomb(handler: http.server.BaseHTTPRequestHandler) -> None:
    with_code(200, content_encoding="gzip", content_length=str(len(BOMB)))(handler)
    handler.wfile.write(BOMB)


def flood(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("content-length", str(2**40))
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(2**20))


def trickle(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("content-length", str(2**10))
    handler.end_headers()
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.05)


def damaged(handler: http.server.BaseHTTPRequestHandler) -> None:
    content = b"\x08\x01"
    handler.send_response(200)
    handler.send_header("content-length", str(len(content)))
    handler.send_header(DIGEST_HEADER, hashlib.sha256(b"\x08\x00").hexdigest())
    handler.end_headers()
    handler.wfile.write(content)


def refusing(content: bytes, code: int = 401) -> Callable[[http.server.BaseHTTPRequestHandler], None]:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        handler.send_header("connection", "close")
        handler.send_header("content-length", str(len(content)))
        handler.send_header(DIGEST_HEADER, hashlib.sha256(content).hexdigest())
        handler.end_headers()
        handler.wfile.write(content)

    return answer


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 60_000,
        b'{"detail": ["challenged"], "challenge": 1' + b"0" * 400 + b"}",
        b'{"detail": {"key": []}}',
        b'["ab", 1]',
        b"\xff",
    ],
)
def test_refusals_that_are_none_are_waited_out(content: bytes) -> None:
    with answering(refusing(content)) as address, pytest.raises(ConnectionFailedError) as error:
        a_node(address, Notes(), timeout=0.5).run(ToyClient("a", [1.0]))
    assert "it answered 401" in error.value.message


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (bomb, "its answer is compressed, which nobody asked for"),
        (flood, "its answer is larger than agreed"),
        (trickle, "its answer does not end"),
        (damaged, "its answer was damaged on the way, or is none of fedrag"),
    ],
)
def test_answers_have_bounds(monkeypatch: pytest.MonkeyPatch, answer: Any, words: str) -> None:
    monkeypatch.setattr(client_module, "ANSWER_SECONDS", 1.0)
    tracemalloc.start()
    try:
        with answering(answer) as address, pytest.raises(ConnectionFailedError) as error:
            a_node(address, Notes(), timeout=1.0).run(ToyClient("a", [1.0]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert f"({words})" in error.value.message
    assert peak < 16 * 2**20


def test_a_confused_server_is_not_asked_without_a_pause() -> None:
    message = asking(RecordDict({"arrays": to_wire({"w": torch.zeros(3)}), "config": ConfigRecord({})}))
    offered = Packer().pack(message, "message")
    pulled = TYPES[PULL_MESSAGES][1](messages_list=[offered.head], message_object_trees=[offered.tree])
    empty, offer = refusing(b"", 200), refusing(pulled.SerializeToString(), 200)
    answers = {
        "forgets": {ACTIVATE: empty},
        "has no pieces": {
            ACTIVATE: empty,
            PULL_MESSAGES: offer,
            PULL_OBJECT: empty,
        },
    }
    for name, routes_of in answers.items():
        asked: list[str] = []

        def answer(handler: http.server.BaseHTTPRequestHandler, of: Any = routes_of, asked: Any = asked) -> None:
            asked.append(handler.path)
            of.get(handler.path, refusing(b'{"detail": "client"}'))(handler)

        client = ToyClient("a", [1.0])
        with answering(answer) as address:
            (thread,) = start({a_node(address, Notes()): client})
            eventually(lambda asked=asked: len(asked) >= 3)
            time.sleep(1.5)
            client.ended = True
            thread.join(20)
        # Without a pause they are hundreds.
        assert not thread.is_alive()
        assert len(asked) < 30, name


def test_what_a_server_sends_is_held_against_what_was_agreed() -> None:
    with serving() as server:
        assert server.grid is not None
        client, failures = ToyClient("a", [0.0] * 1000, agreement=common(1000)), []

        def run() -> None:
            try:
                a_node(f"127.0.0.1:{server.address[1]}", Notes()).run(client, most_bytes=limits_of([12]))
            except ConnectionFailedError as error:
                failures.append(error.message)

        thread = threading.Thread(target=run)
        thread.start()
        eventually(lambda: bool(server.state.members()))
        (member,) = server.state.members()
        content = RecordDict({"arrays": to_wire({"w": torch.zeros(1000)}), "config": ConfigRecord({"x": 1})})
        server.grid.push_messages([Message(content, member.node_id, "train")])
        thread.join(20)
    assert failures
    assert "sends a message that cannot be used: it is larger than agreed" in failures[0]
    assert client.received == []


# Bad lines.


def over(server: Any, line: Line, clients: list[ToyClient], rounds: int, **settings: Any) -> RoundState:
    """Run a federation whose clients are behind a line."""
    threads = start({node(server, address=f"127.0.0.1:{line.port}"): client for client in clients})
    size = clients[0].agreement.manifest["w"][0]
    state = rounds_of(server, rounds, size=size, min_clients=len(clients), **settings)
    for thread in threads:
        thread.join(20)
    return state


def test_flipped_bits_are_noticed_and_what_they_hit_is_sent_again() -> None:
    size, chance = 600_000, random.Random(5)
    flipped = {True: 0, False: 0}

    def flip(towards: bool, data: bytes) -> bytes:
        if chance.random() > 0.02:
            return data
        flipped[towards] += 1
        changed = bytearray(data)
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        return bytes(changed)

    clients = [ToyClient(name, [0.5] * size, agreement=common(size)) for name in ("a", "b")]
    for client in clients:
        # Numbers that differ, so that each piece is another one.
        client.step = torch.arange(float(size)) / size
    with serving() as server, Line(server.address[1], change=flip) as line:
        state = over(server, line, clients, 3, round_timeout=120.0, rejoin_timeout=60.0)
    assert min(flipped.values()) > 5
    expected = clients[0].step * 3
    assert torch.allclose(state.weights["w"], expected, atol=1e-6)
    assert [row["refused"] for row in state.history] == [{}] * 3
    for client in clients:
        assert client.final is not None
        assert torch.equal(client.final["w"], state.weights["w"])


def test_a_slow_line_brings_everything_once() -> None:
    size = 500_000
    client = ToyClient("a", [0.0] * size, agreement=common(size))
    client.step = torch.arange(float(size)) / size
    with serving() as server, Line(server.address[1], rate=1_000_000) as line:
        state = over(server, line, [client], 1, round_timeout=120.0)
        passed = line.passed
    assert torch.allclose(state.weights["w"], client.step)
    # There, back, and there again at the end.
    assert passed < 1.1 * 3 * 4 * size


def test_a_line_that_is_cut_over_and_over_goes_on_with_the_piece_that_it_broke() -> None:
    size, cut = 1_500_000, 0
    client = ToyClient("a", [0.0] * size, agreement=common(size))
    client.step = torch.arange(float(size)) / size
    with serving() as server, Line(server.address[1], rate=8_000_000) as line:
        done = threading.Event()

        def disturb() -> None:
            # After so many bytes, of which the pieces on the way are the smaller part, however slow this machine is.
            nonlocal cut
            while not done.wait(0.01):
                if line.passed > 3_000_000 * (cut + 1):
                    cut += 1
                    line.cut()

        thread = threading.Thread(target=disturb)
        thread.start()
        state = over(server, line, [client], 1, round_timeout=120.0)
        done.set()
        thread.join()
        passed = line.passed
    assert cut > 4
    assert torch.allclose(state.weights["w"], client.step)
    assert client.configs[1:] == []
    assert passed < 3 * 3 * 4 * size


def test_round_trips_do_not_grow_with_the_number_of_tensors() -> None:
    asked: dict[str, int] = {}

    def count(towards: bool, data: bytes) -> bytes:
        if towards:
            for path in re.findall(rb"POST /v1/fleet/([a-z-]+)", data):
                asked[path.decode()] = asked.get(path.decode(), 0) + 1
        return data

    with serving() as server, Line(server.address[1], change=count) as line:
        assert server.grid is not None
        tensors = {f"layer.{number}": torch.full((3,), float(number)) for number in range(40)}

        class Echo(ToyClient):
            def __call__(self, message: Message) -> Message:
                self.ended = True
                return Message(RecordDict({"arrays": to_wire(tensors)}), reply_to=message)

        (thread,) = start({node(server, address=f"127.0.0.1:{line.port}"): Echo("a", [1.0])})
        eventually(lambda: bool(server.state.members()))
        (member,) = server.state.members()
        content = RecordDict({"arrays": to_wire(tensors)})
        (reply,) = server.grid.send_and_receive([Message(content, member.node_id, "train")], timeout=20)
        thread.join(20)
    assert len(reply.content.array_records["arrays"]) == 40
    assert {name: asked[name] for name in ("pull-messages", "pull-object", "push-messages", "push-object")} == {
        "pull-messages": 1, "pull-object": 1, "push-messages": 1, "push-object": 1,
    }  # fmt: skip


def test_something_that_accepts_before_the_server_is_up_is_waited_for() -> None:
    """As the ports of containers and proxies do, it takes connections and closes them."""
    target, client, notes = free_address(), ToyClient("a", [1.0, 2.0, 3.0]), Notes()
    with Line(int(target.rpartition(":")[2])) as line:
        end = a_node(f"127.0.0.1:{line.port}", notes)
        assert not end.check()
        (thread,) = start({end: client})
        eventually(lambda: bool(notes.lines))
        with FleetServer("127.0.0.1", line.target) as server:
            state = rounds_of(server, 2, min_clients=1)
            thread.join(20)
    assert state.weights["w"].tolist() == [2.0, 4.0, 6.0]
    assert "does not answer plain requests: it may use TLS, or not be up yet); trying again" in notes.lines[0]


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"])
def test_no_proxy_is_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, f"http://user:secret@{free_address()}")
    with serving() as server:
        assert node(server).check()
        assert node(server, address=f"localhost:{server.address[1]}").check()


def test_a_proxy_of_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = free_address()
    monkeypatch.setenv("http_proxy", f"http://user:secret@{proxy}")
    with pytest.raises(ConnectionFailedError) as error:
        a_node("server.invalid:8080", Notes(), timeout=1.0).run(ToyClient("a", [1.0]))
    assert f"The server at server.invalid:8080 (through the proxy http://{proxy}) did not answer" in error.value.message
    assert "secret" not in error.value.message
