"""Clients that train by adding a fixed step, and a federation of them over the real transport, in one process.

Run as a program it is one stress run: `python toy_federation.py ROUNDS CLIENTS`, and prints the sum that came out.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedrag_cli.config.schema import FederatedConfig, TransportDtype
from fedrag_cli.federated.checkpoint import RoundState
from fedrag_cli.federated.config import FedAvgConfig
from fedrag_cli.federated.endpoint import ServerAddress
from fedrag_cli.federated.fleet._flower import (
    ACTIVATE,
    PULL_MESSAGES,
    PULL_OBJECT,
    PUSH_MESSAGES,
    PUSH_OBJECT,
    TYPES,
    Outgoing,
    identify,
)
from fedrag_cli.federated.fleet.auth import Signer
from fedrag_cli.federated.fleet.client import FleetNode
from fedrag_cli.federated.fleet.server import FleetServer
from fedrag_cli.federated.handshake import Agreement
from fedrag_cli.federated.keys import PrivateKey
from fedrag_cli.federated.messages import ACTION, AGREEMENT, FINAL, NAME, STOP
from fedrag_cli.federated.privacy import epsilon_of_ledger
from fedrag_cli.federated.rounds_loop import Federation
from fedrag_cli.federated.weights import Weights, from_wire, update_to_wire
from fedrag_cli.registry import build
from fedrag_cli.runs.reporter import SilentReporter

SHAPE = [3]


def new_key() -> PrivateKey:
    """Return a fresh node key."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


class Recorder(SilentReporter):
    """Keeps notes and events."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.events: list[dict[str, Any]] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def event(self, name: str, **fields: Any) -> None:
        self.events.append({"event": name, **fields})


class Notes(SilentReporter):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        """Keep a line."""
        self.lines.append(message)


class ToyClient:
    """Answers a handshake, and trains by adding a fixed step; `change` may spoil what is sent."""

    def __init__(
        self,
        name: str,
        step: list[float],
        examples: int = 1,
        loss: float = 1.0,
        change: Callable[[Weights], Weights] = lambda weights: weights,
        agreement: Agreement | None = None,
        dtype: TransportDtype = "float32",
    ) -> None:
        self.name, self.step, self.examples, self.loss = name, torch.tensor(step), examples, loss
        self.change, self.agreement = change, agreement or common()
        self.dtype = dtype
        self.configs: list[dict[str, Any]] = []
        self.received: list[Weights] = []
        self.final: Weights | None = None
        self.ended = False

    def __call__(self, message: Message) -> Message:
        config = dict(message.content.config_records["config"])
        if message.metadata.message_type == "query":
            self.ended = config[ACTION] == STOP
            reply = ConfigRecord({AGREEMENT: self.agreement.to_json(), NAME: self.name})
            return Message(RecordDict({"config": reply}), reply_to=message)
        weights = from_wire(message.content.array_records["arrays"])
        metrics = MetricRecord({"num-examples": self.examples, "loss": self.loss})
        if config.get(FINAL):
            self.final, self.ended = weights, True
            return Message(RecordDict({"metrics": metrics}), reply_to=message)
        self.configs.append(config)
        self.received.append(weights)
        arrays = update_to_wire(self.change({"w": weights["w"] + self.step}), weights, self.dtype)
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def asking(content: RecordDict, kind: str = "train", node: int = 2) -> Message:
    """Return a message of a server, outside of any federation."""
    identify()
    return Message(content, node, kind)


def spent_epsilon(noise_multiplier: float, rounds: int, delta: float) -> float:
    """Return the epsilon that rounds of clipped updates with the same noise have spent."""
    return epsilon_of_ledger([{"noise_multiplier": noise_multiplier}] * rounds, delta)


def common(size: int = 3) -> Agreement:
    """Return what toy clients and their server have in common."""
    return Agreement(1, "retriever", {"w": [size]}, {}, {})


@contextmanager
def serving(**options: Any) -> Iterator[FleetServer]:
    """Serve on a free port of the loopback address."""
    with FleetServer("127.0.0.1", 0, **options) as server:
        yield server


def node(server: FleetServer, key: PrivateKey | None = None, **options: Any) -> FleetNode:
    """Return a client's end for a server; options of `ServerAddress` and `FleetNode`."""
    address = ServerAddress(
        options.pop("address", f"127.0.0.1:{server.address[1]}"), options.pop("tls", False), options.pop("ca", None)
    )
    return FleetNode(address, key or new_key(), SilentReporter(), **{"connect_timeout": 20.0, **options})


def eventually(true: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def request_bytes(signer: Signer, path: str, body: bytes) -> bytes:
    """Return a signed request."""
    headers = {"Host": "x", "Content-Length": str(len(body)), **signer.headers(path, body)}
    return (
        f"POST {path} HTTP/1.1\r\n".encode()
        + "".join(f"{k}: {v}\r\n" for k, v in headers.items()).encode()
        + b"\r\n"
        + body
    )


def answered(connection: socket.socket) -> bool:
    """Return whether a request on a connection is taken; the end of an answer before may come first."""
    found = b""
    while b"HTTP/1.1 200" not in found and (data := connection.recv(4096)):
        found += data
    return b"HTTP/1.1 200" in found


def ended(connection: socket.socket) -> bool:
    """Return whether the server has ended a connection, after what it had to say."""
    connection.settimeout(20.0)
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    return True


class Raw:
    """A client that is written by hand, and may do what ours never does."""

    def __init__(self, signer: Signer, source: str = "127.0.0.1") -> None:
        self.signer, self.node_id = signer, 0
        self._base, self._source = "", source

    def connect(self, server: FleetServer) -> None:
        """Introduce itself."""
        self._base = f"http://127.0.0.1:{server.address[1]}"
        hello = {"public_key": self.signer.public_key, "heartbeat_interval": 1800}
        try:
            self.node_id = self.post(ACTIVATE, **hello).node_id
        except httpx.HTTPStatusError as error:
            self.signer.begin(error.response.json()["challenge"])
            self.node_id = self.post(ACTIVATE, **hello).node_id

    def post(self, path: str, **fields: Any) -> Any:
        """Send a signed request."""
        asked, answered = TYPES[path]
        body = asked(**fields).SerializeToString()
        with httpx.Client(transport=httpx.HTTPTransport(verify=False, local_address=self._source), timeout=30) as line:
            response = line.post(self._base + path, content=body, headers=self.signer.headers(path, body))
        response.raise_for_status()
        return answered.FromString(response.content)

    def pull(self) -> tuple[list[Any], list[Any]]:
        """Ask for a message."""
        answer = self.post(PULL_MESSAGES)
        return list(answer.messages_list), list(answer.message_object_trees)

    def piece(self, object_id: str) -> bytes | None:
        """Ask for a piece of a message."""
        answer = self.post(PULL_OBJECT, object_id=object_id)
        return answer.object_content if answer.object_found else None

    def announce(self, reply: Outgoing) -> list[str] | None:
        """Send a bare reply, and return what is missing; None where it is not wanted."""
        answer = self.post(PUSH_MESSAGES, messages_list=[reply.head], message_object_trees=[reply.tree])
        return None if any(answer.results.values()) else list(answer.objects_to_push)

    def push(self, object_id: str, content: bytes) -> bool:
        """Send a piece of a reply."""
        return bool(self.post(PUSH_OBJECT, object_id=object_id, object_content=content).stored)


def start(nodes: dict[FleetNode, ToyClient]) -> list[threading.Thread]:
    """Run clients in threads."""
    threads = [threading.Thread(target=end.run, args=(client,), daemon=True) for end, client in nodes.items()]
    for thread in threads:
        thread.start()
    return threads


def federate(server: FleetServer, clients: list[ToyClient], rounds: int, **settings: Any) -> RoundState:
    """Run a federation of FedAvg with clients in threads, starting from zeros."""
    threads = start({node(server): client for client in clients})
    size = clients[0].agreement.manifest["w"][0]
    state = rounds_of(server, rounds, size=size, **{"min_clients": len(clients), **settings})
    for thread in threads:
        thread.join(20)
    return state


def rounds_of(server: FleetServer, rounds: int, *, size: int = 3, **settings: Any) -> RoundState:
    """Run the server's side of a federation of FedAvg, starting from zeros."""
    config = FederatedConfig(
        rounds=rounds, strategy=FedAvgConfig(), **{"rejoin_timeout": 5.0, "gather_timeout": 60.0, **settings}
    )
    assert server.grid is not None
    federation = Federation(
        server.grid,
        common(size),
        config,
        build("strategy", config.strategy, min_clients=config.min_clients, learning_rate=1.0),
        seed=0,
        reporter=SilentReporter(),
    )
    return federation.run(RoundState(0, {"w": torch.zeros(size)}))


def main() -> None:
    """Run one stress run: identical replies of all clients, every round."""
    rounds, count = int(sys.argv[1]), int(sys.argv[2])
    clients = [ToyClient(f"c{number}", [1.0, 0.5, 0.25]) for number in range(count)]
    with serving() as server:
        state = federate(server, clients, rounds)
    answered = [len(row["clients"]) for row in state.history]
    print(json.dumps({"w": state.weights["w"].tolist(), "answered": answered}))


if __name__ == "__main__":
    main()
