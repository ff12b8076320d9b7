"""The server's end: Flower's Fleet API alone, and a grid over its state, in one process.

A stock SuperLink offers its Control and Runtime APIs on the same port, and whoever reaches it can submit code. Here
only the routes that clients need exist.
"""

from __future__ import annotations

import socket
import ssl
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import uvicorn
from fastapi import FastAPI
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID, SubStatus
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.error import http_error_translator
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.main import generate_unique_route_id
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

from fedrag_cli.errors import ConnectionFailedError
from fedrag_cli.federated.fleet.admission import Admission
from fedrag_cli.federated.fleet.entrance import entrance
from fedrag_cli.federated.fleet.guard import RequestBounds, SpeakerCheck, check_routes
from fedrag_cli.federated.fleet.memory import PassingMemory
from fedrag_cli.federated.fleet.refusals import Refusals
from fedrag_cli.federated.fleet.state import FleetState
from fedrag_cli.federated.fleet.store import PieceStore
from fedrag_cli.federated.grid import FederationGrid, Member, quiet_flower
from fedrag_cli.runs.atomic import os_errors
from fedrag_cli.runs.reporting import Reporter, SilentReporter

HEARTBEAT_SECONDS = 10.0
START_SECONDS = 30.0
MOST_CONNECTIONS = 1000


@dataclass(frozen=True)
class ServerCertificate:
    """Files of the server's TLS certificate and its private key."""

    certificate: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        """Return what the handshake needs of them.

        Raises:
            ConnectionFailedError: They are missing, or do not fit each other.
        """
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ValueError) as error:
            raise ConnectionFailedError(
                f"The TLS certificate '{self.certificate}' with the key '{self.key}' cannot be used: {error}",
                "Check federated.certificate and federated.certificate_key.",
            ) from error
        return context


class FleetServer:
    """Serves clients over HTTP(S); a context manager.

    Args:
        host: Address to listen on.
        port: Port to listen on.
        certificate: The TLS certificate; plain HTTP without one.
        allowed: Public keys (SSH format) by client name; None lets every client in that signs with a key of its own.
        read_allowed: Returns the keys that are allowed now; asked where an unknown one comes.
        reporter: Told who is turned away, in a thread of the server.
        max_message_bytes: Largest reply of a client.
        max_message_objects: Most objects of a reply.
        pieces: Folder for the tensors of messages that are on their way, which is emptied; a temporary one by default.
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
        max_message_objects: int = 2**20,
        pieces: Path | None = None,
    ) -> None:
        """Prepare the state and the application."""
        check_routes()
        quiet_flower()
        self._host, self._port = host, port
        self._memory = PassingMemory()
        folder = pieces if pieces is not None else Path(tempfile.gettempdir()) / f"fedrag-{uuid.uuid4().hex}"
        self.state = FleetState(PieceStore(folder), max_message_bytes, max_message_objects)
        refusals = Refusals((reporter or SilentReporter()).note)
        app = FastAPI(
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            generate_unique_id_function=generate_unique_route_id,
            middleware=[
                Middleware(
                    RequestBounds,
                    admission=Admission(allowed, read_allowed, self.state.allow, refusals),
                    memory=self._memory,
                ),
                Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
                Middleware(ProtobufTranslationMiddleware),
                Middleware(NodeAuthMiddleware),
                Middleware(SpeakerCheck),
            ],
        )
        app.state.linkstate_factory = self.state
        app.state.enable_supernode_auth = allowed is not None
        app.include_router(fleet_router)
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                app,
                # uvloop reads from connections that were told to pause, which loses the first bytes of a handshake.
                loop="asyncio",
                http=entrance(certificate.context() if certificate else None, refusals),
                log_level="critical",
                access_log=False,
                log_config=None,
                lifespan="off",
                ws="none",
                server_header=False,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_keep_alive=60,
                timeout_graceful_shutdown=2,
            )
        )
        self._closing = threading.Event()
        self._task_id = 0
        self.grid: FleetGrid | None = None

    def __enter__(self) -> FleetServer:
        """Listen, and open the one run that clients see.

        Raises:
            ConnectionFailedError: The address cannot be listened on.
        """
        listener = listen(self._host, self._port)
        self.address = listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._uvicorn.run, args=([listener],), daemon=True)
        self._thread.start()
        end = time.monotonic() + START_SECONDS
        while not self._uvicorn.started:
            if not self._thread.is_alive() or time.monotonic() > end:
                raise ConnectionFailedError(
                    f"The server could not start on {self._host}:{self._port}.",
                    "Choose another --address.",
                )
            time.sleep(0.01)
        self.state.pieces.open()
        self._memory.start()
        self.grid = self._open_run()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the run and stop listening."""
        self._closing.set()
        self.state.finish_task(self._task_id, SubStatus.COMPLETED if error is None else SubStatus.FAILED, "")
        self._uvicorn.should_exit = True
        self._thread.join(5)
        self._memory.stop()
        self.state.pieces.close()

    def _open_run(self) -> FleetGrid:
        state = self.state
        state.federation_manager.ensure_default_federations_exist(flwr_aid=NOOP_FLWR_AID)
        # There is no app bundle: clients fetch and run none.
        run_id = state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
        self._task_id = next(task.task_id for task in state.get_tasks() if task.run_id == run_id)
        state.claim_task(self._task_id)
        state.activate_task(self._task_id)
        threading.Thread(target=self._beat, daemon=True).start()
        # Flower reads the sender of a message from here.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = self._task_id, run_id, SUPERLINK_NODE_ID
        return FleetGrid(state, state.get_run_info(run_ids=[run_id])[0])

    def _beat(self) -> None:
        while not self._closing.wait(HEARTBEAT_SECONDS):
            self.state.acknowledge_task_heartbeat(self._task_id)


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
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        # Python adds the address, which stands in the message already.
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        raise ConnectionFailedError(
            f"Cannot listen on {host}:{port}: {reason}.",
            "Choose another --address, or stop what uses the port.",
        ) from error


class FleetGrid(FederationGrid):
    """Flower's grid over the state of this process; several threads may use it.

    Args:
        state: The book of clients and messages.
        run: The one run.
    """

    def __init__(self, state: FleetState, run: Run) -> None:
        """Keep both."""
        self._state = state
        self._run = run

    @property
    def run(self) -> Run:
        """The one run."""
        return self._run

    def members(self) -> list[Member]:
        """Return the clients that are connected now."""
        return self._state.members()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Put messages where their clients fetch them; an empty id stands for one that nobody can fetch."""
        run_id, ids = self._run.run_id, []
        with no_object_id_recompute():
            for message in messages:
                message.metadata.__dict__["_message_id"] = message.object_id
                session = self._state.start_session(run_id)
                stored, missing = self._state.store_message_and_object_tree(
                    remove_content_from_message(message), get_object_tree(message), session
                )
                objects = get_all_nested_objects(message)
                for object_id in missing:
                    self._state.store_received(run_id, session, object_id, objects[object_id].deflate())
                ids.append(message.metadata.message_id if stored else "")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the complete replies that have come since the last call, with their tensors in files.

        Raises:
            FedRAGError: What clients have sent cannot be written.
        """
        self._state.pieces.raise_failure()
        with os_errors(self._state.pieces.directory):
            replies = [self._state.take_reply(self._run.run_id, message_id) for message_id in message_ids if message_id]
        return [reply for reply in replies if reply is not None]

    def forget(self, message_ids: Iterable[str]) -> None:
        """Drop messages whose replies are not wanted any more."""
        self._state.drop([message_id for message_id in message_ids if message_id])
