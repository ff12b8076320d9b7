"""A client's end: dials out, fetches messages, answers them, and comes back after a crash of either side.

Flower's own client helpers end their process on some answers of the server, follow its redirects and fetch code from
it; this one does not.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message

from fedrag_cli.errors import ConnectionFailedError, FedRAGError, RunInterruptedError
from fedrag_cli.federated.endpoint import ServerAddress, distrust, parse_address, trusting
from fedrag_cli.federated.fleet import _flower as flower
from fedrag_cli.federated.fleet.auth import CHALLENGED, DIGEST_HEADER, SUPERSEDED, UNKNOWN_CLIENT, UNKNOWN_KEY, Signer
from fedrag_cli.federated.fleet.http import POLL_SECONDS
from fedrag_cli.federated.fleet.state import head_bytes
from fedrag_cli.federated.grid import CLIENT_FAILED, quiet_flower
from fedrag_cli.federated.keys import fingerprint
from fedrag_cli.runs.files import os_errors
from fedrag_cli.runs.reporter import Reporter

HEARTBEAT_SECONDS, SECONDS_BETWEEN_NOTES, ANSWER_SECONDS = 10.0, 30.0, 30.0
FIRST_PAUSE, LONGEST_PAUSE = 0.3, 1.0
# A slow line may take long for what is large.
SECONDS = {flower.DEACTIVATE: 5.0, flower.HEARTBEAT: 10.0, flower.PULL_MESSAGES: POLL_SECONDS + ANSWER_SECONDS}
SECONDS |= dict.fromkeys((flower.PUSH_MESSAGES, flower.PULL_OBJECT, flower.PUSH_OBJECT), 150.0)
MOST_ANSWER_BYTES, AT_ONCE = 64 * 2**10, 4

MEANINGS = {
    400: "it runs another version",
    403: "a proxy before it, or it runs another version",
    404: "no server of fedrag, or of another version",
    429: "a proxy before it limits requests",
    500: "an error within it",
}


class UnreachableError(Exception):
    """A request came to nothing, for a reason that may pass.

    Args:
        reason: What happened, in words.
    """

    present = "does not answer"
    past = "did not answer"


class AnsweredError(UnreachableError):
    """The server, or what stands before it, answered with an error."""

    present = "refuses this client's requests"
    past = "refused this client's requests"


class ForgottenError(Exception):
    """The server has no such client any more, such as after its restart; introducing itself again helps."""


class Handler(Protocol):
    """Answers messages; `ended` tells that no more are wanted."""

    @property
    def ended(self) -> bool:
        """Whether the federation is over for this client."""

    def __call__(self, message: Message) -> Message:
        """Return the reply to a message."""


class FleetNode:
    """One client's connection.

    Args:
        server: Where the server is.
        key: The client's private key (SECP384R1), which signs every request.
        reporter: Told what happens.
        connect_timeout: Seconds to try to reach a server that does not answer.
        directory: Where tensors that come take their room, in files without names; the system's temporary folder by
            default.
    """

    def __init__(
        self,
        server: ServerAddress,
        key: ec.EllipticCurvePrivateKey,
        reporter: Reporter,
        *,
        connect_timeout: float = 600.0,
        directory: Path | None = None,
    ) -> None:
        """Keep the settings; nothing is dialled yet."""
        quiet_flower()
        self._server = server
        self._signer = Signer(key)
        self._reporter = reporter
        self._connect_timeout = connect_timeout
        self._directory = directory or Path(tempfile.gettempdir())
        self._most_of_answer = {flower.PULL_OBJECT: flower.PIECE_BYTES + 1024}
        self._where = server.in_words
        self._packer = flower.Packer()
        self._http: httpx.Client
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._was_connected = self._is_doubted = False
        self._silent_since: float | None = None
        self._noted = float("-inf")

    def run(self, handler: Handler, most_bytes: int = 2**40) -> None:
        """Stay connected and answer messages until the handler has ended.

        Args:
            handler: Answers the messages.
            most_bytes: Largest sum of the bytes of a message's tensors.

        Raises:
            ConnectionFailedError: The server cannot be reached, is not trusted, or does not let this client in.
            RunInterruptedError: A signal came while a message was answered.
        """
        self._most_bytes = most_bytes
        self._most_of_answer[flower.PULL_MESSAGES] = self._most_of_answer[flower.PUSH_MESSAGES] = head_bytes(most_bytes)
        self._silent_since = time.monotonic()
        with self._dial() as self._http:
            self._ended.clear()
            beats = threading.Thread(target=self._beat, daemon=True)
            try:
                while not handler.ended:
                    try:
                        self._introduce(self._call)
                        if not self._was_connected:
                            self._was_connected = True
                            self._reporter.note(f"Connected to {self._where}")
                            beats.start()
                        self._serve(handler)
                    except ForgottenError:
                        self._note("does not know this client any more (it may have been started again)")
                        # Two servers behind one address each forget the other's clients.
                        self._ended.wait(FIRST_PAUSE)
            finally:
                self._ended.set()
                if self._was_connected:
                    self._leave()

    def check(self) -> bool:
        """Try to connect once, so that a wrong certificate or key is found before models are loaded.

        Returns:
            Whether the server answered; a server that is not up yet is no error.

        Raises:
            ConnectionFailedError: The server answered, but is not trusted or does not let this client in.
        """
        with self._dial() as self._http:
            for _ in range(2):
                try:
                    self._introduce(self._post)
                except (UnreachableError, ForgottenError):
                    continue
                self._leave()
                return True
        return False

    def _dial(self) -> httpx.Client:
        try:
            return httpx.Client(
                base_url=f"{'https' if self._server.tls else 'http'}://{self._server.address}",
                verify=trusting(self._server.ca_certificate) if self._server.tls else False,
                # Environment variables name proxies also for this machine itself.
                trust_env=False,
                proxy=self._server.proxy,
                headers={"accept-encoding": "identity", "content-type": "application/x-protobuf"},
                limits=httpx.Limits(keepalive_expiry=50.0),
            )
        except (ssl.SSLError, ValueError, OSError, httpx.InvalidURL) as error:
            raise ConnectionFailedError(
                f"No connection to '{self._where}' can be made: {error}",
                "Check --address (HOST:PORT) and federated.ca_certificate (PEM).",
            ) from error

    # Requests.

    def _post(self, path: str, **fields: Any) -> Any:
        """Send a request once.

        Raises:
            UnreachableError: There was no answer, or one that may be another if the same is asked again.
            ForgottenError: The server does not know this client.
            ConnectionFailedError: Asking again cannot help.
        """
        asked, answered = flower.TYPES[path]
        body, seconds = asked(**fields).SerializeToString(), SECONDS.get(path, ANSWER_SECONDS)
        headers, most = self._signer.headers(path, body), self._most_of_answer.get(path, MOST_ANSWER_BYTES)
        timeout = httpx.Timeout(seconds, connect=min(self._connect_timeout, ANSWER_SECONDS))
        try:
            with self._http.stream("POST", path, content=body, headers=headers, timeout=timeout) as response:
                content = _bounded(response, most, 2 * seconds)
        except httpx.TransportError as error:
            self._raise_if_hopeless(error)
            raise UnreachableError(self._in_words(error)) from error
        is_whole = response.headers.get(DIGEST_HEADER) == hashlib.sha256(content).hexdigest()
        if response.status_code != 200:
            raise self._refusal(response.status_code, content if is_whole else b"{}")
        if not is_whole:
            raise UnreachableError("its answer was damaged on the way, or is none of fedrag")
        try:
            return answered.FromString(content)
        except flower.DecodeError as error:
            raise UnreachableError("it answered something else than Flower's protocol") from error

    def _call(self, path: str, **fields: Any) -> Any:
        """Send a request until it is answered, or the server was silent for too long; see `_post`."""
        pause = FIRST_PAUSE
        while True:
            try:
                found = self._post(path, **fields)
            except UnreachableError as error:
                self._wait(error, pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                with self._lock:
                    has_noted, self._noted = self._noted > float("-inf"), float("-inf")
                    self._silent_since, self._is_doubted = None, False
                if has_noted and self._was_connected:
                    self._reporter.note("Connected again")
                return found

    def _wait(self, error: UnreachableError, pause: float) -> None:
        with self._lock:
            now = time.monotonic()
            self._silent_since = self._silent_since or now
            waited = now - self._silent_since
        if waited >= self._connect_timeout:
            raise ConnectionFailedError(
                f"The server at {self._where} {error.past} for {waited:.0f} s ({error}).",
                "Check the address, the firewall, and that 'fedrag serve-fl' runs.",
            ) from error
        self._note(f"{error.present} ({error})")
        if self._ended.wait(min(pause, self._connect_timeout - waited)):
            raise error

    def _note(self, what: str) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._noted < SECONDS_BETWEEN_NOTES:
                return
            self._noted = now
        self._reporter.note(f"The server at {self._where} {what}; trying again")

    def _refusal(self, code: int, content: bytes) -> Exception:
        """Return what an answer other than 200 means; its words are compared, and never shown."""
        try:
            detail = dict(json.loads(content))
        except (ValueError, TypeError, RecursionError):
            detail = {}
        reason, challenge = detail.get("detail"), str(detail.get("challenge"))
        if reason == SUPERSEDED:
            return ConnectionFailedError(
                "Another process has joined with this client's key.",
                "Run one process a key, and make a key for each client with 'fedrag keys node'.",
            )
        if reason == CHALLENGED and re.fullmatch("[0-9a-f-]{1,64}", challenge):
            self._signer.begin(challenge)
        if reason in (CHALLENGED, UNKNOWN_CLIENT):
            return ForgottenError()
        if reason == UNKNOWN_KEY and not self._is_doubted:
            # A bit that was flipped on the way makes another key; it takes two answers to be sure.
            self._is_doubted = True
            return AnsweredError("it does not know this client's key")
        if reason == UNKNOWN_KEY:
            return ConnectionFailedError(
                f"The server at {self._where} does not know this client's key (fingerprint "
                f"{fingerprint(self._signer.public_key)}).",
                "Give the server's owner your public key (NAME.pub) for the folder federated.allowed_keys.",
            )
        meaning = MEANINGS.get(code, "it sends clients elsewhere, which is not followed" if code // 100 == 3 else "")
        return AnsweredError(f"it answered {code}" + (f": {meaning}" if meaning else ""))

    def _raise_if_hopeless(self, error: httpx.TransportError) -> None:
        """Raise ConnectionFailedError where trying again cannot help: no trust, or no TLS."""
        refusal = next((cause for cause in _causes(error) if isinstance(cause, ssl.SSLCertVerificationError)), None)
        if refusal is not None:
            reason = distrust(parse_address(self._server.address), refusal)
            raise ConnectionFailedError(
                f"The certificate of the server at {self._where} is not trusted: {reason}.",
                "Set federated.ca_certificate to the authority that signed it, and use a host name it is made for.",
            ) from error
        if not self._was_connected and re.search("WRONG_VERSION|record layer", str(error)):
            raise ConnectionFailedError(
                f"The server at {self._where} speaks no TLS ({error}).",
                "Check the port; for a server that was started with --insecure, join with --insecure.",
            ) from error

    def _in_words(self, error: httpx.TransportError) -> str:
        """Return what went wrong below HTTP, such as `connection refused`."""
        if isinstance(error, httpx.ProxyError):
            return "the proxy does not connect"
        broke = isinstance(error, httpx.RemoteProtocolError | httpx.ReadError | httpx.LocalProtocolError)
        if broke and not self._was_connected and not self._server.tls:
            return "it does not answer plain requests: it may use TLS, or not be up yet"
        for cause in _causes(error):
            if isinstance(cause, socket.gaierror):
                return "no such host" if cause.errno == socket.EAI_NONAME else "its name cannot be looked up"
            if isinstance(cause, TimeoutError | httpx.TimeoutException):
                return "timed out"
            if isinstance(cause, OSError) and cause.strerror and not isinstance(cause, ssl.SSLError):
                return cause.strerror.lower()
        return "the connection broke"

    # What is asked and answered.

    def _introduce(self, send: Callable[..., Any]) -> None:
        introduction = {"public_key": self._signer.public_key, "heartbeat_interval": HEARTBEAT_SECONDS}
        try:
            send(flower.ACTIVATE, **introduction)
        except ForgottenError:
            # The server has named the session that it wants to be signed.
            send(flower.ACTIVATE, **introduction)

    def _beat(self) -> None:
        """Tell the server now and then that this client lives."""
        while not self._ended.wait(HEARTBEAT_SECONDS):
            # The next request finds out whether the connection is really lost.
            with suppress(UnreachableError, ForgottenError, ConnectionFailedError, RuntimeError):
                self._post(flower.HEARTBEAT, heartbeat_interval=HEARTBEAT_SECONDS)

    def _leave(self) -> None:
        """Say goodbye, so that the server need not wait for missing signs of life."""
        # A server that is gone needs none, and any other finds out by itself.
        with suppress(UnreachableError, ForgottenError, ConnectionFailedError):
            self._post(flower.DEACTIVATE)

    def _serve(self, handler: Handler) -> None:
        while not handler.ended:
            asked = time.monotonic()
            answer = self._call(flower.PULL_MESSAGES)
            message = self._fetch(answer) if answer.messages_list else None
            if message is not None:
                self._send(self._answer(handler, message))
            else:
                # A server that is about to end answers at once, and a confused one offers what it does not have.
                self._ended.wait(max(0.0, asked + LONGEST_PAUSE - time.monotonic()))

    def _fetch(self, answer: Any) -> Message | None:
        """Return the message that the server has, or None where it has withdrawn it meanwhile.

        Raises:
            ConnectionFailedError: It is none, or not as large as agreed.
        """
        with os_errors(self._directory):
            try:
                head, tree = answer.messages_list[0], answer.message_object_trees[0]
                incoming = flower.Incoming(head, tree, self._directory, self._most_bytes)
                incoming.message.content = incoming.content()
            except OSError:
                raise
            except Exception as error:
                ours = isinstance(error, flower.UnusableError)
                raise self._nonsense(str(error) if ours else "it is no message") from error

            def pull(object_id: str) -> bool:
                found = self._call(flower.PULL_OBJECT, object_id=object_id)
                if found.object_found and not incoming.put(object_id, found.object_content):
                    raise self._nonsense("its tensors are not those that were announced")
                return bool(found.object_found)

            return incoming.message if self._each(pull, incoming.missing) else None

    def _nonsense(self, reason: str) -> ConnectionFailedError:
        return ConnectionFailedError(
            f"The server at {self._where} sends a message that cannot be used: {reason}.",
            "Are both sides of the same version, and their configs the same?",
        )

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
        return flower.failed(message, CLIENT_FAILED)

    def _send(self, reply: Message) -> None:
        outgoing = self._packer.pack(reply, uuid.uuid4().hex)

        def push(object_id: str) -> bool:
            content = outgoing.piece(object_id)
            if content is None:
                raise self._nonsense("it asks for tensors that this client never had")
            return bool(self._call(flower.PUSH_OBJECT, object_id=object_id, object_content=content).stored)

        for _ in range(3):
            answer = self._call(
                flower.PUSH_MESSAGES, messages_list=[outgoing.head], message_object_trees=[outgoing.tree]
            )
            if any(answer.results.values()):
                break
            if self._each(push, answer.objects_to_push):
                return
        if outgoing.tree.children:
            self._reporter.note("The server did not take this update")

    def _each(self, work: Callable[[str], bool], object_ids: Iterable[str]) -> bool:
        """Do something for several pieces, a few at once, and return whether it was done for all; a failure ends it."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                return all(pool.map(work, object_ids))
            except ForgottenError:
                raise
            except BaseException:
                # Also those threads that wait for a silent server end now.
                self._ended.set()
                raise


def _bounded(response: httpx.Response, most_bytes: int, seconds: float) -> bytes:
    """Return an answer's bytes, as they are; raises UnreachableError where they are too many or take too long."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise UnreachableError("its answer is compressed, which nobody asked for")
    content, end = bytearray(), time.monotonic() + seconds
    for part in response.iter_raw():
        content += part
        if len(content) > most_bytes:
            raise UnreachableError("its answer is larger than agreed")
        if time.monotonic() > end:
            raise UnreachableError("its answer does not end")
    return bytes(content)


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
