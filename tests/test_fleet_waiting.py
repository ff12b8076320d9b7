"""What a client says of a server that it cannot reach, or that answers something else."""

from __future__ import annotations

import http.server
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from fedrag_cli.federated.fleet.failures import ServerAddress, in_words, raise_if_hopeless
from fedrag_cli.federated.fleet.node import FleetNode
from flwr.app import ConfigRecord, Message, RecordDict
from toy_federation import Notes, ToyClient, new_key, serving, start

from fedrag_cli.errors import ConnectionFailedError
from fedrag_cli.federated.client import ACTION, HANDSHAKE, STOP
from fedrag_cli.federated.fleet import node as node_module

pytestmark = pytest.mark.fl


class Clock:
    """Time that passes only where somebody waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(node_module, "time", self)

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
def answering(code: int) -> Iterator[str]:
    """Serve the same answer to everything, and yield the address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(code)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


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
    monkeypatch.setattr(end._lost, "wait", clock.wait)
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
    Clock(monkeypatch)
    with answering(code) as address, pytest.raises(ConnectionFailedError) as error:
        a_node(address, notes, timeout=2.0).run(ToyClient("a", [1.0]))
    reason = f"(it answered {code}: {words})"
    assert error.value.message == f"The server at {address} refused this client's requests for 2 s {reason}."
    assert notes.lines == [f"The server at {address} refuses this client's requests {reason}; trying again"]


def test_what_is_below_http_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(*arguments: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with pytest.raises(httpx.ConnectError) as error:
        httpx.post("http://nowhere.invalid:1/")
    assert in_words(error.value) == "no such host"
    assert in_words(httpx.ConnectTimeout("")) == "timed out"
    assert in_words(httpx.RemoteProtocolError("Server disconnected")) == "the connection broke"
    unreachable = httpx.ConnectError("")
    unreachable.__cause__ = OSError(113, "No route to host")
    assert in_words(unreachable) == "no route to host"
    # A handshake that takes too long says nothing about what the server speaks.
    slow = httpx.ConnectTimeout("_ssl.c:989: The handshake operation timed out")
    raise_if_hopeless(slow, ServerAddress("x:1", tls=True), was_connected=False)


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
            content = RecordDict({"config": ConfigRecord({ACTION: action})})
            return grid.push_messages([Message(content, member.node_id, "query")])

        ids = ask(HANDSHAKE)
        eventually(lambda: withdrawn == ids)
        asked = ask(STOP)
        replies: list[Message] = []
        eventually(lambda: bool(replies.extend(grid.pull_messages(asked)) or replies))
        thread.join(20)
        # It has not connected a second time for it.
        assert server.state._activations == {member.node_id: 1}
    assert notes.lines == [f"Connected to {address}"]


def test_a_server_that_was_started_again_is_no_silent_one() -> None:
    notes, client = Notes(), ToyClient("a", [1.0])
    with serving() as server:
        address = f"127.0.0.1:{server.address[1]}"
        start({a_node(address, notes): client})
        eventually(lambda: bool(server.state.members()))
        server.state.node_public_key_to_node_id.clear()
        eventually(lambda: notes.lines[-1:] == ["Connected again"])
        client.ended = True
    assert re.fullmatch(
        rf"The server at {address} does not know this client any more \(.*\); trying again", notes.lines[1]
    )
