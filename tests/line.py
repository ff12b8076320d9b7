"""A line between client and server that is slow, far away, or flips bits; used by tests and benchmarks."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

BLOCK = 16 * 1024


class Line:
    """Forwards connections to a port; a context manager.

    Args:
        target: The port of the loopback address to forward to.
        latency: Seconds that a byte takes there and back.
        rate: Bytes a second in each direction, all connections together; 0 for no bound.
        change: Given what passes towards the server (True) or back, and returns what arrives.
    """

    def __init__(
        self,
        target: int,
        *,
        latency: float = 0.0,
        rate: float = 0.0,
        change: Callable[[bool, bytes], bytes] = lambda towards, data: data,
    ) -> None:
        self.target, self.latency, self.rate, self.change = target, latency, rate, change
        self.passed = 0
        self._free_at = {True: 0.0, False: 0.0}
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Line:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in [self._listener, *self._sockets]:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def cut(self) -> None:
        """End the connections that are open."""
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    near.close()
                    continue
                for end in (near, far):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * BLOCK)
                self._sockets += [near, far]
                self._pump(near, far, True)
                self._pump(far, near, False)

    def _pump(self, source: socket.socket, sink: socket.socket, towards: bool) -> None:
        # What is on the way on a far line is more than what a slow one holds back.
        waiting: queue.Queue[tuple[float, bytes]] = queue.Queue(4 if self.rate else 4096)

        def read() -> None:
            data = b"x"
            while data:
                try:
                    data = source.recv(BLOCK)
                except OSError:
                    data = b""
                waiting.put((time.monotonic() + self.latency / 2, data))

        def write() -> None:
            with suppress(OSError):
                while True:
                    due, data = waiting.get()
                    if not data:
                        break
                    with self._lock:
                        self.passed += len(data)
                        if self.rate:
                            self._free_at[towards] = max(self._free_at[towards], time.monotonic())
                            self._free_at[towards] += len(data) / self.rate
                            due = max(due, self._free_at[towards])
                    time.sleep(max(0.0, due - time.monotonic()))
                    sink.sendall(self.change(towards, data))
            with suppress(OSError):
                sink.shutdown(socket.SHUT_WR)

        for work in (read, write):
            threading.Thread(target=work, daemon=True).start()
