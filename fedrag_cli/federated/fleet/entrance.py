"""The first bytes of a connection: the TLS handshake, and whether HTTP comes after it."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Callable
from typing import Any, cast

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from fedrag_cli.federated.fleet.refusals import Refusals

HANDSHAKE_SECONDS = 60.0
# Connections that ask nothing, or never end their first request's head, would keep all places of the server taken.
SILENT_SECONDS = 60.0
MOST_HEAD_BYTES = 2**16
_METHOD = re.compile(rb"[A-Z]{1,7}( |$)")


class Entrance(asyncio.Protocol):
    """Stands before the HTTP protocol of a connection until a request begins, and says why none does.

    The web server does the handshake below its protocols, which never hear of one that fails.

    Args:
        inner: The HTTP protocol.
        loop: The event loop.
        context: The server's certificate; plain HTTP without one.
        refusals: Told of connections that come to nothing.
    """

    def __init__(
        self,
        inner: asyncio.Protocol,
        loop: asyncio.AbstractEventLoop,
        context: ssl.SSLContext | None,
        refusals: Refusals,
    ) -> None:
        """Keep all four."""
        self._inner = inner
        self._loop = loop
        self._context = context
        self._refusals = refusals
        self._opened = self._ended = False
        self._early: list[bytes] = []
        self._head = bytearray()
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Hand a plain connection on, or begin the handshake."""
        self._transport = cast(asyncio.Transport, transport)
        # asyncio leaves it off where a socket does not name its protocol, and every answer then waits 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._address = (transport.get_extra_info("peername") or ("an unknown address",))[0]
        if self._context is None:
            self._open()
            return
        # What comes now is for the handshake, which begins in the loop's next turn.
        self._transport.pause_reading()
        self._handshake = self._loop.create_task(self._secure(self._context))

    def data_received(self, data: bytes) -> None:
        """Look at the first request's head, and leave the connection to the HTTP protocol from its end on."""
        if not self._opened:
            self._early.append(data)
            return
        self._head += data
        if self._context is None and self._head[:2] == b"\x16\x03":
            self._tell("tls", f"A client at {self._address} speaks TLS, but this server does without")
        elif not _METHOD.match(self._head[:8]):
            self._tell("http", f"A connection from {self._address} sent no HTTP")
        elif b"\r\n\r\n" not in self._head and len(self._head) < MOST_HEAD_BYTES:
            return
        self._stop_waiting()
        self._transport.set_protocol(self._inner)
        self._inner.data_received(bytes(self._head))

    def connection_lost(self, exc: Exception | None) -> None:
        """Hand on that the connection has ended."""
        self._ended = True
        self._stop_waiting()
        if self._opened:
            self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """Hand on that the other side is slow."""
        if self._opened:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Hand on that the other side has caught up."""
        if self._opened:
            self._inner.resume_writing()

    async def _secure(self, context: ssl.SSLContext) -> None:
        try:
            secured = await self._loop.start_tls(
                self._transport, self, context, server_side=True, ssl_handshake_timeout=HANDSHAKE_SECONDS
            )
        except ssl.SSLError as error:
            self._tell(*_handshake_failure(self._address, error.reason or ""))
        except ConnectionAbortedError:
            self._tell("silent", f"A connection from {self._address} said nothing for {HANDSHAKE_SECONDS:.0f} s")
        except OSError:
            self._tell("ended", f"A connection from {self._address} ended before TLS was set up")
        else:
            if secured is not None and not self._ended:
                self._transport = secured
                self._open()

    def _open(self) -> None:
        self._opened = True
        self._patience = self._loop.call_later(SILENT_SECONDS, self._hang_up)
        self._inner.connection_made(self._transport)
        for data in self._early:
            # After the first piece the HTTP protocol has taken the transport over.
            self._transport.get_protocol().data_received(data)  # type: ignore[attr-defined]
        self._early.clear()

    def _hang_up(self) -> None:
        self._tell("silent", f"A connection from {self._address} asked nothing for {SILENT_SECONDS:.0f} s")
        self._transport.abort()

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()

    def _tell(self, reason: str, line: str) -> None:
        self._refusals.tell(self._address, reason, line)


def entrance(context: ssl.SSLContext | None, refusals: Refusals) -> type[asyncio.Protocol]:
    """Return what the web server takes for its protocol's class, and calls for each connection.

    Args:
        context: The server's certificate; plain HTTP without one.
        refusals: Told of connections that come to nothing.
    """
    protocol = cast(Callable[..., asyncio.Protocol], AutoHTTPProtocol)

    def make(_loop: asyncio.AbstractEventLoop | None = None, **options: Any) -> Entrance:
        loop = _loop or asyncio.get_running_loop()
        return Entrance(protocol(_loop=loop, **options), loop, context, refusals)

    return cast(type[asyncio.Protocol], make)


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
