"""The server's book: which clients there are, what each is asked, and what has come of its reply.

Every client has its own messages, and its own file for the reply to each; nothing that one sends is looked up for
another. Several threads may use it: those of the web server, and the one that runs the rounds.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.app import Message, MessageType

from fedrag_cli.federated.fleet import _flower as flower
from fedrag_cli.federated.fleet.auth import (
    CHALLENGED,
    SUPERSEDED,
    UNKNOWN_CLIENT,
    USED,
    Claim,
    RefusedError,
    ReplayWindow,
)
from fedrag_cli.federated.grid import CLIENT_FAILED, FederationGrid, Member
from fedrag_cli.runs.files import os_errors

MOST_CLIENTS = 1000
# Clients give a sign of life every 10 s at least; what they say of it themselves does not count.
LIVENESS_SECONDS = 30.0
# How far a client has come; a place is kept only for who has answered work.
NEW, GREETED, AT_WORK, HAS_WORKED = range(4)


@dataclass(eq=False)
class PendingMessage:
    """A message to a client, and what has come of the reply.

    Args:
        asked: The message.
        outgoing: The same in pieces.
        activation: Which of the client's connections it is for; a client that was restarted is asked anew.
        reply: The reply, as far as it has come.
        failure: Why there is no usable reply.
    """

    asked: Message
    outgoing: flower.Outgoing
    activation: int
    reply: flower.Incoming | None = None
    failure: str = ""

    @property
    def is_answered(self) -> bool:
        """Whether all of the reply is there, or is known not to come."""
        return bool(self.failure) or (self.reply is not None and self.reply.is_complete)


@dataclass(eq=False)
class Client:
    """A client that has introduced itself.

    Args:
        member: How the rounds know it, as of its newest activation.
        address: Where it comes from.
        session: The process that speaks for it.
        counts: The numbers that this process has used.
        seen: When it last asked something, by a clock that nobody sets.
        pending: What it is asked, by message id, in the order of asking.
        standing: How far it has come.
        is_forgotten: Whether another has got its place.
        bodies: Large bodies that it is sending now.
        polls: How often it has asked for messages.
        arrived: Set where there may be a message for it.
    """

    member: Member
    address: str
    session: str
    counts: ReplayWindow
    seen: float = float("-inf")
    pending: dict[str, PendingMessage] = field(default_factory=dict)
    standing: int = NEW
    is_forgotten: bool = False
    bodies: int = 0
    polls: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_online(self) -> bool:
        """Whether it has given a sign of life lately."""
        return time.monotonic() - self.seen < LIVENESS_SECONDS


class FleetState(FederationGrid):
    """The book; for the rounds it is Flower's grid.

    Args:
        directory: Where replies take their room.
        most_bytes: Largest sum of the bytes of a reply's tensors.
        most_clients: How many clients there may be at once.
    """

    def __init__(self, directory: Path, most_bytes: int, most_clients: int = MOST_CLIENTS) -> None:
        """Start without clients."""
        self.most_clients = most_clients
        # Of this start alone, so that nothing signed for another one is taken.
        self._start = secrets.token_hex(8)
        self._directory = directory
        self.most_bytes = most_bytes
        self._names: dict[bytes, str] = {}
        self._clients: dict[bytes, Client] = {}
        self._by_id: dict[int, Client] = {}
        self._asked: dict[str, Client] = {}
        self._packer = flower.Packer()
        self._failure: BaseException | None = None
        self._lock = threading.RLock()
        self._changed = threading.Event()
        self.wake: Callable[[Client], None] = lambda client: None

    # What clients do, in the web server's threads.

    def allow(self, name: str, public_key: bytes) -> None:
        """Give a key its client's name."""
        with self._lock:
            self._names[public_key] = name

    def activate(self, claim: Claim) -> Client:
        """Connect a client, whether it is new, comes back, or only asks again.

        Raises:
            RefusedError: Its session is none that may begin now, the request was made before, or there are too many.
        """
        with self._lock:
            client = self._clients.get(claim.public_key)
            if client is None or claim.session != client.session:
                challenge = f"{self._start}-{client.member.activation if client is not None else 0}"
                if claim.session.rpartition("-")[0] != challenge:
                    raise RefusedError(401, CHALLENGED, challenge)
                client = client or self._add(claim.public_key, claim.address)
                client.session, client.counts = claim.session, ReplayWindow(claim.count)
            elif not client.counts.take(claim.count):
                raise RefusedError(401, USED)
            name, activation = self._names.get(claim.public_key, ""), client.member.activation + 1
            client.member = replace(client.member, name=name, activation=activation)
            client.seen = time.monotonic()
        self._changed.set()
        return client

    def identify(self, claim: Claim) -> Client:
        """Return who makes a request, which is a sign of life.

        Raises:
            RefusedError: It is nobody, a process that was superseded, or the request was made before.
        """
        with self._lock:
            client = self._clients.get(claim.public_key)
            if client is None:
                raise RefusedError(401, UNKNOWN_CLIENT)
            if claim.session != client.session:
                raise RefusedError(409, SUPERSEDED)
            if not client.counts.take(claim.count):
                raise RefusedError(401, USED)
            if not client.is_online:
                self._changed.set()
            client.seen = time.monotonic()
            return client

    def leave(self, client: Client) -> None:
        """Note that a client has said goodbye."""
        client.seen = float("-inf")
        self._changed.set()

    def next_message(self, client: Client) -> flower.Outgoing | None:
        """Return what a client is to answer; the same again until it has."""
        with self._lock:
            for pending in client.pending.values():
                if pending.activation == client.member.activation and pending.reply is None and not pending.failure:
                    return pending.outgoing
            return None

    def piece(self, client: Client, object_id: str) -> bytes | None:
        """Return a piece of a message to a client."""
        with self._lock:
            messages = list(client.pending.values())
        found = (message.outgoing.piece(object_id) for message in messages)
        return next((content for content in found if content is not None), None)

    def announce(self, client: Client, head: flower.MessageProto, tree: flower.ObjectTree) -> list[str] | None:
        """Take a reply's bare message, and return the names of the pieces that are missing; None where nobody waits.

        A client that lost the answer to this asks again, and goes on with what is missing.
        """
        with self._lock:
            pending = client.pending.get(head.metadata.reply_to_message_id)
            if pending is None or pending.is_answered:
                return None if pending is None or pending.failure else []
            if pending.reply is None or pending.reply.pieces != {child.object_id for child in tree.children}:
                try:
                    # Only training is answered with tensors; strangers that shake hands get no room for any.
                    most = self.most_bytes if pending.asked.metadata.message_type == MessageType.TRAIN else 0
                    pending.reply = flower.Incoming(head, tree, self._directory, most)
                except OSError as error:
                    self.fail(error)
                    raise
                except Exception as error:  # noqa: BLE001  (whatever hostile bytes make Flower raise)
                    pending.failure = str(error) if isinstance(error, flower.UnusableError) else "it is no message"
                    self._changed.set()
                    return None
            client.standing = max(client.standing, GREETED)
            if not (missing := pending.reply.missing):
                self._changed.set()
            return missing

    def store(self, client: Client, object_id: str, content: bytes) -> bool:
        """Keep a piece of a client's reply, and return whether it is one that was announced."""
        with self._lock:
            replies = [pending.reply for pending in client.pending.values() if pending.reply is not None]
        try:
            stored = any(reply.put(object_id, content) for reply in replies)
        except OSError as error:
            self.fail(error)
            raise
        if any(reply.is_complete for reply in replies):
            self._changed.set()
        return stored

    def _add(self, public_key: bytes, address: str) -> Client:
        if len(self._clients) >= self.most_clients:
            self._make_room()
        key = hashlib.sha256(public_key).hexdigest()[:12]
        client = Client(Member(secrets.randbits(62), "", key, 0), address, "", ReplayWindow(0))
        self._clients[public_key] = self._by_id[client.member.node_id] = client
        return client

    def _make_room(self) -> None:
        """Forget a client that has not worked, of the address that has most of these, or one that is gone.

        Without allowed keys anybody can make new ones, which would take all places otherwise.
        """
        spare = {
            key: client for key, client in self._clients.items() if client.standing < HAS_WORKED or not client.is_online
        }
        if not spare:
            raise RefusedError(503, "full")
        crowds = Counter(client.address for client in spare.values())

        def priority(key: bytes) -> tuple[bool, int, int, float]:
            client = spare[key]
            return client.standing == HAS_WORKED, -crowds[client.address], client.standing, client.seen

        client = self._clients.pop(min(spare, key=priority))
        client.is_forgotten = True
        del self._by_id[client.member.node_id]
        for message_id in client.pending:
            self._asked.pop(message_id, None)

    # What the rounds do.

    def clients(self) -> list[Client]:
        """Return all clients, those that are gone too."""
        with self._lock:
            return list(self._clients.values())

    def members(self) -> list[Member]:
        """Return the clients that are connected now; raises what has made it impossible to serve them."""
        self._raise_failure()
        with self._lock:
            return [client.member for client in self._clients.values() if client.is_online]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Put messages where their clients fetch them; an empty id stands for one that nobody can fetch."""
        return [self.ask(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the complete replies that have come since the last call, with their tensors in files.

        Raises:
            FedRAGError: What clients have sent cannot be written.
        """
        return [reply for message_id in message_ids if (reply := self.take(message_id)) is not None]

    def ask(self, message: Message) -> str:
        """Put a message where its client fetches it, and return its id; an empty one where there is no such client."""
        message_id = uuid.uuid4().hex
        outgoing = self._packer.pack(message, message_id)
        with self._lock:
            client = self._by_id.get(message.metadata.dst_node_id)
            if client is None:
                return ""
            client.pending[message_id] = PendingMessage(message, outgoing, client.member.activation)
            if message.metadata.message_type != MessageType.QUERY:
                client.standing = max(client.standing, AT_WORK)
            self._asked[message_id] = client
        self.wake(client)
        return message_id

    def take(self, message_id: str) -> Message | None:
        """Return the reply to a message once all of it is there, and drop both.

        Raises:
            FedRAGError: What clients have sent cannot be written.
        """
        self._raise_failure()
        with self._lock:
            client = self._asked.get(message_id)
        if client is None or not (pending := client.pending[message_id]).is_answered:
            return None
        self.forget([message_id])
        if pending.reply is None or pending.failure or not pending.reply.message.has_content():
            return flower.failed(pending.asked, pending.failure or CLIENT_FAILED)
        if pending.asked.metadata.message_type != MessageType.QUERY:
            client.standing = HAS_WORKED
        # Who answers what is known from the message; the client's own word on it does not count.
        return Message(pending.reply.content(), reply_to=pending.asked)

    def forget(self, message_ids: Iterable[str]) -> None:
        """Drop messages, with their replies."""
        with self._lock:
            for message_id in message_ids:
                client = self._asked.pop(message_id, None)
                if client is not None:
                    del client.pending[message_id]

    def fail(self, error: BaseException) -> None:
        """Have the rounds raise an error of the web server's threads."""
        self._failure = error
        self._changed.set()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            with os_errors(self._directory):
                raise self._failure

    def wait(self, seconds: float) -> None:
        """Wait until a reply is there or a client has come or gone, but not longer than so many seconds."""
        if self._changed.wait(seconds):
            self._changed.clear()


def limits_of(sizes: Sequence[int]) -> int:
    """Return how many bytes the tensors of a message may have.

    Args:
        sizes: Bytes of the numbers of each tensor.
    """
    # Each has a header of numpy's beside its numbers, of 128 bytes where its shape is not a long one.
    return sum(size + 1024 for size in sizes)


def head_bytes(most_bytes: int) -> int:
    """Return how many bytes a bare message may have whose tensors have so many: it names each of their pieces."""
    return 2**20 + min(most_bytes // flower.PIECE_BYTES * 80, 15 * 2**20)
