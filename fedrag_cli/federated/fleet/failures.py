"""Telling failures of a connection that trying again may mend from those that it cannot."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass

import httpx

from fedrag_cli.errors import ConnectionFailedError
from fedrag_cli.federated.endpoint import distrust, parse_address

MEANINGS = {
    400: "it runs another version",
    401: "it does not know this client's key, or the clocks differ",
    403: "a proxy before it, or it runs another version",
    404: "no server of fedrag, or of another version",
    413: "what was sent is too large for it",
    415: "it runs another version",
    422: "it runs another version",
    429: "a proxy before it limits requests",
    500: "an error within it",
}


class LostConnectionError(Exception):
    """The connection or the identity was lost; activating again may help.

    Args:
        reason: What happened, in words.
    """

    present = "does not answer"
    past = "did not answer"


class ForgottenError(LostConnectionError):
    """The server answers, but has no such client any more, such as after its restart."""

    present = "does not know this client any more"
    past = "did not know this client any more"


class AnsweredError(LostConnectionError):
    """The server answered with an error that trying the same again does not mend."""

    present = "refuses this client's requests"
    past = "refused this client's requests"

    def __init__(self, code: int) -> None:
        """Keep the HTTP status code."""
        meaning = MEANINGS.get(code)
        super().__init__(f"it answered {code}" + (f": {meaning}" if meaning else ""))
        self.code = code


@dataclass(frozen=True)
class ServerAddress:
    """Where the server is and how to trust it.

    Args:
        address: `HOST:PORT`.
        tls: Whether to speak TLS.
        ca_certificate: The authority to trust, as PEM; the system's authorities where it is None.
    """

    address: str
    tls: bool
    ca_certificate: bytes | None = None


def raise_if_hopeless(error: httpx.TransportError, server: ServerAddress, *, was_connected: bool) -> None:
    """Raise ConnectionFailedError where trying again cannot help: no trust, or another protocol.

    Args:
        error: What the HTTP client raised.
        server: Where the server is.
        was_connected: Whether this client has spoken with the server before, so that protocol errors are passing ones.
    """
    text = str(error)
    if refusal := _verification(error):
        raise ConnectionFailedError(
            f"The certificate of the server at {server.address} is not trusted: "
            f"{distrust(parse_address(server.address), refusal)}.",
            "Set federated.ca_certificate to the authority that signed it, and use a host name it is made for.",
        ) from error
    if was_connected:
        return
    if ("SSL" in text or "ssl" in text) and not isinstance(error, httpx.TimeoutException):
        raise ConnectionFailedError(
            f"The server at {server.address} speaks no TLS ({text}).",
            "Check the port; for a server that was started with --insecure, join with --insecure.",
        ) from error
    protocol = isinstance(error, httpx.RemoteProtocolError | httpx.ReadError | httpx.LocalProtocolError)
    if protocol and not server.tls:
        raise ConnectionFailedError(
            f"What listens at {server.address} does not answer plain requests ({type(error).__name__}).",
            "Does the server use TLS? Then set federated.ca_certificate, and leave --insecure out.",
        ) from error


def in_words(error: httpx.TransportError) -> str:
    """Return what went wrong below HTTP, such as `connection refused`."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror):
            return "no such host" if cause.errno == socket.EAI_NONAME else "its name cannot be looked up"
        if isinstance(cause, TimeoutError | httpx.TimeoutException):
            return "timed out"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        cause = cause.__cause__ or cause.__context__
    return "the connection broke"


def _verification(error: BaseException) -> ssl.SSLCertVerificationError | None:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    return cause
