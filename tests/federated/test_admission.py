"""Who gets into a federation: allowed keys through the command line, and refusals before a request's body is read."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from federation import Federation, tuned_weights
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from toy_federation import Raw, new_key, serving

from fedrag_cli.federated.fleet import http
from fedrag_cli.federated.fleet._flower import PIECE_BYTES, PUSH_MESSAGES, PUSH_OBJECT
from fedrag_cli.federated.fleet.auth import COUNT_HEADER, SESSION_HEADER, Signer
from fedrag_cli.federated.keys import write_authority, write_node_key, write_server_certificate

pytestmark = pytest.mark.fl


def test_serve_fl_lets_in_only_the_clients_whose_keys_are_allowed(tmp_path: Path, models: dict[str, Path]) -> None:
    federation = Federation(tmp_path, models, federated={"min_clients": 1})
    keys, allowed = tmp_path / "keys", tmp_path / "allowed"
    write_authority(keys)
    write_server_certificate(keys, ["localhost", "127.0.0.1"])
    for name in ("north", "south"):
        write_node_key(keys, name)
    allowed.mkdir()
    (keys / "north.pub").rename(allowed / "north.pub")
    own = ["federated.certificate=keys/server.crt", "federated.certificate_key=keys/server.key"]
    authority = "federated.ca_certificate=keys/ca.crt"
    try:
        server = federation.serve(*own, "federated.allowed_keys=allowed")
        server.wait_for("Listening on")
        assert "(TLS, allowed keys)" in server.log
        stranger = federation.join(1, authority, "federated.key=keys/south.key", name="stranger")
        error = stranger.finish(4)["error"]
        assert (error["type"], error["exit_code"]) == ("ConnectionFailedError", 4)
        assert "does not know this client's key" in error["message"]
        # Nor does one get in with a key that it has just made.
        newcomer = federation.join(1, authority, name="newcomer")
        assert "does not know this client's key" in newcomer.finish(4)["error"]["message"]
        client = federation.join(0, authority, "federated.key=keys/north.key")
        summary, joined = server.finish(), client.finish()
    finally:
        federation.stop()
    # Clients go by the names of their keys' files.
    assert [row["clients"] for row in summary["rounds"]] == [["north"]] * 2
    assert "south" not in server.log
    assert "site1" not in server.log
    theirs = tuned_weights(Path(joined["run_dir"]))
    assert all(bool((theirs[name] == tensor).all()) for name, tensor in tuned_weights(Path(summary["run_dir"])).items())


def first_answer(port: int, path: str, headers: dict[str, str], size: int) -> str:
    """Announce a body without sending it, and return the first line of the answer.

    Where the server begins to read the body, that line is "100 Continue".
    """
    announced = {"Host": "localhost", "Content-Length": str(size), "Expect": "100-continue", **headers}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in announced.items())]
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        answer, end = b"", time.monotonic() + 30
        while b"\r\n" not in answer and time.monotonic() < end:
            part = connection.recv(4096)
            if not part:
                break
            answer += part
    return answer.split(b"\r\n")[0].decode("latin-1")


@pytest.mark.parametrize("path", [PUSH_OBJECT, PUSH_MESSAGES])
def test_a_large_body_of_an_unknown_key_is_refused_before_it_is_read(path: str) -> None:
    known, unknown = Raw(Signer(new_key())), Signer(new_key())
    with serving(allowed={"north": known.signer.public_key}) as server:
        port = server.address[1]
        known.connect(server)

        def signed(**other: str) -> dict[str, str]:
            return {**known.signer.headers(path, b""), **other}

        theirs = unknown.headers(path, b"")
        refused = {
            "unsigned": {},
            "another key": theirs,
            "a false signature": signed(**{FLEET_HTTP_SIGNATURE_HEADER: theirs[FLEET_HTTP_SIGNATURE_HEADER]}),
            "no signature": signed(**{FLEET_HTTP_SIGNATURE_HEADER: ""}),
            "another session": signed(**{SESSION_HEADER: "0" * 32}),
            "another number": signed(**{COUNT_HEADER: "1000"}),
            "garbage": signed(**{FLEET_HTTP_PUBLIC_KEY_HEADER: "?"}),
        }
        answers = {what: first_answer(port, path, headers, PIECE_BYTES) for what, headers in refused.items()}
        assert answers == dict.fromkeys(refused, "HTTP/1.1 401 Unauthorized")
        # The key that is allowed may go on, but not beyond the bound.
        assert first_answer(port, path, signed(), PIECE_BYTES) == "HTTP/1.1 100 Continue"
        assert first_answer(port, path, signed(), 20 * 2**20).startswith("HTTP/1.1 413")


def test_bodies_that_never_end_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one client nor all of them together hold more of the server's memory than its bounds."""
    monkeypatch.setattr(http, "MOST_BODIES", 8)
    clients = [Raw(Signer(new_key())) for _ in range(4)]
    connections = []
    with serving() as server, ExitStack() as stack:
        for client in clients:
            client.connect(server)
            for _ in range(http.MOST_BODIES_OF_A_CLIENT + 1):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.address[1]), 5))
                headers = {"Content-Length": str(PIECE_BYTES), "Host": "x", "Expect": "100-continue"}
                headers |= client.signer.headers(PUSH_OBJECT, b"")
                head = f"POST {PUSH_OBJECT} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items())
                connection.sendall(head.encode() + b"\r\n")
                connections.append(connection)
        answers = []
        for connection in connections:
            connection.settimeout(1.0)
            try:
                answers.append(connection.recv(12))
            except TimeoutError:
                answers.append(b"it waits")
    # Of each client one too many; of the others, those for which there is room.
    assert answers.count(b"HTTP/1.1 503") == len(clients)
    assert answers.count(b"HTTP/1.1 100") == 8
    assert answers.count(b"it waits") == len(clients) * http.MOST_BODIES_OF_A_CLIENT - 8
