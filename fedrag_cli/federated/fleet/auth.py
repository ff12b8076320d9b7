"""Who may speak: the signature of a request, what a server makes of it, and what its owner sees of those turned away.

A client signs each request's route, its body's hash, its session, and a number that it uses once. So nobody else's
request is taken, none is taken twice, and one that was damaged on the way is not taken for whole. The server names a
part of the session, another one each time, so nothing signed for another start of it is taken either; no clock counts.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import threading
import time
import uuid
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from fedrag_cli.errors import ConfigError
from fedrag_cli.federated.fleet._flower import KEY_HEADER, SIGNATURE_HEADER, asymmetric
from fedrag_cli.federated.keys import fingerprint

Scope = MutableMapping[str, Any]
SESSION_HEADER, COUNT_HEADER, DIGEST_HEADER = "x-fedrag-session", "x-fedrag-count", "x-fedrag-digest"
_loaded = functools.lru_cache(maxsize=1024)(asymmetric.bytes_to_public_key)
_SIGNED = (SESSION_HEADER, COUNT_HEADER, DIGEST_HEADER)
SECONDS_BETWEEN_READS = 1.0
# Why a request is not taken, as the answer says it.
UNKNOWN_KEY, UNKNOWN_CLIENT, SUPERSEDED, CHALLENGED = "key", "client", "superseded", "challenged"
UNSIGNED, SIGNATURE, USED, DAMAGED, BUSY = "unsigned", "signature", "used", "damaged", "busy"


@dataclass(eq=False)
class RefusedError(Exception):
    """A request that is not taken.

    Args:
        code: HTTP status code.
        reason: One of a few fixed words.
        challenge: What a client's session is to begin with, where that is the reason.
    """

    code: int
    reason: str
    challenge: str = ""


class Signer:
    """Signs a client's requests; several threads may use it.

    Args:
        key: The client's private key.
    """

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        """Begin with a session that no server has named a part of."""
        self._key = key
        self.public_key = asymmetric.public_key_to_bytes(key.public_key())
        self._counts = itertools.count(1)
        self.begin("")

    def begin(self, challenge: str) -> None:
        """Begin a session with what a server has named; two processes with the same key are told apart by the rest."""
        self._session = f"{challenge}-{uuid.uuid4().hex}"

    def headers(self, path: str, body: bytes) -> dict[str, str]:
        """Return the headers of one request."""
        signed = self._session, str(next(self._counts)), hashlib.sha256(body).hexdigest()
        signature = asymmetric.sign_message(self._key, _statement(path, *signed))
        return {
            KEY_HEADER: b64encode(self.public_key).decode(),
            SIGNATURE_HEADER: b64encode(signature).decode(),
            **dict(zip(_SIGNED, signed, strict=True)),
        }


@dataclass(frozen=True)
class Claim:
    """What the headers of a request say."""

    public_key: bytes
    session: str
    count: int
    digest: str
    address: str
    signature: bytes = b""
    statement: bytes = b""

    def is_right(self) -> bool:
        """Return whether the key has signed all this."""
        try:
            key: Any = _loaded(self.public_key)
        except (ValueError, UnsupportedAlgorithm):
            return False
        # What it says it is, a stranger's key need not be.
        is_fitting = isinstance(key, ec.EllipticCurvePublicKey)
        return is_fitting and asymmetric.verify_signature(key, self.statement, self.signature)


@dataclass
class ReplayWindow:
    """The numbers that a session has used; they may come out of order, as requests of several threads do.

    Args:
        highest: The number of its first request; what is below was signed before, and counts as used.
        used: The bits of it and of the numbers below.
    """

    WIDTH = 1024
    highest: int
    used: int = (1 << WIDTH) - 1

    def take(self, count: int) -> bool:
        """Return whether a number is new, and remember it."""
        if count > self.highest:
            self.used = (self.used << min(count - self.highest, self.WIDTH) | 1) & (1 << self.WIDTH) - 1
            self.highest = count
            return True
        back = self.highest - count
        if back >= self.WIDTH or self.used >> back & 1:
            return False
        self.used |= 1 << back
        return True


class Admission:
    """Decides which requests are looked at, from their heads alone.

    Args:
        allowed: Public keys by client name; None where any key may speak.
        read_again: Returns the keys that are allowed now; asked where an unknown key comes, at most once a second.
        let_in: Told of each key that is added: its client's name, and the key.
        refusals: Told who is turned away, and why.
    """

    def __init__(
        self,
        allowed: Mapping[str, bytes] | None,
        read_again: Callable[[], Mapping[str, bytes]] | None,
        let_in: Callable[[str, bytes], None],
        refusals: Refusals,
    ) -> None:
        """Let the first keys in."""
        self._allowed = dict(allowed) if allowed is not None else None
        self._read_again = read_again
        self._let_in = let_in
        self._refusals = refusals
        self._last_read = -SECONDS_BETWEEN_READS
        self._reading = asyncio.Lock()
        for name, public_key in (allowed or {}).items():
            let_in(name, public_key)

    async def admit(self, scope: Scope) -> Claim:
        """Return what a request claims.

        Raises:
            RefusedError: It is not signed, or not by a key that may speak.
        """
        address = address_of(scope)
        claim = _signed(scope)
        if claim is None:
            self.refuse_unknown(scope)
            raise RefusedError(401, UNSIGNED)
        if not claim.is_right():
            line = f"Refused a client at {address}: its signature does not fit its key"
            self._refusals.tell(address, SIGNATURE, line)
            raise RefusedError(401, SIGNATURE)
        if not self._is_allowed(claim.public_key):
            await self._look_again()
        if not self._is_allowed(claim.public_key):
            known_by = fingerprint(claim.public_key)
            line = f"Refused a client at {address}: its key (fingerprint {known_by}) is not in federated.allowed_keys"
            self._refusals.tell(known_by, UNKNOWN_KEY, line)
            raise RefusedError(401, UNKNOWN_KEY)
        return claim

    def refuse_unknown(self, scope: Scope) -> None:
        """Note a request that no client makes."""
        address = address_of(scope)
        line = f"Refused a connection from {address}: its request is none of a fedrag client of this version"
        self._refusals.tell(address, "stranger", line)

    def _is_allowed(self, public_key: bytes) -> bool:
        return self._allowed is None or public_key in self._allowed.values()

    async def _look_again(self) -> None:
        """Read the keys again; one that comes soon after another waits for the next time, and shares it."""
        if self._read_again is None or self._allowed is None:
            return
        asked = time.monotonic()
        async with self._reading:
            if self._last_read > asked:
                return
            await asyncio.sleep(self._last_read + SECONDS_BETWEEN_READS - asked)
            self._last_read = time.monotonic()
            try:
                read = await asyncio.to_thread(self._read_again)
            except ConfigError as error:
                line = f"federated.allowed_keys cannot be read again, and the former keys stay: {error.message}"
                self._refusals.tell(error.message, "folder", line)
                return
            for name, public_key in read.items():
                if public_key not in self._allowed.values():
                    self._let_in(name, public_key)
            # A name's new key takes the place of its former one; a name without a file stays until the next start.
            self._allowed |= read


def address_of(scope: Scope) -> str:
    """Return where a request comes from."""
    client = scope.get("client")
    return str(client[0]) if client else "an unknown address"


def _statement(path: str, *parts: str) -> bytes:
    return "\n".join(["fedrag", path, *parts]).encode("latin-1")


def _signed(scope: Scope) -> Claim | None:
    """Return what is claimed; None where a header is missing or is nonsense."""
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    try:
        session, count, digest = parts = [headers[name] for name in _SIGNED]
        key, signature = (b64decode(headers[name], validate=True) for name in (KEY_HEADER, SIGNATURE_HEADER))
        statement = _statement(scope["path"], *parts)
        return Claim(key, session[:128], int(count[:15]), digest, address_of(scope), signature, statement)
    except (KeyError, ValueError):
        return None


class Refusals:
    """Says once who was turned away and why, so that strangers flood neither the screen nor the memory.

    Several threads may use it. Of each reason at most `MOST_LINES` lines a minute are told, so that a port scan does
    not hide another reason.

    Args:
        note: Shows a line.
        now: The time in seconds.
    """

    SECONDS = 60.0
    MOST_LINES = 10
    MOST_REMEMBERED = 1000

    def __init__(self, note: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        """Start with nothing told."""
        self._note = note
        self._now = now
        self._told: dict[tuple[str, str], None] = {}
        self._minutes: dict[str, tuple[float, int]] = {}
        self._lock = threading.Lock()

    def tell(self, who: str, reason: str, line: str) -> None:
        """Show a line, unless the same was told of the same one already, or there are too many.

        Args:
            who: The address or the key.
            reason: One of a few fixed words.
            line: What to show.
        """
        with self._lock:
            if (who, reason) in self._told:
                return
            now = self._now()
            since, told = self._minutes.get(reason, (now, 0))
            if now - since >= self.SECONDS:
                since, told = now, 0
            self._minutes[reason] = (since, told + 1)
            if told > self.MOST_LINES:
                return
            if told == self.MOST_LINES:
                line = "More of the same were turned away; those of this minute are not listed"
            else:
                self._told[who, reason] = None
                if len(self._told) > self.MOST_REMEMBERED:
                    del self._told[next(iter(self._told))]
        self._note(line)
