"""A client's end: dials out, fetches messages, answers them, and comes back after a crash of either side.

Flower's own client helpers end their process on some answers of the server and fetch code from it; this one uses the
HTTP client below them, and never asks for code.
"""

from __future__ import annotations

import ssl
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.error import Error
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClientInterceptor, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedrag_cli.errors import ConnectionFailedError, FedRAGError, RunInterruptedError
from fedrag_cli.federated.endpoint import trusting
from fedrag_cli.federated.fleet.failures import (
    AnsweredError,
    ForgottenError,
    LostConnectionError,
    ServerAddress,
    in_words,
    raise_if_hopeless,
)
from fedrag_cli.federated.fleet.guard import SESSION_HEADER, SUPERSEDED
from fedrag_cli.federated.grid import quiet_flower
from fedrag_cli.federated.keys import fingerprint
from fedrag_cli.runs.reporting import Reporter

HEARTBEAT_SECONDS = 10.0
HEARTBEATS_PER_INTERVAL = 2.5
SHORTEST_POLL, LONGEST_POLL, POLL_GROWTH = 0.05, 0.25, 1.2
TRIES = 6
LONGEST_WAIT = 5.0
SECONDS_BETWEEN_NOTES = 30.0
PUSH_ATTEMPTS = 5

T = TypeVar("T")


class Handler(Protocol):
    """Answers messages; `ended` tells that no more are wanted."""

    @property
    def ended(self) -> bool:
        """Whether the federation is over for this client."""

    def __call__(self, message: Message) -> Message:
        """Return the reply to a message."""


class _SessionInterceptor:
    """Says which process speaks, so that two with the same key do not take each other's messages.

    Args:
        connect_seconds: Longest time to dial.
    """

    def __init__(self, connect_seconds: float) -> None:
        self.session = uuid.uuid4().hex
        self._connect_seconds = connect_seconds

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers[SESSION_HEADER] = self.session
        timeouts = context.request.extensions["timeout"]
        timeouts["connect"] = min(timeouts["connect"], self._connect_seconds)
        return call_next(context)


class FleetNode:
    """One client's connection.

    Args:
        server: Where the server is.
        key: The client's private key (SECP384R1), which signs every request.
        reporter: Told what happens.
        connect_timeout: Seconds to try to reach a server that does not answer.
    """

    def __init__(
        self,
        server: ServerAddress,
        key: ec.EllipticCurvePrivateKey,
        reporter: Reporter,
        *,
        connect_timeout: float = 600.0,
    ) -> None:
        """Keep the settings; nothing is dialled yet."""
        quiet_flower()
        self._server = server
        self._key = key
        self._public_key = public_key_to_bytes(key.public_key())
        self._reporter = reporter
        self._connect_timeout = connect_timeout
        self._session = _SessionInterceptor(connect_timeout)
        self._lost = threading.Event()
        self._node = Node()
        self._client: FleetHttpClient
        self._was_connected = False
        self._silent_since: float | None = None

    def run(self, handler: Handler) -> None:
        """Stay connected and answer messages until the handler has ended.

        Args:
            handler: Answers the messages.

        Raises:
            ConnectionFailedError: The server cannot be reached, is not trusted, or does not let this client in.
            RunInterruptedError: A signal came while a message was answered.
        """
        noted = float("-inf")
        self._silent_since = time.monotonic()
        while not handler.ended:
            try:
                with self._connect() as self._client:
                    self._lost.clear()
                    self._activate()
                    self._reporter.note(
                        "Connected again" if self._was_connected else f"Connected to {self._server.address}"
                    )
                    self._was_connected = True
                    self._silent_since, noted = None, float("-inf")
                    try:
                        self._serve(handler)
                    finally:
                        self._lost.set()
                        self._leave()
                        self._silent_since = time.monotonic()
            except LostConnectionError as lost:
                now = time.monotonic()
                waited = now - (self._silent_since or now)
                if waited >= self._connect_timeout:
                    raise ConnectionFailedError(
                        f"The server at {self._server.address} {lost.past} for {waited:.0f} s ({lost}).",
                        "Check the address, the firewall, and that 'fedrag serve-fl' runs.",
                    ) from lost
                if now - noted > SECONDS_BETWEEN_NOTES:
                    noted = now
                    self._reporter.note(f"The server at {self._server.address} {lost.present} ({lost}); trying again")
                time.sleep(min(1.0, self._connect_timeout - waited))

    def check(self) -> bool:
        """Try to connect once, so that a wrong certificate or key is found before models are loaded.

        Returns:
            Whether the server answered; a server that is not up yet is no error.

        Raises:
            ConnectionFailedError: The server answered, but is not trusted or does not let this client in.
        """
        try:
            with self._connect() as self._client:
                self._activate(tries=1)
                self._lost.set()
                self._leave()
        except LostConnectionError:
            return False
        return True

    def _connect(self) -> FleetHttpClient:
        address, authority = self._server.address, self._server.ca_certificate
        interceptors: list[ProtobufClientInterceptor] = [
            NodeAuthHttpInterceptor(self._key, self._key.public_key()),
            self._session,
        ]
        try:
            scheme = "https" if self._server.tls else "http"
            # Flower's own way trusts the authorities of certifi, where none is named, and not the system's.
            verify = trusting(authority) if self._server.tls else False
            return FleetHttpClient(f"{scheme}://{address}", interceptors=interceptors, verify=verify)
        except (ssl.SSLError, ValueError, OSError, httpx.InvalidURL) as error:
            raise ConnectionFailedError(
                f"No connection to '{address}' can be made: {error}",
                "Check --address (HOST:PORT) and federated.ca_certificate (PEM).",
            ) from error

    def _call(self, method: Callable[[Any], T], request: Any, tries: int = TRIES) -> T:
        """Send a request; again after a while where the network fails, until the server was silent for too long."""
        reason = ""
        end = (self._silent_since or time.monotonic()) + self._connect_timeout
        for attempt in range(tries):
            try:
                return method(request)
            except httpx.TransportError as error:
                raise_if_hopeless(error, self._server, was_connected=self._was_connected)
                reason = in_words(error)
            except httpx.HTTPStatusError as error:
                code = error.response.status_code
                if code == 409 and SUPERSEDED in error.response.text:
                    raise ConnectionFailedError(
                        "Another process has joined with this client's key.",
                        "Run one process a key, and make a key for each client with 'fedrag keys node'.",
                    ) from error
                if code == 401 and self._silent_since is None and self._was_connected:
                    raise ForgottenError("it may have been started again") from error
                if code not in (502, 503, 504):
                    raise AnsweredError(code) from error
                reason = f"it answered {code}"
            except ValueError as error:
                raise LostConnectionError("it answered something else than Flower's protocol") from error
            pause = min(0.3 * 2**attempt, LONGEST_WAIT)
            if attempt + 1 == tries or time.monotonic() + pause >= end or self._lost.wait(pause):
                break
        raise LostConnectionError(reason)

    def _activate(self, tries: int = TRIES) -> None:
        try:
            self._call(self._client.RegisterNode, RegisterNodeFleetRequest(public_key=self._public_key), tries)
        except AnsweredError as error:
            # Known already, or the server has a list of allowed keys; activation tells.
            self._raise_unless_precondition(error)
        request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_SECONDS)
        try:
            answer = self._call(self._client.ActivateNode, request, tries)
        except AnsweredError as error:
            self._raise_unless_precondition(error)
            raise ConnectionFailedError(
                f"The server at {self._server.address} does not know this client's key (fingerprint "
                f"{fingerprint(self._public_key)}).",
                "Give the server's owner your public key (NAME.pub) for the folder federated.allowed_keys.",
            ) from error
        self._node = Node(node_id=answer.node_id)
        threading.Thread(target=self._beat, args=(self._client,), daemon=True).start()

    def _raise_unless_precondition(self, error: AnsweredError) -> None:
        if error.code == 401:
            raise ConnectionFailedError(
                f"The server at {self._server.address} does not know this client's key (fingerprint "
                f"{fingerprint(self._public_key)}), or its signature is too old.",
                "Give the server's owner your public key (NAME.pub) for the folder federated.allowed_keys, and check "
                "that both clocks are right.",
            ) from error
        if error.code != 412:
            raise error

    def _beat(self, client: FleetHttpClient) -> None:
        """Tell the server now and then that this client lives."""
        while not self._lost.wait(HEARTBEAT_SECONDS / HEARTBEATS_PER_INTERVAL):
            request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_SECONDS)
            try:
                if not client.SendNodeHeartbeat(request).success:
                    self._lost.set()
            except httpx.HTTPStatusError as error:
                if error.response.status_code < 500:
                    self._lost.set()
            except (httpx.HTTPError, RuntimeError, ValueError):
                # The next request finds out whether the connection is really lost.
                continue

    def _leave(self) -> None:
        """Say goodbye, so that the server need not wait for missing heartbeats."""
        try:
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))
        except (httpx.HTTPError, ValueError):
            # The server is gone, or finds out by itself.
            return

    def _serve(self, handler: Handler) -> None:
        pause = SHORTEST_POLL
        while not handler.ended:
            # Not tried again: the server counts a message as delivered once it is fetched, so an answer that was lost
            # is made up for by connecting anew, upon which the message is sent again.
            answer = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node), tries=1)
            if not answer.messages_list:
                if self._lost.wait(pause):
                    raise ForgottenError("it has had no sign of life")
                pause = min(LONGEST_POLL, pause * POLL_GROWTH)
                continue
            pause = SHORTEST_POLL
            message = self._fetch(answer)
            if message is None:
                continue
            started = time.monotonic()
            reply = self._answer(handler, message)
            self._send(reply, time.monotonic() - started)

    def _fetch(self, answer: Any) -> Message | None:
        """Return the message that the server has, or None where it has withdrawn it meanwhile."""
        withdrawn = False
        bare, tree = message_from_proto(answer.messages_list[0]), answer.message_object_trees[0]
        run_id, message_id = bare.metadata.run_id, bare.metadata.message_id

        def pull(request: Any) -> Any:
            nonlocal withdrawn
            found = self._call(self._client.PullObject, request)
            withdrawn = withdrawn or not found.object_found
            return found

        def confirm(request: Any) -> Any:
            return self._call(self._client.ConfirmMessageReceived, request)

        try:
            contents = pull_objects(
                [node.object_id for node in iterate_object_tree(tree)],
                make_pull_object_fn_protobuf(pull, self._node, run_id),
                initial_backoff=0.1,
            )
        except ObjectPullError as error:
            if withdrawn:
                # A client that dials twice is greeted anew, and the first greeting is taken back.
                return None
            raise LostConnectionError("a message of it never came as a whole") from error
        make_confirm_message_received_fn_protobuf(confirm, self._node, run_id)(message_id)
        message = inflate_object_from_contents(message_id, contents)
        if not isinstance(message, Message):
            raise LostConnectionError("it sent something else than a message")
        message.metadata.__dict__["_message_id"] = message_id
        return message

    def _answer(self, handler: Handler, message: Message) -> Message:
        """Let the handler answer; what goes wrong is told here, and to the server only that it went wrong."""
        try:
            return handler(message)
        except RunInterruptedError:
            raise
        except FedRAGError as error:
            self._reporter.note(f"This round failed here: {error}")
        except Exception as error:  # noqa: BLE001  (an exception's text may quote private data, so it stays here)
            self._reporter.note(f"This round failed here: {type(error).__name__}: {error}")
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the client failed"), reply_to=message)

    def _send(self, reply: Message, seconds: float) -> None:
        run_id = reply.metadata.run_id
        reply.metadata.__dict__["_message_id"] = reply.object_id

        def push(request: Any) -> Any:
            return self._call(self._client.PushObject, request)

        with no_object_id_recompute():
            tree = get_object_tree(reply)
            bare = remove_content_from_message(reply) if reply.has_content() else reply
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(bare)],
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            )
            for _ in range(PUSH_ATTEMPTS):
                answer = self._call(self._client.PushMessages, request)
                missing = set(answer.objects_to_push)
                if not missing:
                    return
                try:
                    push_objects(
                        get_all_nested_objects(reply),
                        make_push_object_fn_protobuf(push, self._node, run_id, answer.session_id),
                        object_ids_to_push=missing,
                    )
                    return
                except ObjectPushError:
                    # Another client's reply held the same array and was taken meanwhile; ask what is missing now.
                    continue
        self._reporter.note("The server did not take this update")
