"""What stands before the Fleet API: which routes exist, how large a request may be, and who may speak for whom."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from flwr.proto.fleet_pb2 import ActivateNodeRequest, PushMessagesRequest
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from fedrag_cli.federated.fleet.admission import Admission, Scope
from fedrag_cli.federated.fleet.memory import PassingMemory
from fedrag_cli.federated.fleet.state import FleetState

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

PREFIX = "/v1/fleet/"
ROUTES = frozenset(
    PREFIX + name
    for name in (
        "register-node",
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
PUSHES = frozenset({PREFIX + "push-object", PREFIX + "push-messages"})
# Flower cuts arrays into objects of 5 MiB, and each is a request of its own.
MOST_PUSHED_BYTES = 8 * 2**20
MOST_BYTES = 64 * 2**10
READ_SECONDS = 60.0
SESSION_HEADER = "x-fedrag-session"
SUPERSEDED = "superseded"


class RequestBounds:
    """Refuses, before a body is read, all but what clients need: other routes, unknown keys, bodies above a size.

    Args:
        app: The application behind it.
        admission: Decides who may speak at all.
        memory: Told how many bytes pass.
    """

    def __init__(self, app: Application, admission: Admission, memory: PassingMemory) -> None:
        """Keep all three."""
        self._app = app
        self._admission = admission
        self._memory = memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or hand it on with a count of its bytes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] not in ROUTES or scope["method"] != "POST":
            self._admission.turn_away_stranger(scope)
            await PlainTextResponse("Not found", 404)(scope, receive, send)
            return
        if not await self._admission.admits(scope):
            await JSONResponse({"detail": "Invalid SuperNode authentication"}, 401)(scope, receive, send)
            return
        most = MOST_PUSHED_BYTES if scope["path"] in PUSHES else MOST_BYTES
        try:
            body = await asyncio.wait_for(self._read(scope, receive, most), READ_SECONDS)
        except TimeoutError:
            body = None
        if body is None:
            await PlainTextResponse("Request too large", 413)(scope, receive, send)
            return
        waiting, passed = [body], len(body)

        async def replay() -> MutableMapping[str, Any]:
            if not waiting:
                return await receive()
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}

        async def count(message: MutableMapping[str, Any]) -> None:
            nonlocal passed
            passed += len(message.get("body", b""))
            if message.get("status") == 401:
                self._admission.note_wrong_time(scope)
            await send(message)

        del body
        await self._app(scope, replay, count)
        self._memory.note(passed)

    async def _read(self, scope: Scope, receive: Receive, most: int) -> bytes | None:
        """Return the whole body, or None where it is too large or was cut off."""
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > most:
            return None
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > most:
                return None
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)


class SpeakerCheck(BaseHTTPMiddleware):
    """Lets a key speak through one process at a time, and only for itself; it stands behind the signature check."""

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Refuse a process that was superseded, and a reply in another client's name."""
        state: FleetState = request.app.state.linkstate_factory.state()
        message = getattr(request.state, "protobuf_request", None)
        session = request.headers.get(SESSION_HEADER, "")
        if isinstance(message, ActivateNodeRequest):
            response = await call_next(request)
            if response.status_code == 200:
                state.note_session(message.public_key, session)
            return response
        node_id = _node_id(message)
        if node_id is not None and not state.is_session_of(node_id, session):
            return _refusal(409, SUPERSEDED)
        if isinstance(message, PushMessagesRequest) and not _speaks_for_itself(message):
            return _refusal(403, "A client may reply in its own name only")
        return await call_next(request)


def _refusal(code: int, reason: str) -> Response:
    # Flower lets errors through as JSON only.
    return JSONResponse({"detail": reason}, code)


def _node_id(message: Any) -> int | None:
    node = getattr(message, "node", None)
    found = getattr(node, "node_id", None) if node is not None else getattr(message, "node_id", None)
    return int(found) if found is not None else None


def _speaks_for_itself(message: PushMessagesRequest) -> bool:
    own = message.node.node_id
    trees, messages = len(message.message_object_trees), list(message.messages_list)
    return trees == len(messages) == 1 and all(item.metadata.src_node_id == own for item in messages)


def check_routes() -> None:
    """Raise RuntimeError where an installed Flower has none of the routes that are needed, after an upgrade."""
    missing = [route for route in ROUTES if ("POST", route) not in PROTOBUF_REQUEST_TYPES]
    if missing:
        raise RuntimeError(f"This version of flwr has no {', '.join(sorted(missing))}.")
