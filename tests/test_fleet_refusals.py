"""Whom a server turns away at the door, and what its owner sees of it."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from flwr.supercore import date
from toy_federation import Notes, ToyClient, new_key, node, serving, start

from fedrag_cli.errors import ConnectionFailedError
from fedrag_cli.federated.fleet import admission, entrance
from fedrag_cli.federated.fleet.refusals import MOST_LINES, MOST_REMEMBERED, Refusals
from fedrag_cli.federated.fleet.server import ServerCertificate
from fedrag_cli.federated.keys import (
    fingerprint,
    load_allowed_keys,
    load_private_key,
    load_public_key,
    write_authority,
)

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


def eventually(true: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


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


def test_a_key_that_is_added_later_gets_in_under_its_name(keys: Path, clients: Path) -> None:
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


def test_strangers_do_not_have_the_folder_read_over_and_over(clients: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "SECONDS_BETWEEN_READS", 3600.0)
    reads = 0

    def read() -> dict[str, bytes]:
        nonlocal reads
        reads += 1
        return load_allowed_keys(clients)

    with serving(allowed=load_allowed_keys(clients), read_allowed=read) as server:
        with pytest.raises(ConnectionFailedError):
            node(server, new_key()).check()
        # Unsigned requests are refused at once, and never have it read.
        base = f"http://127.0.0.1:{server.address[1]}/v1/fleet/"
        assert httpx.post(base + "register-node", content=b"").status_code == 401
        assert reads == 1


def test_who_fails_at_the_handshake_is_told_once(keys: Path, tmp_path: Path) -> None:
    write_authority(tmp_path)
    notes = Notes()
    with serving(certificate=certificate(keys), reporter=notes) as server:
        where = ("127.0.0.1", server.address[1])
        for _ in range(2):
            with pytest.raises(ConnectionFailedError, match="is not trusted"):
                node(server, tls=True, ca=(tmp_path / "ca.crt").read_bytes()).check()
            with pytest.raises(ConnectionFailedError, match="plain requests"):
                node(server).check()
            for garbage in (b"\x00" * 64, b""):
                with socket.create_connection(where, 5) as probe:
                    probe.sendall(garbage)
                    probe.shutdown(socket.SHUT_WR)
                    while probe.recv(64):
                        pass
        trusting = ssl.create_default_context(cafile=str(keys / "ca.crt"))
        with (
            socket.create_connection(where, 5) as probe,
            trusting.wrap_socket(probe, server_hostname="localhost") as end,
        ):
            end.sendall(os.urandom(3).hex().encode())
            while end.recv(64):
                pass
        eventually(lambda: len(notes.lines) >= 5)
        assert node(server, tls=True, ca=(keys / "ca.crt").read_bytes()).check()
    assert sorted(notes.lines) == [
        "A client at 127.0.0.1 did not trust this server's certificate (unknown ca): it needs the authority's ca.crt, "
        "and a host name that the certificate is made for",
        "A connection from 127.0.0.1 ended before TLS was set up",
        "A connection from 127.0.0.1 sent no HTTP",
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


def test_a_wrong_clock_is_told_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supernode import node_auth_http_interceptor as signing

    notes = Notes()
    monkeypatch.setattr(signing, "now", lambda: date.now() - timedelta(hours=1))
    with serving(reporter=notes) as server, pytest.raises(ConnectionFailedError) as error:
        node(server).check()
    (line,) = notes.lines
    assert line.startswith("Refused a client at 127.0.0.1: its clock and this server's differ by 360")
    assert "both clocks" in error.value.hint


def test_a_flood_is_cut_short_and_hides_nothing_else() -> None:
    time_now = 0.0
    lines: list[str] = []
    refusals = Refusals(lines.append, now=lambda: time_now)
    for number in range(5000):
        refusals.tell(f"10.0.{number}", "handshake", f"scan {number}")
    assert lines[:MOST_LINES] == [f"scan {number}" for number in range(MOST_LINES)]
    assert lines[MOST_LINES:] == ["More of the same were turned away; those of this minute are not listed"]
    refusals.tell("key", "key", "the one that matters")
    assert lines[-1] == "the one that matters"
    time_now = 61.0
    # What was not told in the first minute is in the next, and what was is not again.
    refusals.tell("10.0.3", "handshake", "scan 3")
    refusals.tell("10.0.4000", "handshake", "scan 4000")
    assert lines[-2:] == ["the one that matters", "scan 4000"]
    for minute in range(2, 400):
        time_now = 61.0 * minute
        for number in range(MOST_LINES):
            refusals.tell(f"{minute}.{number}", "handshake", "more")
    assert len(refusals._told) == MOST_REMEMBERED


def test_a_certificate_that_cannot_be_used_is_said_so(keys: Path) -> None:
    swapped = ServerCertificate(keys / "server.key", keys / "server.crt")
    with pytest.raises(ConnectionFailedError, match="cannot be used"), serving(certificate=swapped):
        pass


@pytest.mark.parametrize("tls", [False, True])
def test_connections_that_ask_nothing_are_ended(keys: Path, monkeypatch: pytest.MonkeyPatch, tls: bool) -> None:
    monkeypatch.setattr(entrance, "SILENT_SECONDS", 1.0)
    notes = Notes()
    certificate = ServerCertificate(keys / "server.crt", keys / "server.key") if tls else None

    def ended(connection: socket.socket) -> bool:
        connection.settimeout(20.0)
        try:
            return connection.recv(1) == b""
        except ConnectionResetError:
            return True

    with serving(certificate=certificate, reporter=notes) as server:
        connections = [socket.create_connection(("127.0.0.1", server.address[1])) for _ in range(2)]
        if tls:
            context = ssl.create_default_context(cafile=keys / "ca.crt")
            connections = [context.wrap_socket(connection, server_hostname="localhost") for connection in connections]
        connections[1].sendall(b"POST /api/v0/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n")
        assert [ended(connection) for connection in connections] == [True, True]
        for connection in connections:
            connection.close()
        # One line for both, because they come from one address.
        assert notes.lines == ["A connection from 127.0.0.1 asked nothing for 1 s"]
        known = {"tls": True, "ca": (keys / "ca.crt").read_bytes()} if tls else {}
        assert node(server, **known).check()


@pytest.mark.parametrize("tls", [False, True])
def test_answers_are_sent_at_once(keys: Path, monkeypatch: pytest.MonkeyPatch, tls: bool) -> None:
    certificate = ServerCertificate(keys / "server.crt", keys / "server.key") if tls else None
    seen: list[int] = []
    open_as_before = entrance.Entrance._open

    def opened(self: entrance.Entrance) -> None:
        taken = self._transport.get_extra_info("socket")
        seen.append(taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        open_as_before(self)

    monkeypatch.setattr(entrance.Entrance, "_open", opened)
    known = {"tls": True, "ca": (keys / "ca.crt").read_bytes()} if tls else {}
    with serving(certificate=certificate) as server:
        assert node(server, **known).check()
    assert seen
    assert all(seen)
