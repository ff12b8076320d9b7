"""The server's listening socket and its routes: who gets a connection, for how long, and what a request may be.

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
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from fedrag_cli.federated.fleet import _flower as flower
from fedrag_cli.federated.fleet.auth import (
    BUSY,
    DAMAGED,
    DIGEST_HEADER,
    Admission,
    Claim,
    Refusals,
    RefusedError,
    Scope,
)
from fedrag_cli.federated.fleet.state import Client, FleetState, head_bytes

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# A request for messages waits that long for one.
POLL_SECONDS = 20.0
READ_SECONDS = 120.0
REQUEST_SECONDS = 240.0
SILENT_SECONDS = 60.0
MOST_BYTES = 64 * 2**10
# So many larger bodies, pieces most of them, are read and worked on at once, and so many of one client.
MOST_BODIES = 128
MOST_BODIES_OF_A_CLIENT = 5
MOST_OF_A_CLIENT = 8
MOST_STRANGERS = 512
_METHOD = re.compile(rb"[A-Z]{1,7}( |$)")


class _Connection(socket.socket):
    """A connection that the listener knows of from its first byte to its end."""

    listener: LimitedListener
    address = "an unknown address"
    peer: tuple[Any, ...] = ()
    owner: Client | None = None
    deadline = float("inf")
    is_new = True

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receive, and look at the first bytes of a plain connection."""
        data = super().recv(size, flags)
        if self.is_new and data:
            self.is_new = False
            self.listener.look_at(self, data)
        return data

    def recv_into(self, *arguments: Any) -> int:
        """Receive; a TLS handshake does so right before it goes on, which tells it whose it is."""
        self.listener.handshaking = self.address
        return super().recv_into(*arguments)

    def end(self) -> None:
        """Have the web server find that the connection has ended."""
        with suppress(OSError):
            self.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close, and give the place back."""
        self.listener.forget(self)
        super().close()


class LimitedListener(socket.socket):
    """A listening socket that keeps places for known clients.

    Who has not signed a request yet is a stranger. Strangers have few places, of which one address gets half; a new
    one takes the place of the oldest. No connection may be silent for long, or take too long for a request.
    """

    _refusals: Refusals
    _most = 0
    handshaking = "an unknown address"

    def open(self, refusals: Refusals, most: int) -> LimitedListener:
        """Begin with nobody in.

        Args:
            refusals: Told of connections that come to nothing.
            most: Most connections at once.
        """
        self._refusals, self._most = refusals, most
        self._all: dict[tuple[Any, ...], _Connection] = {}
        self._strangers: dict[_Connection, None] = {}
        self._most_strangers = min(MOST_STRANGERS, most // 4)
        return self

    def accept(self) -> tuple[socket.socket, Any]:
        """Take the next connection; where there are too many, the oldest stranger goes."""
        plain, peer = super().accept()
        # Made from the descriptor alone it knows its protocol; asyncio delays answers by 40 ms otherwise.
        connection = _Connection(fileno=plain.detach())
        connection.listener, connection.peer, connection.address = self, tuple(peer[:2]), str(peer[0])
        connection.deadline = time.monotonic() + SILENT_SECONDS
        neighbours = [stranger for stranger in self._strangers if stranger.address == connection.address]
        if 2 * len(neighbours) >= self._most_strangers:
            self._turn_out(neighbours[0])
        elif self._strangers and max(len(self._strangers) / self._most_strangers, len(self._all) / self._most) >= 1:
            self._turn_out(next(iter(self._strangers)))
        self._all[connection.peer] = connection
        self._strangers[connection] = None
        if len(self._all) > self._most + self._most_strangers:
            connection.close()
            raise ConnectionAbortedError
        return connection, peer

    def expect(self, scope: Scope, seconds: float) -> _Connection | None:
        """Return the connection of a request, after giving it so much time."""
        connection = self._all.get(tuple(scope.get("client") or ()))
        if connection is not None:
            connection.deadline = time.monotonic() + seconds
        return connection

    def let_in(self, connection: _Connection | None, client: Client) -> None:
        """Note that a connection is a known client's, which may have a few; the oldest goes where there are more."""
        if connection is None or connection.owner is not None:
            return
        self._strangers.pop(connection, None)
        connection.owner = client
        own = [other for other in self._all.values() if other.owner is client]
        for other in own[:-MOST_OF_A_CLIENT]:
            other.end()

    def forget(self, connection: _Connection) -> None:
        """Give a connection's place back."""
        self._strangers.pop(connection, None)
        if self._all.get(connection.peer) is connection:
            del self._all[connection.peer]

    async def sweep(self) -> None:
        """End the connections whose time is up, and those of clients that others have taken the places of."""
        now = time.monotonic()
        for connection in list(self._all.values()):
            owner = connection.owner
            if connection.deadline >= now and not (owner is not None and owner.is_forgotten):
                continue
            if owner is None:
                who = connection.address
                line = f"A connection from {who} asked nothing for {SILENT_SECONDS:.0f} s"
                self._refusals.tell(who, "silent", line)
            connection.deadline = now + SILENT_SECONDS
            connection.end()

    def look_at(self, connection: _Connection, data: bytes) -> None:
        """Say what a connection sends that is no request."""
        who = connection.address
        if data[:2] == b"\x16\x03":
            self._refusals.tell(who, "tls", f"A client at {who} speaks TLS, but this server does without")
        elif not _METHOD.match(data[:8]):
            self._refusals.tell(who, "http", f"A connection from {who} sent no HTTP")

    def watch(self, context: ssl.SSLContext) -> ssl.SSLContext:
        """Return a context whose handshakes say why they fail, which the web server never hears of."""
        listener = self

        class Handshake(ssl.SSLObject):
            def do_handshake(self) -> None:
                try:
                    super().do_handshake()
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    raise
                except ssl.SSLError as error:
                    listener._refusals.tell(
                        listener.handshaking, *_handshake_failure(listener.handshaking, error.reason or "")
                    )
                    raise

        context.sslobject_class = Handshake
        return context

    def _turn_out(self, stranger: _Connection) -> None:
        # It takes no stranger's place any more while it waits for the web server to close it.
        del self._strangers[stranger]
        stranger.end()


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


class FleetApp:
    """Answers requests.

    Args:
        state: The book of clients and messages.
        admission: Decides who may speak.
        listener: Where connections come in.
        refusals: Told of errors within.
    """

    def __init__(self, state: FleetState, admission: Admission, listener: LimitedListener, refusals: Refusals) -> None:
        """Begin with no request."""
        self._state, self._admission, self._listener, self._refusals = state, admission, listener, refusals
        self._places = asyncio.Semaphore(MOST_BODIES)
        self._is_closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        state.wake = self._wake
        self._routes: dict[str, Callable[[Client, Any], Awaitable[dict[str, Any]]]] = {
            flower.DEACTIVATE: self._leave,
            flower.HEARTBEAT: self._live,
            flower.PULL_MESSAGES: self._pull_messages,
            flower.PUSH_MESSAGES: self._push_messages,
            flower.PULL_OBJECT: self._pull_object,
            flower.PUSH_OBJECT: self._push_object,
        }
        self._most = {flower.PUSH_MESSAGES: head_bytes(state.most_bytes), flower.PUSH_OBJECT: flower.PIECE_BYTES + 1024}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        self._loop = asyncio.get_running_loop()
        connection = self._listener.expect(scope, REQUEST_SECONDS)
        try:
            code, content = 200, (await self._answer(scope, receive, connection)).SerializeToString()
        except RefusedError as refusal:
            code, detail = refusal.code, {"detail": refusal.reason, "challenge": refusal.challenge}
            content = json.dumps(detail).encode()
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
        self._listener.expect(scope, SILENT_SECONDS)

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
        if scope["method"] != "POST" or path not in flower.TYPES:
            self._admission.refuse_unknown(scope)
            raise RefusedError(404, "not found")
        claim = await self._admission.admit(scope)
        asked, answered = flower.TYPES[path]
        if path == flower.ACTIVATE:
            await _body(receive, claim, _announced(scope, MOST_BYTES))
            client = self._state.activate(claim)
            self._listener.let_in(connection, client)
            return answered(node_id=client.member.node_id)
        client, size = self._state.identify(claim), _announced(scope, self._most.get(path, MOST_BYTES))
        self._listener.let_in(connection, client)
        async with self._room(client, size):
            try:
                request = asked.FromString(await _body(receive, claim, size))
            except flower.DecodeError:
                raise RefusedError(400, "protobuf") from None
            return answered(**await self._routes[path](client, request))

    @asynccontextmanager
    async def _room(self, client: Client, size: int) -> AsyncIterator[None]:
        """Wait until a large body has a place beside the others, and keep it for as long as the body is worked on.

        Raises:
            RefusedError: Its client has too many on the way.
        """
        if size <= MOST_BYTES:
            yield
            return
        if client.bodies >= MOST_BODIES_OF_A_CLIENT:
            raise RefusedError(503, BUSY)
        client.bodies += 1
        try:
            async with self._places:
                yield
        finally:
            client.bodies -= 1

    async def _leave(self, client: Client, request: Any) -> dict[str, Any]:
        self._state.leave(client)
        return {}

    async def _live(self, client: Client, request: Any) -> dict[str, Any]:
        return {"success": True}

    async def _pull_messages(self, client: Client, request: Any) -> dict[str, Any]:
        client.polls = poll = client.polls + 1
        # The newest waits alone; of older ones nobody may know any more, and their connections end only after them.
        client.arrived.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_SECONDS):
                while not self._is_closing and client.polls == poll:
                    if (found := self._state.next_message(client)) is not None:
                        return {"messages_list": [found.head], "message_object_trees": [found.tree]}
                    client.arrived.clear()
                    await client.arrived.wait()
        return {}

    async def _push_messages(self, client: Client, request: Any) -> dict[str, Any]:
        if not len(request.messages_list) == len(request.message_object_trees) == 1:
            raise RefusedError(400, "protobuf")
        announced = request.messages_list[0], request.message_object_trees[0]
        missing = await asyncio.to_thread(self._state.announce, client, *announced)
        # Flower knows no way to say that a reply is not wanted; a result other than 0 is what comes nearest.
        return {"results": {"reply": int(missing is None)}, "objects_to_push": missing or []}

    async def _pull_object(self, client: Client, request: Any) -> dict[str, Any]:
        content = self._state.piece(client, request.object_id)
        found = content is not None
        return {"object_found": found, "object_available": found, "object_content": content or b""}

    async def _push_object(self, client: Client, request: Any) -> dict[str, Any]:
        stored = await asyncio.to_thread(self._state.store, client, request.object_id, request.object_content)
        return {"stored": stored}


def _announced(scope: Scope, most: int) -> int:
    announced = dict(scope["headers"]).get(b"content-length", b"")
    if not announced.isdigit() or len(announced) > 15 or int(announced) > most:
        raise RefusedError(413, "size")
    return int(announced)


async def _body(receive: Receive, claim: Claim, most: int) -> bytes:
    """Return a body; raises RefusedError where it is too large, too slow, cut off, or not what was signed."""
    parts: list[bytes] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(READ_SECONDS):
            while more and size <= most:
                message = await receive()
                parts.append(message.get("body", b""))
                # A connection that breaks off has no more, and not what was signed.
                size, more = size + len(parts[-1]), message.get("more_body", False)
    except TimeoutError:
        raise RefusedError(408, BUSY) from None
    body = b"".join(parts)
    if hashlib.sha256(body).hexdigest() != claim.digest:
        raise RefusedError(400, DAMAGED)
    return body
