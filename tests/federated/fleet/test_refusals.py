"""Whom a server refuses, and what its owner sees of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import Message, RecordDict
from flwr.common.serde import message_from_proto
from toy_federation import (
    Notes,
    Raw,
    ToyClient,
    answered,
    common,
    ended,
    eventually,
    federate,
    new_key,
    node,
    request_bytes,
    rounds_of,
    serving,
    start,
)

from fedrag_cli.errors import ConnectionFailedError, FedRAGError
from fedrag_cli.federated.endpoint import ServerCertificate
from fedrag_cli.federated.fleet import http
from fedrag_cli.federated.fleet._flower import ACTIVATE, DEACTIVATE, HEARTBEAT, PULL_MESSAGES, TYPES, Packer
from fedrag_cli.federated.fleet.auth import Refusals, ReplayWindow, Signer
from fedrag_cli.federated.fleet.client import FleetNode
from fedrag_cli.federated.keys import (
    fingerprint,
    load_allowed_keys,
    load_private_key,
    load_public_key,
    write_authority,
)
from fedrag_cli.federated.participants import Roster
from fedrag_cli.runs.reporter import SilentReporter

pytestmark = pytest.mark.fl


@pytest.fixture
def clients(keys: Path, tmp_path: Path) -> Path:
    """A folder of allowed keys that knows of north alone."""
    folder = tmp_path / "clients"
    folder.mkdir()
    shutil.copy(keys / "north.pub", folder)
    return folder


def certificate(keys: Path) -> ServerCertificate:
    return ServerCertificate(keys / "server.crt", keys / "server.key")


def test_an_unknown_key_is_named_once_by_its_fingerprint(keys: Path, clients: Path) -> None:
    notes = Notes()
    with serving(allowed=load_allowed_keys(clients), reporter=notes) as server:
        for _ in range(3):
            with pytest.raises(ConnectionFailedError) as error:
                node(server, load_private_key(keys / "south.key")).check()
        assert node(server, load_private_key(keys / "north.key")).check()
    known_by = fingerprint(load_public_key(keys / "south.pub"))
    assert notes.lines == [
        f"Refused a client at 127.0.0.1: its key (fingerprint {known_by}) is not in federated.allowed_keys"
    ]
    # The client's owner sees the same, to compare.
    assert known_by in error.value.message


def test_a_key_that_is_added_later_gets_in_under_its_name(
    keys: Path, clients: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "POLL_SECONDS", 1.0)
    notes = Notes()
    allowed = load_allowed_keys(clients)
    with serving(allowed=allowed, read_allowed=lambda: load_allowed_keys(clients), reporter=notes) as server:
        late = load_private_key(keys / "south.key")
        (clients / "broken.pub").write_text("nonsense")
        with pytest.raises(ConnectionFailedError, match="does not know this client's key"):
            node(server, late).check()
        assert "the former keys stay: " in notes.lines[0]
        assert "broken.pub' is no public key" in notes.lines[0]
        assert "is not in federated.allowed_keys" in notes.lines[1]
        assert node(server, load_private_key(keys / "north.key")).check()
        (clients / "broken.pub").unlink()
        shutil.copy(keys / "south.pub", clients / "southern.pub")
        client = ToyClient("whoever", [1.0])
        start({node(server, late): client})
        eventually(lambda: [member.name for member in server.state.members()] == ["southern"])
        client.ended = True


def test_a_names_new_key_takes_the_place_of_its_former_one(keys: Path, clients: Path) -> None:
    allowed = load_allowed_keys(clients)
    with serving(allowed=allowed, read_allowed=lambda: load_allowed_keys(clients)) as server:
        assert node(server, load_private_key(keys / "north.key")).check()
        shutil.copy(keys / "south.pub", clients / "north.pub")
        assert node(server, load_private_key(keys / "south.key")).check()
        with pytest.raises(ConnectionFailedError, match="does not know this client's key"):
            node(server, load_private_key(keys / "north.key")).check()


def test_strangers_do_not_have_the_folder_read_over_and_over(clients: Path) -> None:
    reads = 0

    def read() -> dict[str, bytes]:
        nonlocal reads
        reads += 1
        return load_allowed_keys(clients)

    def ask(end: FleetNode) -> None:
        with pytest.raises(ConnectionFailedError, match="does not know this client's key"):
            end.check()

    with serving(allowed=load_allowed_keys(clients), read_allowed=read) as server:
        # Unsigned requests are refused at once, and never have it read.
        base = f"http://127.0.0.1:{server.address[1]}/v1/fleet/"
        assert httpx.post(base + "activate-node", content=b"").status_code == 401
        assert reads == 0
        threads = [threading.Thread(target=ask, args=(node(server, new_key()),)) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        # Those that come at once share a look, also where each of them asks twice.
        assert 1 <= reads <= 6


def test_who_fails_at_the_handshake_is_told_once(keys: Path, tmp_path: Path) -> None:
    write_authority(tmp_path)
    notes = Notes()
    with serving(certificate=certificate(keys), reporter=notes) as server:
        where = ("127.0.0.1", server.address[1])
        for _ in range(2):
            with pytest.raises(ConnectionFailedError, match="is not trusted"):
                node(server, tls=True, ca=(tmp_path / "ca.crt").read_bytes()).check()
            assert not node(server).check()
            for garbage in (b"\x00" * 64, b""):
                with socket.create_connection(where, 5) as probe:
                    probe.sendall(garbage)
                    probe.shutdown(socket.SHUT_WR)
                    while probe.recv(64):
                        pass
        eventually(lambda: len(notes.lines) >= 3)
        assert node(server, tls=True, ca=(keys / "ca.crt").read_bytes()).check()
    assert sorted(notes.lines) == [
        "A client at 127.0.0.1 did not trust this server's certificate (unknown ca): it needs the authority's ca.crt, "
        "and a host name that the certificate is made for",
        "A connection from 127.0.0.1 was no TLS client (wrong version number)",
        "A connection from 127.0.0.1 was no TLS client: it sent plain HTTP",
    ]


def test_what_a_plain_server_says_of_tls_clients_garbage_and_browsers(keys: Path) -> None:
    notes = Notes()
    with serving(reporter=notes) as server:
        with pytest.raises(ConnectionFailedError, match="speaks no TLS"):
            node(server, tls=True, ca=(keys / "ca.crt").read_bytes()).check()
        assert httpx.get(f"http://127.0.0.1:{server.address[1]}/").status_code == 404
        with socket.create_connection(("127.0.0.1", server.address[1]), 5) as probe:
            probe.sendall(b"\x00\x01\x02")
            while probe.recv(64):
                pass
        assert node(server).check()
    assert notes.lines == [
        "A client at 127.0.0.1 speaks TLS, but this server does without",
        "Refused a connection from 127.0.0.1: its request is none of a fedrag client of this version",
        "A connection from 127.0.0.1 sent no HTTP",
    ]


@pytest.mark.parametrize("step", [30.0, -30.0, 3600.0, -3600.0])
def test_clocks_that_are_wrong_or_set_meanwhile_change_nothing(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    ahead, real = step, time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead)

    class Setting(ToyClient):
        def __call__(self, message: Message) -> Message:
            nonlocal ahead
            ahead = -2 * step if len(self.configs) == 1 else 0.0
            return super().__call__(message)

    with serving() as server:
        state = federate(server, [Setting("a", [1.0, 2.0, 3.0])], rounds=4, round_timeout=20.0)
    assert state.weights["w"].tolist() == [4.0, 8.0, 12.0]


def test_a_dead_client_is_found_by_a_clock_that_nobody_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedrag_cli.federated.fleet.state.LIVENESS_SECONDS", 1.0)
    raw, real = Raw(Signer(new_key())), time.time
    with serving() as server:
        # It asks to be taken for alive for half an hour.
        raw.connect(server)
        assert len(server.state.members()) == 1
        monkeypatch.setattr(time, "time", lambda: real() - 3600.0)
        eventually(lambda: server.state.members() == [])
        raw.post(HEARTBEAT, heartbeat_interval=1800)
        assert len(server.state.members()) == 1
        eventually(lambda: server.state.members() == [])


def test_a_request_that_was_taken_is_not_taken_again_whatever_comes_between() -> None:
    raw, again = Raw(Signer(new_key())), []
    with serving() as server:
        raw.connect(server)
        base = f"http://127.0.0.1:{server.address[1]}"
        body = TYPES[HEARTBEAT][0]().SerializeToString()
        for _ in range(40):
            headers = raw.signer.headers(HEARTBEAT, body)
            assert httpx.post(base + HEARTBEAT, content=body, headers=headers).status_code == 200
            again.append(headers)
        for headers in again:
            assert httpx.post(base + HEARTBEAT, content=body, headers=headers).json()["detail"] == "used"
        # Another process takes over; what the first had signed opens nothing, not even an introduction.
        hello = TYPES[ACTIVATE][0](public_key=raw.signer.public_key).SerializeToString()
        kept = raw.signer.headers(ACTIVATE, hello)
        newer = Raw(Signer(raw.signer._key))
        newer.connect(server)
        assert httpx.post(base + ACTIVATE, content=hello, headers=kept).json()["detail"] == "challenged"
        heartbeat = raw.signer.headers(HEARTBEAT, body)
        assert httpx.post(base + HEARTBEAT, content=body, headers=heartbeat).json()["detail"] == "superseded"
        newer.post(HEARTBEAT)


def test_numbers_may_come_out_of_order_but_once() -> None:
    # What a session has signed before it began is not taken.
    counts = ReplayWindow(2)
    assert [counts.take(number) for number in (2, 1, 5, 3, 4, 5, 3, 2000, 4, 1999, 1999, 977, 976)] == [
        False, False, True, True, True, False, False, True, False, True, False, True, False,
    ]  # fmt: skip


def test_a_flood_is_cut_short_and_hides_nothing_else() -> None:
    time_now = 0.0
    lines: list[str] = []
    refusals = Refusals(lines.append, now=lambda: time_now)
    for number in range(5000):
        refusals.tell(f"10.0.{number}", "handshake", f"scan {number}")
    assert lines[: Refusals.MOST_LINES] == [f"scan {number}" for number in range(Refusals.MOST_LINES)]
    assert lines[Refusals.MOST_LINES :] == ["More of the same were turned away; those of this minute are not listed"]
    refusals.tell("key", "key", "the one that matters")
    assert lines[-1] == "the one that matters"
    time_now = 61.0
    # What was not told in the first minute is in the next, and what was is not again.
    refusals.tell("10.0.3", "handshake", "scan 3")
    refusals.tell("10.0.4000", "handshake", "scan 4000")
    assert lines[-2:] == ["the one that matters", "scan 4000"]
    for minute in range(2, 400):
        time_now = 61.0 * minute
        for number in range(Refusals.MOST_LINES):
            refusals.tell(f"{minute}.{number}", "handshake", "more")
    assert len(refusals._told) == Refusals.MOST_REMEMBERED


def test_a_certificate_that_cannot_be_used_is_said_so(keys: Path) -> None:
    swapped = ServerCertificate(keys / "server.key", keys / "server.crt")
    with pytest.raises(ConnectionFailedError, match="cannot be used"), serving(certificate=swapped):
        pass


def plain_or_tls(keys: Path, tls: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return options of a server, and of the clients that know it."""
    if not tls:
        return {}, {}
    return {"certificate": certificate(keys)}, {"tls": True, "ca": (keys / "ca.crt").read_bytes()}


@pytest.fixture
def dial(keys: Path) -> Iterator[Callable[..., list[socket.socket]]]:
    """Return a function that opens connections that ask nothing, after a handshake where TLS is wanted."""
    with ExitStack() as stack:

        def opened(port: int, count: int = 1, *, tls: bool = False) -> list[socket.socket]:
            found = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(count)]
            if tls:
                context = ssl.create_default_context(cafile=keys / "ca.crt")
                found = [context.wrap_socket(connection, server_hostname="localhost") for connection in found]
            for connection in found:
                stack.callback(connection.close)
            return found

        yield opened


@pytest.mark.parametrize("tls", [False, True])
def test_connections_that_ask_nothing_are_ended(
    keys: Path, dial: Callable[..., list[socket.socket]], monkeypatch: pytest.MonkeyPatch, tls: bool
) -> None:
    monkeypatch.setattr(http, "SILENT_SECONDS", 1.0)
    notes = Notes()
    served, known = plain_or_tls(keys, tls)
    with serving(**served, reporter=notes) as server:
        silent, half, second, unread = dial(server.address[1], 4, tls=tls)
        half.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n")
        # A whole request, and then a half one on the same connection.
        end, body = node(server, **known), b""
        assert end.check()
        whole = request_bytes(end._signer, ACTIVATE, body)
        second.sendall(whole + b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n")
        unread.sendall(request_bytes(end._signer, HEARTBEAT, body)[:-4])
        assert [ended(connection) for connection in (silent, half, second, unread)] == [True] * 4
        assert end.check()
    # One line for all, because they come from one address.
    assert notes.lines == ["A connection from 127.0.0.1 asked nothing for 1 s"]


@pytest.mark.parametrize("tls", [False, True])
def test_endless_headers_are_cut_off(keys: Path, dial: Callable[..., list[socket.socket]], tls: bool) -> None:
    served, known = plain_or_tls(keys, tls)
    with serving(**served) as server:
        (connection,) = dial(server.address[1], tls=tls)
        connection.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n")
        sent = 0
        with suppress(OSError):
            while sent < 20 * 2**20:
                sent += connection.send(b"x-more: " + b"y" * 1000 + b"\r\n")
        # What lies in the system's buffers on the way counts as sent.
        assert sent < 16 * 2**20
        assert node(server, **known).check()


@pytest.mark.parametrize("tls", [False, True])
def test_silent_connections_push_nobody_out(keys: Path, dial: Callable[..., list[socket.socket]], tls: bool) -> None:
    """With 1,024 descriptors, 1,100 connections from the same address that say nothing, before and after TLS."""
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))\n"
        "from test_refusals import serve_until_told\n"
        f"serve_until_told({tls}, {str(keys)!r})"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            server = SimpleNamespace(address=("127.0.0.1", port))
            options = {"tls": True, "ca": (keys / "ca.crt").read_bytes()} if tls else {}
            key = load_private_key(keys / "north.key")
            client = ToyClient("north", [1.0, 2.0, 3.0])
            (thread,) = start({node(server, key, **dict(options)): client})  # type: ignore[arg-type]
            for number in range(1100):
                with suppress(OSError):
                    dial(port, tls=tls and number % 10 == 0)
            # Also one that comes only now gets in.
            late = ToyClient("south", [3.0, 2.0, 1.0])
            threads = [thread, *start({node(server, load_private_key(keys / "south.key"), **dict(options)): late})]  # type: ignore[arg-type]
            out, errors = process.communicate("go\n", timeout=120)
            for thread in threads:
                thread.join(20)
        finally:
            process.kill()
    assert json.loads(out) == {"clients": [["north", "south"]] * 3, "w": [6.0, 6.0, 6.0]}
    assert "Traceback" not in errors


def serve_until_told(tls: bool, keys: str) -> None:
    """Be the server of the test above: run three rounds once a line comes in."""
    served, _ = plain_or_tls(Path(keys), tls)
    with serving(**served, allowed=load_allowed_keys(Path(keys))) as server:
        print(server.address[1], flush=True)
        sys.stdin.readline()
        state = rounds_of(server, 3, min_clients=2)
    print(json.dumps({"clients": [row["clients"] for row in state.history], "w": state.weights["w"].tolist()}))


def test_too_few_open_files_are_said_at_the_start() -> None:
    code = (
        "import resource\n"
        "from toy_federation import serving\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
        "with serving(): pass"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert "The system allows this process 200 open files, and a server needs 256." in found.stderr


def test_a_known_client_may_not_take_all_places(keys: Path, dial: Callable[..., list[socket.socket]]) -> None:
    signer = Signer(load_private_key(keys / "north.key"))
    with serving(allowed=load_allowed_keys(keys)) as server:
        Raw(signer).connect(server)
        connections = dial(server.address[1], 30)
        body = TYPES[ACTIVATE][0](public_key=signer.public_key).SerializeToString()
        for connection in connections:
            connection.sendall(request_bytes(signer, ACTIVATE, body))
            assert b"HTTP/1.1 200" in connection.recv(4096)
        assert all(ended(connection) for connection in connections[: -http.MOST_OF_A_CLIENT])
        connections[-1].sendall(request_bytes(signer, HEARTBEAT, b""))
        assert answered(connections[-1])


def test_a_known_client_that_waits_many_times_at_once_has_few_connections(
    keys: Path, dial: Callable[..., list[socket.socket]]
) -> None:
    signer = Signer(load_private_key(keys / "north.key"))
    with serving(allowed=load_allowed_keys(keys)) as server:
        raw = Raw(signer)
        raw.connect(server)
        connections = dial(server.address[1], 40)
        for connection in connections:
            connection.sendall(request_bytes(signer, PULL_MESSAGES, b""))
        open_ones = server._uvicorn.server_state.connections
        eventually(lambda: len(open_ones) <= http.MOST_OF_A_CLIENT + 1)
        assert all(answered(connection) for connection in connections[-4:-1])
        # The newest still waits, and gets what comes.
        assert server.grid is not None
        server.grid.push_messages([Message(RecordDict(), raw.node_id, "query")])
        assert answered(connections[-1])


def test_what_fails_in_the_servers_thread_ends_the_rounds(dial: Callable[..., list[socket.socket]]) -> None:
    class Full(Notes):
        def note(self, message: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, serving(reporter=Full()) as server:
        patch.setattr(http, "SILENT_SECONDS", 0.5)
        dial(server.address[1])
        with pytest.raises(FedRAGError, match="No space left on device"):
            rounds_of(server, 1, min_clients=1)


def test_strangers_that_come_and_go_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedrag_cli.federated.participants.MOST_STRANGERS", 3)
    with serving() as server:
        roster = Roster(server.grid, common(), SilentReporter())
        for number in range(12):
            stranger = Raw(Signer(new_key()))
            stranger.connect(server)
            roster.refresh()
            if number % 2:
                (head,), _ = stranger.pull()
                stranger.announce(Packer().pack(Message(RecordDict(), reply_to=message_from_proto(head)), f"{number}"))
                roster.refresh()
            stranger.post(DEACTIVATE)
            roster.refresh()
        assert (len(roster._pending), len(roster._greeted), len(roster._participants)) == (0, 3, 3)
        # Who was forgotten is met again.
        late = ToyClient("late", [1.0, 0.0, 0.0])
        (thread,) = start({node(server): late})

        def is_met() -> bool:
            roster.refresh()
            return [participant.name for participant in roster.ready()] == ["late"]

        eventually(is_met)
        late.ended = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("tls", [False, True])
def test_answers_are_sent_at_once(keys: Path, monkeypatch: pytest.MonkeyPatch, tls: bool) -> None:
    served, known = plain_or_tls(keys, tls)
    seen: list[int] = []
    expect = http.LimitedListener.expect

    def found(listener: http.LimitedListener, scope: Any, seconds: float) -> Any:
        connection = expect(listener, scope, seconds)
        assert connection is not None
        seen.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        return connection

    monkeypatch.setattr(http.LimitedListener, "expect", found)
    with serving(**served) as server:
        assert node(server, **known).check()
    assert seen
    assert all(seen)
