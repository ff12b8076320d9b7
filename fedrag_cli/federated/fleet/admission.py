"""Who may speak to a server: the allowed keys, and what is said of those that have none."""

from __future__ import annotations

import asyncio
import time
from base64 import b64decode
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

from fedrag_cli.errors import ConfigError
from fedrag_cli.federated.fleet.refusals import Refusals
from fedrag_cli.federated.keys import fingerprint

Scope = MutableMapping[str, Any]
SECONDS_BETWEEN_READS = 1.0


@dataclass(frozen=True)
class _Signature:
    public_key: bytes
    signature: bytes
    signed: bytes

    def is_right(self) -> bool:
        """Return whether the key has signed the time; Flower checks age and node id afterwards."""
        try:
            key = bytes_to_public_key(self.public_key)
        except (ValueError, UnsupportedAlgorithm):
            return False
        # What it says it is, a stranger's key need not be.
        return isinstance(key, ec.EllipticCurvePublicKey) and verify_signature(key, self.signed, self.signature)


class Admission:
    """Decides which requests are let in.

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

    async def admits(self, scope: Scope) -> bool:
        """Return whether a request is signed by a key that may speak."""
        address = _address(scope)
        found = _signature(scope)
        if found is None:
            self.turn_away_stranger(scope)
        if self._allowed is None:
            # Flower itself refuses what is not signed.
            return True
        if found is None:
            return False
        if not found.is_right():
            line = f"Refused a client at {address}: its signature does not fit its key"
            self._refusals.tell(address, "signature", line)
            return False
        if not self._is_allowed(found.public_key):
            await self._look_again()
        if self._is_allowed(found.public_key):
            return True
        known_by = fingerprint(found.public_key)
        line = f"Refused a client at {address}: its key (fingerprint {known_by}) is not in federated.allowed_keys"
        self._refusals.tell(known_by, "key", line)
        return False

    def turn_away_stranger(self, scope: Scope) -> None:
        """Note a request that no client makes."""
        address = _address(scope)
        line = f"Refused a connection from {address}: its request is none of a fedrag client of this version"
        self._refusals.tell(address, "stranger", line)

    def note_wrong_time(self, scope: Scope) -> None:
        """Note that a request was refused, where that is for the time at which it says it was signed."""
        found = _signature(scope)
        try:
            age = (now() - datetime.fromisoformat(found.signed.decode("ascii"))).total_seconds() if found else 0.0
        except (ValueError, TypeError):
            return
        if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            address = _address(scope)
            line = f"Refused a client at {address}: its clock and this server's differ by {abs(age):.0f} s"
            self._refusals.tell(address, "clock", line)

    def _is_allowed(self, public_key: bytes) -> bool:
        return self._allowed is not None and public_key in self._allowed.values()

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
                if not self._is_allowed(public_key):
                    self._let_in(name, public_key)
            # A name's new key takes the place of its former one; a name without a file stays until the next start.
            self._allowed |= read


def _signature(scope: Scope) -> _Signature | None:
    headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
    try:
        return _Signature(
            b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.lower()], validate=True),
            b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER.lower()], validate=True),
            headers[TIMESTAMP_HEADER.lower()],
        )
    except (KeyError, ValueError):
        return None


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "an unknown address"
