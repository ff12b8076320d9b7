"""Who gets into a federation: allowed keys through the command line, and refusals before a request's body is read."""

from __future__ import annotations

import socket
import time
from base64 import b64encode
from pathlib import Path

import pytest
from federation import Federation, tuned_weights
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from toy_federation import new_key, serving

from fedrag_cli.federated.keys import PrivateKey, write_authority, write_node_key, write_server_certificate

pytestmark = pytest.mark.fl
LARGE = 6 * 2**20


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


def headers_of(key: PrivateKey, signer: PrivateKey | None = None) -> dict[str, str]:
    """Return the headers that a client with a key sends; signed by another key where one is given."""
    stamp = now().isoformat()
    signature = sign_message(signer or key, stamp.encode())
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public_key_to_bytes(key.public_key())).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(signature).decode(),
        TIMESTAMP_HEADER: stamp,
    }


def first_answer(port: int, route: str, headers: dict[str, str], size: int = LARGE) -> str:
    """Announce a body without sending it, and return the first line of the answer.

    Where the server begins to read the body, that line is "100 Continue".
    """
    lines = [f"POST /v1/fleet/{route} HTTP/1.1", "Host: localhost", "Content-Type: application/x-protobuf"]
    lines += [
        f"Content-Length: {size}",
        "Expect: 100-continue",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        answer, end = b"", time.monotonic() + 30
        while b"\r\n" not in answer and time.monotonic() < end:
            part = connection.recv(4096)
            if not part:
                break
            answer += part
    return answer.split(b"\r\n")[0].decode("latin-1")


@pytest.mark.parametrize("route", ["push-object", "push-messages"])
def test_a_large_body_of_an_unknown_key_is_refused_before_it_is_read(route: str) -> None:
    known, unknown = new_key(), new_key()
    with serving(allowed={"north": public_key_to_bytes(known.public_key())}) as server:
        port = server.address[1]
        refused = {
            "unsigned": {},
            "another key": headers_of(unknown),
            "a false signature": headers_of(known, signer=unknown),
            "no signature": {**headers_of(known), FLEET_HTTP_SIGNATURE_HEADER: ""},
            "garbage": {**headers_of(known), FLEET_HTTP_PUBLIC_KEY_HEADER: "?"},
        }
        answers = {what: first_answer(port, route, headers) for what, headers in refused.items()}
        assert answers == dict.fromkeys(refused, "HTTP/1.1 401 Unauthorized")
        # The key that is allowed may go on, but not beyond the bound.
        assert first_answer(port, route, headers_of(known)) == "HTTP/1.1 100 Continue"
        assert first_answer(port, route, headers_of(known), 9 * 2**20).startswith("HTTP/1.1 413")
