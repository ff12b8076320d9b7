"""What goes over the wire, captured between client and server: tuned tensors, counts, listed metrics, nothing else."""

from __future__ import annotations

import base64
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import data_rows
from cryptography.hazmat.primitives.asymmetric import utils
from federation import Federation, events, tuned_weights

pytestmark = pytest.mark.fl


def _close(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


class Tap:
    """Forwards connections to a port, and keeps what passes in both directions."""

    def __init__(self, target: int) -> None:
        self.target, self.seen, self._lock = target, bytearray(), threading.Lock()
        self._sockets: list[socket.socket]
        self._threads: list[threading.Thread]
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets, self._threads = [], []
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def close(self) -> None:
        """Close all connections, and wait for the threads that forward them."""
        # First the one that takes new connections, so that none comes after the others are closed.
        _close(self._listener)
        self._threads[0].join(10)
        for connection in self._sockets:
            _close(connection)
        for thread in self._threads:
            thread.join(10)

    def _start(self, target: Callable[..., None], *arguments: socket.socket) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    # A client may ask once more when the server has ended; it is told as it would be without the tap.
                    near.close()
                    continue
                self._sockets += [near, far]
                self._start(self._pump, near, far)
                self._start(self._pump, far, near)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                with self._lock:
                    self.seen += data
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def federation(tmp_path: Path, models: dict[str, Path]) -> Iterator[Federation]:
    made = Federation(tmp_path / "federation", models, federated={"metrics": ["loss"]})
    yield made
    made.stop()


def private_texts(folder: Path) -> set[str]:
    """Return what must not leave a client: its texts, ids and paths, and the words that only they have."""
    rows = data_rows()
    texts = {row["text"] for row in rows["corpus"]} | {row["id"] for row in rows["corpus"]}
    for split in ("train", "validation"):
        for row in rows[split]:
            texts |= {row["query"], *([row["response"]] if isinstance(row["response"], str) else row["response"])}
    return texts | {str(folder), "jsonl", "site0.yaml", "relevant_ids"}


def without_signatures(seen: bytes) -> bytes:
    """Take out the signatures of requests, after a look at each: as base64 they hold short words by chance."""
    signature = re.compile(rb"(?<=flwr-signature: )[A-Za-z0-9+/=]+(?=\r\n)")
    found = [base64.b64decode(value, validate=True) for value in signature.findall(seen)]
    assert found
    for value in found:
        # Two numbers below the order of the curve (RFC 3279), and nothing else.
        first, second = utils.decode_dss_signature(value)
        assert utils.encode_dss_signature(first, second) == value
        assert 0 < min(first, second) <= max(first, second) < 2**384
    return signature.sub(b"", seen)


def test_texts_ids_and_paths_stay_at_home(federation: Federation) -> None:
    server = federation.serve()
    server.wait_for("Listening on")
    tap = Tap(federation.port)
    clients = [federation.join(site, port=tap.port) for site in range(2)]
    summary = server.finish()
    for client in clients:
        client.finish()
    tap.close()
    seen = bytes(tap.seen)
    updates = events(Path(summary["run_dir"]), "client_update")
    # All tensors passed here: the check below looked at the real traffic.
    assert len(seen) > sum(event["bytes_received"] + event["bytes_sent"] for event in updates)
    assert b"query_encoder" in seen
    readable = without_signatures(seen)
    for text in private_texts(federation.folder):
        assert text.encode() not in readable, text
    # Of the metrics only the listed one.
    assert b"num-examples" in seen
    assert b"loss" in seen
    # Three letters alone occur among the bytes of the tensors by chance; a record's key has its length before it.
    for name in (b"validation_loss", b"seconds", b"\x0a\x03mrr", b'"mrr"'):
        assert name not in seen, name
    assert all(set(event["metrics"]) <= {"loss", "validation-examples"} for event in updates)


def test_float16_halves_the_traffic_and_the_server_keeps_float32(tmp_path: Path, models: dict[str, Path]) -> None:
    captured = {}
    for dtype in ("float32", "float16"):
        settings = {"rounds": 1, "min_clients": 1, "transport_dtype": dtype}
        federation = Federation(tmp_path / dtype, models, sites=1, federated=settings)
        try:
            server = federation.serve()
            server.wait_for("Listening on")
            tap = Tap(federation.port)
            client = federation.join(0, port=tap.port)
            run = Path(server.finish()["run_dir"])
            client.finish()
            tap.close()
        finally:
            federation.stop()
        captured[dtype] = bytes(tap.seen)
    sizes = [tensor.numel() for name, tensor in tuned_weights(run).items() if "/query_" in name]
    # Out, back, and the final model out: two bytes less each time for each number. Clients ask for messages meanwhile,
    # the longer the more often.
    saved = len(captured["float32"]) - len(captured["float16"])
    assert saved == pytest.approx(3 * 2 * sum(sizes), rel=0.3)
    # A tensor that the other side has already, such as biases that are all zero, does not travel again.
    assert len(sizes) < captured["float16"].count(b"'descr': '<f2'") <= 3 * len(sizes)
    assert b"'descr': '<f4'" not in captured["float16"]
    assert events(run, "client_update")[0]["bytes_received"] == sum(2 * size + 128 for size in sizes)
    theirs = tuned_weights(client.run_directory())
    for name, tensor in tuned_weights(run).items():
        if "/query_" in name:
            assert torch.equal(theirs[name], tensor.half().float()), name


def test_with_tls_nothing_can_be_read(tmp_path: Path, models: dict[str, Path]) -> None:
    from fedrag_cli.federated.keys import write_authority, write_node_key, write_server_certificate

    keys = tmp_path / "keys"
    write_authority(keys)
    write_server_certificate(keys, ["localhost"])
    for site in range(2):
        write_node_key(keys, f"site{site}")
    protection = {
        "certificate": str(keys / "server.crt"),
        "certificate_key": str(keys / "server.key"),
        "allowed_keys": str(keys),
        "rounds": 1,
    }
    federation = Federation(tmp_path / "federation", models, federated=protection)
    try:
        server = federation.serve()
        server.wait_for("Listening on")
        tap = Tap(federation.port)
        own = [[f"federated.key={keys}/site{site}.key", f"federated.ca_certificate={keys}/ca.crt"] for site in range(2)]
        clients = [federation.join(site, *own[site], host="localhost", port=tap.port) for site in range(2)]
        summary = server.finish()
        for client in clients:
            client.finish()
        tap.close()
    finally:
        federation.stop()
    assert "(TLS, allowed keys)" in server.log
    assert summary["rounds"][0]["clients"] == ["site0", "site1"]
    for readable in (b"query_encoder", b"num-examples", b"fleet", b"HTTP/1.1"):
        assert readable not in bytes(tap.seen)
