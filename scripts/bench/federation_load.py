"""Measure what many clients, far clients, slow lines and half-sent bodies cost a server, and write it to RESULTS.md.

    python scripts/bench/federation_load.py [--clients 10 50 100 200] [--no-write]

The server's processor time a round is that of its process, with a model of 1,000 numbers and no work to do; its
clients are threads of another process. Lines are a proxy between client and server that delays what passes, or lets
only so many bytes a second through.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common import machine, write_section

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

ROUNDS = 3
NUMBERS = 1000
WAITING_SECONDS = 30.0
TENSORS = 24
SLOW_NUMBERS, SLOW_RATE = 6_000_000, 150_000
NEW_CLIENTS = 3000


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="*", type=int, default=[10, 50, 100, 200])
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--slow-line", action="store_true", help="measure the slow line alone, and print only")
    options = parser.parse_args()
    if options.slow_line:
        print(slow_line())
        return
    lines = ["| what | figure |", "| --- | ---: |"]
    for count in options.clients:
        a_round, waiting = processor_time(count)
        lines.append(f"| processor seconds of the server a round, {count} clients | {a_round:.2f} |")
        lines.append(f"| percent of a core for each of {count} clients that wait | {100 * waiting / count:.4f} |")
        print(*lines[-2:], sep="\n", flush=True)
    for latency in (0.0, 0.4):
        seconds, _ = over_a_line(latency=latency, rate=0, size=NUMBERS * TENSORS, rounds=2)
        lines.append(
            f"| seconds of 2 rounds with {TENSORS} tensors, {1000 * latency:.0f} ms there and back | {seconds:.1f} |"
        )
        print(lines[-1], flush=True)
    lines.append(slow_line())
    print(lines[-1], flush=True)
    for count in (1, 200):
        grown = growth(lambda port, count=count: half_sent(port, count))
        lines.append(f"| MB that the server grows by with {count} bodies that never end, of one client | {grown:.0f} |")
        print(lines[-1], flush=True)
    grown = growth(lambda port: new_clients(port, NEW_CLIENTS))
    lines.append(f"| MB that the server grows by with {NEW_CLIENTS} clients with new keys | {grown:.0f} |")
    print(lines[-1], flush=True)
    if not options.no_write:
        write_section("Federation, load and lines", "\n".join([(__doc__ or "").strip(), "", *lines, "", machine()]))


def slow_line() -> str:
    """Return the row of a model over a slow line that is cut where half of the update has passed."""
    megabytes = 4 * SLOW_NUMBERS / 1e6
    seconds, passed = over_a_line(
        latency=0.0, rate=SLOW_RATE, size=SLOW_NUMBERS, rounds=1, tensors=1, cut_at=round(1.5e6 * megabytes)
    )
    what = f"seconds of a round and the final model with {megabytes:.0f} MB over {SLOW_RATE / 1000:.0f} kB/s"
    took = f"{seconds:.0f}" if seconds else "never"
    return f"| {what}, cut in the middle of the update (MB that passed) | {took} ({passed:.1f}) |"


class ManyTensors:
    """A client with several tensors that adds one to each."""

    def __init__(self, name: str, manifest: dict[str, list[int]]) -> None:
        from fedrag_cli.federated.handshake import Agreement

        self.name, self.agreement, self.ended = name, Agreement(1, "retriever", manifest, {}, {}), False

    def __call__(self, message: Any) -> Any:
        """Answer a message."""
        from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

        from fedrag_cli.federated.messages import ACTION, AGREEMENT, FINAL, NAME, STOP
        from fedrag_cli.federated.weights import from_wire, update_to_wire

        config = dict(message.content.config_records["config"])
        if message.metadata.message_type == "query":
            self.ended = config[ACTION] == STOP
            reply = ConfigRecord({AGREEMENT: self.agreement.to_json(), NAME: self.name})
            return Message(RecordDict({"config": reply}), reply_to=message)
        metrics = MetricRecord({"num-examples": 1, "loss": 1.0})
        if config.get(FINAL):
            self.ended = True
            return Message(RecordDict({"metrics": metrics}), reply_to=message)
        weights = from_wire(message.content.array_records["arrays"])
        arrays = update_to_wire({name: tensor + 1 for name, tensor in weights.items()}, weights, "float32")
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def run_clients(address: str, count: int, manifest: dict[str, list[int]]) -> None:
    """Be a process with so many clients."""
    from types import SimpleNamespace

    from toy_federation import node

    server = SimpleNamespace(address=(address, 0))
    ends = [(node(server, address=address), ManyTensors(f"c{number}", manifest)) for number in range(count)]  # type: ignore[arg-type]
    threads = [threading.Thread(target=end.run, args=(client,)) for end, client in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextmanager
def clients_at(address: str, count: int, manifest: dict[str, list[int]]) -> Iterator[None]:
    """Run clients in another process."""
    command = [sys.executable, "-W", "ignore", __file__, "clients", address, str(count), json.dumps(manifest)]
    process = subprocess.Popen(command)
    try:
        yield
        process.wait(60)
    except subprocess.TimeoutExpired:
        print("the clients did not end", file=sys.stderr)
    finally:
        process.kill()
        process.wait()


def federate(server: Any, count: int, manifest: dict[str, list[int]], rounds: int) -> dict[int, tuple[float, float]]:
    """Run a federation and return the wall and processor seconds at the end of each round."""
    import torch

    from fedrag_cli.config.schema import FederatedConfig
    from fedrag_cli.federated.checkpoint import RoundState
    from fedrag_cli.federated.config import FedAvgConfig
    from fedrag_cli.federated.handshake import Agreement
    from fedrag_cli.federated.rounds_loop import Federation
    from fedrag_cli.registry import build
    from fedrag_cli.runs.reporter import SilentReporter

    marks: dict[int, tuple[float, float]] = {}
    settings = FederatedConfig(
        rounds=rounds, min_clients=count, gather_timeout=600.0, round_timeout=900.0, rejoin_timeout=60.0
    )
    federation = Federation(
        server.grid,
        Agreement(1, "retriever", manifest, {}, {}),
        settings,
        build("strategy", FedAvgConfig(), min_clients=count, learning_rate=1.0),
        seed=0,
        reporter=SilentReporter(),
        save_round=lambda state: marks.setdefault(state.number, (time.perf_counter(), time.process_time())) and None,
    )
    generator = torch.Generator().manual_seed(0)
    federation.run(RoundState(0, {name: torch.randn(shape, generator=generator) for name, shape in manifest.items()}))
    marks[rounds + 1] = (time.perf_counter(), time.process_time())
    return marks


def processor_time(count: int) -> tuple[float, float]:
    """Return the server's processor seconds a round, and a second while everybody waits."""
    from toy_federation import serving

    manifest = {"w": [NUMBERS]}
    with serving() as server, clients_at(f"127.0.0.1:{server.address[1]}", count, manifest):
        while len(server.state.members()) < count:
            time.sleep(0.2)
        time.sleep(3.0)
        before = time.process_time()
        time.sleep(WAITING_SECONDS)
        waiting = (time.process_time() - before) / WAITING_SECONDS
        marks = federate(server, count, manifest, ROUNDS)
    return (marks[ROUNDS][1] - marks[1][1]) / (ROUNDS - 1), waiting


def over_a_line(
    *, latency: float, rate: float, size: int, rounds: int, tensors: int = TENSORS, cut_at: int | None = None
) -> tuple[float, float]:
    """Return the seconds of a federation of one client behind a line, or 0 where it failed, and the MB that passed.

    Its connections are cut once so many bytes have passed.
    """
    from line import Line
    from toy_federation import serving

    from fedrag_cli.errors import FederationError

    manifest = {f"layer.{number}.weight": [size // tensors] for number in range(tensors)}
    with (
        serving() as server,
        Line(server.address[1], latency=latency, rate=rate) as line,
        clients_at(f"127.0.0.1:{line.port}", 1, manifest),
    ):
        while not server.state.members():
            time.sleep(0.1)
        if cut_at is not None:
            threading.Thread(target=cut_once, args=(line, cut_at), daemon=True).start()
        started = time.perf_counter()
        try:
            federate(server, 1, manifest, rounds)
        except FederationError:
            return 0.0, line.passed / 1e6
        return time.perf_counter() - started, line.passed / 1e6


def cut_once(line: Any, passed: int) -> None:
    """Cut a line once so many bytes have passed."""
    while line.passed < passed:
        time.sleep(0.1)
    line.cut()


def growth(disturb: Callable[[int], list[socket.socket]]) -> float:
    """Return how many MB a server process grows by while somebody disturbs it at its port."""
    command = [sys.executable, "-W", "ignore", __file__, "server"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = int(process.stdout.readline())
    try:
        before = resident(process.pid)
        connections = disturb(port)
        time.sleep(5.0)
        after = resident(process.pid)
        for connection in connections:
            connection.close()
    finally:
        process.kill()
        process.wait()
    return (after - before) / 1e6


def new_clients(port: int, count: int) -> list[socket.socket]:
    """Introduce so many clients with new keys."""
    from types import SimpleNamespace

    from toy_federation import Raw, new_key

    from fedrag_cli.federated.fleet.auth import Signer

    for _ in range(count):
        Raw(Signer(new_key())).connect(SimpleNamespace(address=("127.0.0.1", port)))
    return []


def half_sent(port: int, count: int) -> list[socket.socket]:
    """Send bodies of the largest size that the server reads, but for the last byte, as one client."""
    from types import SimpleNamespace

    from toy_federation import Raw, new_key

    from fedrag_cli.federated.fleet._flower import PUSH_OBJECT
    from fedrag_cli.federated.fleet.auth import Signer

    raw, size = Raw(Signer(new_key())), 512 * 2**10
    raw.connect(SimpleNamespace(address=("127.0.0.1", port)))
    connections = []
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", port))
        connections.append(connection)
        connection.settimeout(1.0)
        headers = {"Host": "x", "Content-Length": str(size), **raw.signer.headers(PUSH_OBJECT, b"")}
        head = f"POST {PUSH_OBJECT} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        with suppress(OSError):
            connection.sendall(head.encode() + b"\r\n" + bytes(size - 1))
    return connections


def resident(pid: int) -> int:
    """Return the resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def run_server() -> None:
    """Be a process with a server."""
    from toy_federation import serving

    with tempfile.TemporaryDirectory(), serving() as server:
        print(server.address[1], flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    if sys.argv[1:2] == ["clients"]:
        run_clients(sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
    elif sys.argv[1:2] == ["server"]:
        run_server()
    else:
        main()
