"""The server's door and its routes: who gets a connection, for how long, and what a request may be.

The web server below is uvicorn with h11, which bounds the heads of requests; these are Flower's Fleet routes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import socket
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from fedrag_cli.federated.fleet import _flower as flower
from fedrag_cli.federated.fleet.auth import (
    BUSY,
    DAMAGED,
    DIGEST_HEADER,
    SUPERSEDED,
    Admission,
    Claim,
    Refusals,
    RefusedError,
    Scope,
)
from fedrag_cli.federated.fleet.state import Client, FleetState, head_bytes

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

PREFIX = "/v1/fleet/"
ACTIVATE, DEACTIVATE, HEARTBEAT, PULL_MESSAGES, PUSH_MESSAGES, PULL_OBJECT, PUSH_OBJECT = (
    PREFIX + name
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "pull-object",
        "push-object",
    )
)
# A request for messages waits that long for one.
POLL_SECONDS = 20.0
READ_SECONDS = 120.0
REQUEST_SECONDS = 240.0
SILENT_SECONDS = 60.0
MOST_BYTES = 64 * 2**10
# Larger bodies are read and worked on for so many bytes at once, of all clients together, and for so many of each.
MOST_BODY_BYTES = 64 * 2**20
MOST_BODIES_OF_A_CLIENT = 5
MOST_OF_A_CLIENT = 8
MOST_STRANGERS = 512
_METHOD = re.compile(rb"[A-Z]{1,7}( |$)")


class _Connection(socket.socket):
    """A connection that the door knows of from its first byte to its end."""

    door: Door
    address = "an unknown address"
    peer: tuple[Any, ...] = ()
    owner: bytes | None = None
    deadline = float("inf")
    is_new = True

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receive, and look at the first bytes of a plain connection."""
        data = super().recv(size, flags)
        if self.is_new and data:
            self.is_new = False
            self.door.look_at(self, data)
        return data

    def recv_into(self, *arguments: Any) -> int:
        """Receive; a TLS handshake does so right before it goes on, which tells it whose it is."""
        self.door.handshaking = self.address
        return super().recv_into(*arguments)

    def end(self) -> None:
        """Have the web server find that the connection has ended."""
        with suppress(OSError):
            self.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close, and give the place back."""
        self.door.forget(self)
        super().close()


class Door(socket.socket):
    """A listening socket that keeps places for known clients.

    Who has not signed a request yet is a stranger. Strangers have few places, of which one address gets half; a new
    one takes the place of the oldest. No connection may be silent for long, or take too long for a request.
    """

    _refusals: Refusals
    _tls = False
    _most = 0
    handshaking = "an unknown address"

    def open(self, refusals: Refusals, most: int, *, tls: bool) -> Door:
        """Begin with nobody in.

        Args:
            refusals: Told of connections that come to nothing.
            most: Most connections at once.
            tls: Whether connections begin with a handshake.
        """
        self._refusals, self._tls, self._most = refusals, tls, most
        self._all: dict[tuple[Any, ...], _Connection] = {}
        self._strangers: dict[_Connection, None] = {}
        self._of_address: Counter[str] = Counter()
        self._most_strangers = min(MOST_STRANGERS, most // 4)
        return self

    def accept(self) -> tuple[socket.socket, Any]:
        """Take the next connection; where there are too many, the oldest stranger goes."""
        plain, peer = super().accept()
        # Made from the descriptor alone it knows its protocol; asyncio delays answers by 40 ms otherwise.
        connection = _Connection(fileno=plain.detach())
        connection.door, connection.peer, connection.address = self, tuple(peer[:2]), str(peer[0])
        connection.deadline = time.monotonic() + SILENT_SECONDS
        if self._of_address[connection.address] >= max(1, self._most_strangers // 2):
            self._end_oldest(connection.address)
        elif len(self._strangers) >= self._most_strangers or len(self._all) >= self._most:
            self._end_oldest(None)
        self._all[connection.peer] = connection
        self._strangers[connection] = None
        self._of_address[connection.address] += 1
        if len(self._all) > self._most + self._most_strangers:
            connection.close()
            raise ConnectionAbortedError
        return connection, peer

    def find(self, scope: Scope) -> _Connection | None:
        """Return the connection of a request."""
        return self._all.get(tuple(scope["client"])) if scope.get("client") else None

    def let_in(self, connection: _Connection | None, public_key: bytes) -> None:
        """Note that a connection is a known client's, which may have a few; the oldest goes where there are more."""
        if connection is None or connection.owner is not None:
            return
        self._forget_stranger(connection)
        connection.owner = public_key
        own = [other for other in self._all.values() if other.owner == public_key]
        if len(own) > MOST_OF_A_CLIENT:
            own[0].end()

    def forget(self, connection: _Connection) -> None:
        """Give a connection's place back."""
        self._forget_stranger(connection)
        if self._all.get(connection.peer) is connection:
            del self._all[connection.peer]

    async def sweep(self) -> None:
        """End the connections whose time is up."""
        now = time.monotonic()
        for connection in [connection for connection in self._all.values() if connection.deadline < now]:
            if connection.owner is None:
                who = connection.address
                line = f"A connection from {who} asked nothing for {SILENT_SECONDS:.0f} s"
                self._refusals.tell(who, "silent", line)
            connection.deadline = now + SILENT_SECONDS
            connection.end()

    def look_at(self, connection: _Connection, data: bytes) -> None:
        """Say what a connection sends that is no request."""
        if data[:2] == b"\x16\x03":
            line = f"A client at {connection.address} speaks TLS, but this server does without"
            self._refusals.tell(connection.address, "tls", line)
        elif not _METHOD.match(data[:8]):
            self._refusals.tell(connection.address, "http", f"A connection from {connection.address} sent no HTTP")

    def watch(self, context: ssl.SSLContext) -> ssl.SSLContext:
        """Return a context whose handshakes say why they fail, which the web server never hears of."""
        door = self

        class Handshake(ssl.SSLObject):
            def do_handshake(self) -> None:
                try:
                    super().do_handshake()
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    raise
                except ssl.SSLError as error:
                    door._refusals.tell(door.handshaking, *_handshake_failure(door.handshaking, error.reason or ""))
                    raise

        context.sslobject_class = Handshake
        return context

    def _end_oldest(self, address: str | None) -> None:
        for stranger in self._strangers:
            if address is None or stranger.address == address:
                # It is no stranger any more, and waits for the web server to close it.
                self._forget_stranger(stranger)
                stranger.end()
                return

    def _forget_stranger(self, connection: _Connection) -> None:
        if connection in self._strangers:
            del self._strangers[connection]
            self._of_address[connection.address] -= 1
            if not self._of_address[connection.address]:
                del self._of_address[connection.address]


def _handshake_failure(address: str, code: str) -> tuple[str, str]:
    """Return a reason, and a line, for OpenSSL's name of what went wrong."""
    words = re.sub(r"^(SSLV3|TLSV1|TLSV13)_ALERT_", "", code).replace("_", " ").lower()
    if "_ALERT_" in code and ("CERTIFICATE" in code or "UNKNOWN_CA" in code):
        return "trust", (
            f"A client at {address} did not trust this server's certificate ({words}): it needs the authority's "
            "ca.crt, and a host name that the certificate is made for"
        )
    if code == "HTTP_REQUEST":
        return "plain", f"A connection from {address} was no TLS client: it sent plain HTTP"
    return "handshake", f"A connection from {address} was no TLS client{f' ({words})' if words else ''}"


@dataclass(frozen=True)
class _Route:
    request: Any
    answer: Callable[[Client, Claim, Any], Awaitable[Any]]
    most_bytes: int = MOST_BYTES


class FleetApp:
    """Answers requests.

    Args:
        state: The book of clients and messages.
        admission: Decides who may speak.
        door: Where connections come in.
        refusals: Told of errors within.
        most_bytes: Largest sum of the bytes of a reply's tensors.
    """

    def __init__(
        self, state: FleetState, admission: Admission, door: Door, refusals: Refusals, most_bytes: int
    ) -> None:
        """Begin with no request."""
        self._state, self._admission, self._door, self._refusals = state, admission, door, refusals
        self._bytes = 0
        self._bodies_of: Counter[bytes] = Counter()
        self._freed = asyncio.Condition()
        self._is_closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        state.wake = self._wake
        self._routes = {
            DEACTIVATE: _Route(flower.DeactivateNodeRequest, self._leave),
            HEARTBEAT: _Route(flower.SendNodeHeartbeatRequest, self._live),
            PULL_MESSAGES: _Route(flower.PullMessagesRequest, self._pull_messages),
            PUSH_MESSAGES: _Route(flower.PushMessagesRequest, self._push_messages, head_bytes(most_bytes)),
            PULL_OBJECT: _Route(flower.PullObjectRequest, self._pull_object),
            PUSH_OBJECT: _Route(flower.PushObjectRequest, self._push_object, flower.PIECE_BYTES + 1024),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        self._loop = asyncio.get_running_loop()
        connection = self._door.find(scope)
        if connection is not None:
            connection.deadline = time.monotonic() + REQUEST_SECONDS
        try:
            code, content = 200, (await self._answer(scope, receive, connection)).SerializeToString()
        except RefusedError as refusal:
            code, content = refusal.code, json.dumps({"detail": refusal.reason, "seconds": refusal.seconds}).encode()
        except Exception as error:  # noqa: BLE001  (whatever fails here, the server goes on, and its owner is told)
            self._refusals.tell("", type(error).__name__, f"A request failed within the server: {error!r}")
            code, content = 500, b"{}"
        headers = [
            (b"content-type", b"application/x-protobuf" if code == 200 else b"application/json"),
            (b"content-length", str(len(content)).encode()),
            (DIGEST_HEADER.encode(), hashlib.sha256(content).hexdigest().encode()),
        ]
        if connection is None or connection.owner is None:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": code, "headers": headers})
        await send({"type": "http.response.body", "body": content})
        if connection is not None:
            connection.deadline = time.monotonic() + SILENT_SECONDS

    def close(self) -> None:
        """Answer those that wait for messages, from any thread."""
        self._is_closing = True
        for client in self._state.clients():
            self._wake(client)

    def _wake(self, client: Client) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(client.arrived.set)

    async def _answer(self, scope: Scope, receive: Receive, connection: _Connection | None) -> Any:
        path = scope["path"]
        if scope["method"] != "POST" or not (path == ACTIVATE or path in self._routes):
            self._admission.turn_away_stranger(scope)
            raise RefusedError(404, "not found")
        claim = await self._admission.admit(scope)
        if path == ACTIVATE:
            self._admission.check_clock(scope, claim)
            await self._read(scope, receive, claim, MOST_BYTES)
            client = self._state.activate(claim)
            self._door.let_in(connection, claim.public_key)
            return flower.ActivateNodeResponse(node_id=client.member.node_id)
        route, client = self._routes[path], self._state.speaker(claim)
        self._door.let_in(connection, claim.public_key)
        async with self._room(_announced(scope, route.most_bytes), claim.public_key):
            body = await self._read(scope, receive, claim, route.most_bytes)
            try:
                request = route.request.FromString(body)
            except flower.DecodeError:
                raise RefusedError(400, "protobuf") from None
            del body
            return await route.answer(client, claim, request)

    @asynccontextmanager
    async def _room(self, size: int, public_key: bytes) -> AsyncIterator[None]:
        """Wait until a large body has room beside the others, and keep it for as long as the body is worked on.

        Raises:
            RefusedError: Its client has too many on the way, or there is no room for too long.
        """
        if size <= MOST_BYTES:
            yield
            return
        if self._bodies_of[public_key] >= MOST_BODIES_OF_A_CLIENT:
            raise RefusedError(503, BUSY)
        self._bodies_of[public_key] += 1
        taken = 0
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(READ_SECONDS), self._freed:
                    await self._freed.wait_for(lambda: self._bytes + size <= MOST_BODY_BYTES)
                    self._bytes += size
                    taken = size
            if not taken:
                raise RefusedError(503, BUSY)
            yield
        finally:
            self._bytes -= taken
            self._bodies_of[public_key] -= 1
            if not self._bodies_of[public_key]:
                del self._bodies_of[public_key]
            async with self._freed:
                self._freed.notify_all()

    async def _read(self, scope: Scope, receive: Receive, claim: Claim, most: int) -> bytes:
        """Return a body; raises RefusedError where it is too large, too slow, cut off, or not what was signed."""
        _announced(scope, most)
        try:
            body = await asyncio.wait_for(_whole(receive, most), READ_SECONDS)
        except TimeoutError:
            raise RefusedError(408, BUSY) from None
        if hashlib.sha256(body).hexdigest() != claim.digest:
            raise RefusedError(400, DAMAGED)
        return body

    async def _leave(self, client: Client, claim: Claim, request: Any) -> Any:
        self._state.leave(client)
        return flower.DeactivateNodeResponse()

    async def _live(self, client: Client, claim: Claim, request: Any) -> Any:
        return flower.SendNodeHeartbeatResponse(success=True)

    async def _pull_messages(self, client: Client, claim: Claim, request: Any) -> Any:
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_SECONDS):
                while not self._is_closing:
                    if client.session != claim.session:
                        raise RefusedError(409, SUPERSEDED)
                    if (found := self._state.next_message(client)) is not None:
                        return flower.PullMessagesResponse(
                            messages_list=[found.head], message_object_trees=[found.tree]
                        )
                    client.arrived.clear()
                    await client.arrived.wait()
        return flower.PullMessagesResponse()

    async def _push_messages(self, client: Client, claim: Claim, request: Any) -> Any:
        if not len(request.messages_list) == len(request.message_object_trees) == 1:
            raise RefusedError(400, "protobuf")
        (head,), (tree,) = request.messages_list, request.message_object_trees
        missing = await asyncio.to_thread(self._state.announce, client, head, tree)
        # Flower knows no way to say that a reply is not wanted; a result other than 0 is what comes nearest.
        results = {"reply": int(missing is None)}
        return flower.PushMessagesResponse(results=results, objects_to_push=missing or [])

    async def _pull_object(self, client: Client, claim: Claim, request: Any) -> Any:
        content = self._state.piece(client, request.object_id)
        found = content is not None
        return flower.PullObjectResponse(object_found=found, object_available=found, object_content=content or b"")

    async def _push_object(self, client: Client, claim: Claim, request: Any) -> Any:
        stored = await asyncio.to_thread(self._state.store, client, request.object_id, request.object_content)
        return flower.PushObjectResponse(stored=stored)


def _announced(scope: Scope, most: int) -> int:
    announced = dict(scope["headers"]).get(b"content-length", b"")
    if not announced.isdigit() or len(announced) > 15 or int(announced) > most:
        raise RefusedError(413, "size")
    return int(announced)


async def _whole(receive: Receive, most: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise RefusedError(400, DAMAGED)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise RefusedError(413, "size")
        if not message.get("more_body", False):
            return b"".join(parts)
