"""The server's end: Flower's Fleet API alone, and a grid that is its state, in one process.

A stock SuperLink offers its Control and Runtime APIs on the same port, and whoever reaches it can submit code. Here
only the routes that clients need exist.
"""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import uvicorn

from fedrag_cli.errors import ConnectionFailedError
from fedrag_cli.federated.endpoint import ServerCertificate
from fedrag_cli.federated.fleet._flower import identify
from fedrag_cli.federated.fleet.auth import Admission, Refusals
from fedrag_cli.federated.fleet.http import MOST_OF_A_CLIENT, SILENT_SECONDS, FleetApp, LimitedListener
from fedrag_cli.federated.fleet.state import MOST_CLIENTS, FleetState
from fedrag_cli.federated.grid import FederationGrid, quiet_flower
from fedrag_cli.runs.files import os_errors
from fedrag_cli.runs.reporter import Reporter, SilentReporter

MOST_DESCRIPTORS = 16384
FEWEST_DESCRIPTORS = 256


class FleetServer:
    """Serves clients over HTTP(S); a context manager.

    Args:
        host: Address to listen on.
        port: Port to listen on.
        certificate: The TLS certificate; plain HTTP without one.
        allowed: Public keys (SSH format) by client name; None lets every client in that signs with a key of its own.
        read_allowed: Returns the keys that are allowed now; asked where an unknown one comes.
        reporter: Told who is turned away, in a thread of the server.
        max_message_bytes: Largest sum of the bytes of a reply's tensors.
        pieces: Folder where replies take their room, in files without names; the system's temporary one by default.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        certificate: ServerCertificate | None = None,
        allowed: Mapping[str, bytes] | None = None,
        read_allowed: Callable[[], Mapping[str, bytes]] | None = None,
        reporter: Reporter | None = None,
        max_message_bytes: int = 2**40,
        pieces: Path | None = None,
    ) -> None:
        """Prepare the state; nothing listens yet."""
        quiet_flower()
        identify()
        self._host, self._port = host, port
        self._context = certificate.context() if certificate is not None else None
        self._reporter = reporter or SilentReporter()
        self._pieces = pieces if pieces is not None else Path(tempfile.gettempdir())
        self._refusals = Refusals(self._note)
        self.state = FleetState(self._pieces, max_message_bytes)
        self._admission = Admission(allowed, read_allowed, self.state.allow, self._refusals)
        self._known = len(allowed or {})
        self.grid: FederationGrid = self.state

    def __enter__(self) -> FleetServer:
        """Listen.

        Raises:
            ConnectionFailedError: The address cannot be listened on, or the system allows too few open files.
        """
        most = self._most_connections()
        self.state.most_clients = min(MOST_CLIENTS, max(self._known, most // MOST_OF_A_CLIENT))
        with os_errors(self._pieces):
            self._pieces.mkdir(mode=0o700, parents=True, exist_ok=True)
        unlimited = listen(self._host, self._port)
        self.address = unlimited.getsockname()[:2]
        listener = LimitedListener(fileno=unlimited.detach()).open(self._refusals, most)
        self._app = FleetApp(self.state, self._admission, listener, self._refusals)
        context = listener.watch(self._context) if self._context is not None else None
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                self._app,
                # uvloop takes no listening socket that is a Python object.
                loop="asyncio",
                # The heads of requests have a bound in h11, and none in httptools.
                http="h11",
                ssl_context_factory=(lambda config, default: context) if context is not None else None,
                log_level="critical",
                access_log=False,
                log_config=None,
                lifespan="off",
                ws="none",
                server_header=False,
                # Whoever speaks through the loopback address could claim any, and escape the limit of its own.
                proxy_headers=False,
                callback_notify=listener.sweep,
                timeout_notify=1,
                timeout_keep_alive=int(SILENT_SECONDS),
                timeout_graceful_shutdown=2,
            )
        )
        self._thread = threading.Thread(target=self._serve, args=(listener,), daemon=True)
        self._thread.start()
        while not self._uvicorn.started:
            if not self._thread.is_alive():
                raise ConnectionFailedError(
                    f"The server could not start on {self._host}:{self._port}.",
                    "Choose another --address.",
                )
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening."""
        self._app.close()
        self._uvicorn.should_exit = True
        self._thread.join(5)
        if self._pieces != Path(tempfile.gettempdir()):
            # Replies have no names, so the folder is empty.
            with suppress(OSError):
                self._pieces.rmdir()

    def _note(self, line: str) -> None:
        try:
            self._reporter.note(line)
        except Exception as error:  # noqa: BLE001  (the rounds raise it, as they would where they noted something)
            self.state.fail(error)

    def _serve(self, listener: LimitedListener) -> None:
        try:
            self._uvicorn.run([listener])
        except BaseException as error:  # noqa: BLE001  (the rounds raise it, which would wait for clients otherwise)
            self.state.fail(error)

    def _most_connections(self) -> int:
        """Return how many connections there may be at once: half of the open files, the others are for replies."""
        descriptors = _descriptors()
        if descriptors < FEWEST_DESCRIPTORS:
            raise ConnectionFailedError(
                f"The system allows this process {descriptors} open files, and a server needs {FEWEST_DESCRIPTORS}.",
                "Raise it, such as with: ulimit -n 4096",
            )
        most = descriptors // 2
        if self._known * MOST_OF_A_CLIENT > most:
            self._reporter.note(
                f"The system allows this process {descriptors} open files, which may be too few for {self._known} "
                f"clients. Raise it, such as with: ulimit -n {self._known * MOST_OF_A_CLIENT * 2}"
            )
        return most


def _descriptors() -> int:
    """Return how many files this process may have open, after asking for more."""
    try:
        import resource
    except ImportError:
        return MOST_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(MOST_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0 for any that is free.

    Raises:
        ConnectionFailedError: The address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        # Python adds the address, which stands in the message already.
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        raise ConnectionFailedError(
            f"Cannot listen on {host}:{port}: {reason}.",
            "Choose another --address, or stop what uses the port.",
        ) from error
