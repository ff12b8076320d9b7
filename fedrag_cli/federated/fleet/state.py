"""The server's book of clients and messages: Flower's link state in memory, with what a federation needs besides."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterable, Sequence

from flwr.app import Message, RecordDict
from flwr.app.error import Error
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import NodeStatus
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.superlink.config_loader import get_federation_manager

from fedrag_cli.federated.fleet.replies import ReplyReader
from fedrag_cli.federated.fleet.store import PieceStore
from fedrag_cli.federated.grid import Member

MOST_CLIENTS = 1000
# Beside a tensor's chunks: its header, and the few records of a message.
OBJECTS_OF_A_MESSAGE = 64


class FleetState(InMemoryLinkState):
    """Flower's link state in memory.

    Args:
        pieces: Keeps the objects of messages.
        max_message_bytes: Largest reply of a client, all its objects together.
        max_message_objects: Most objects of a reply.
    """

    def __init__(self, pieces: PieceStore, max_message_bytes: int, max_message_objects: int) -> None:
        """Start without clients."""
        super().__init__(get_federation_manager(), pieces)
        self.pieces = pieces
        self._limits = (max_message_bytes, max_message_objects)
        self._sizes: dict[int, int] = {}
        self._node_of_session: dict[str, int] = {}
        self._trees: dict[str, frozenset[str]] = {}
        self._activations: dict[int, int] = {}
        self._sessions: dict[int, str] = {}
        self._guard = threading.Lock()

    def state(self) -> FleetState:
        """Return the state itself, where Flower asks a factory for one."""
        return self

    def allow(self, name: str, public_key: bytes) -> None:
        """Let a key join under a name."""
        if self.get_node_id_by_public_key(public_key) is None:
            super().create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public_key, 30, name=name)

    def create_node(
        self,
        owner_aid: str,
        owner_name: str,
        public_key: bytes,
        heartbeat_interval: float,
        *,
        location: str | None = None,
        name: str | None = None,
    ) -> int:
        """Take a new client in, unless there are too many."""
        if len(self.nodes) >= MOST_CLIENTS:
            raise ValueError("Too many clients")
        return super().create_node(owner_aid, owner_name, public_key, heartbeat_interval, location=location, name=name)

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """Connect a client; one that crashed and comes back need not wait until it is found to be offline."""
        with self.lock:
            self.deactivate_node(node_id)
            activated = super().activate_node(node_id, heartbeat_interval)
            if activated:
                self._activations[node_id] = self._activations.get(node_id, 0) + 1
            return activated

    def note_session(self, public_key: bytes, session: str) -> None:
        """Remember which process speaks for a key from now on."""
        node_id = self.get_node_id_by_public_key(public_key)
        if node_id is not None:
            with self._guard:
                self._sessions[node_id] = session

    def is_session_of(self, node_id: int, session: str) -> bool:
        """Return whether a process is the one that speaks for a client now."""
        with self._guard:
            return bool(session) and self._sessions.get(node_id) == session

    def members(self) -> list[Member]:
        """Return the clients that are connected now."""
        with self.lock:
            online = self.get_node_info(statuses=[NodeStatus.ONLINE])
            return [
                Member(
                    node.node_id,
                    node.name or "",
                    hashlib.sha256(node.public_key).hexdigest()[:12],
                    self._activations.get(node.node_id, 0),
                )
                for node in online
            ]

    def store_message_and_object_tree(
        self, message: Message, object_tree: ObjectTree, session_id: str
    ) -> tuple[bool, list[str]]:
        """Store a message, unless a client announces another reply, or more of it, than it may.

        A client that pushes its reply again, because an object was lost, announces the same objects.
        """
        if message.metadata.reply_to_message_id:
            most = self._limits[1]
            objects = list(itertools.islice((node.object_id for node in iterate_object_tree(object_tree)), most + 1))
            known = self._trees.setdefault(message.metadata.message_id, frozenset(objects))
            fits = len(objects) <= most and object_tree.object_id == message.metadata.message_id
            if not fits or known != frozenset(objects):
                return False, []
            with self._guard:
                self._node_of_session[session_id] = message.metadata.src_node_id
        return super().store_message_and_object_tree(message, object_tree, session_id)

    def store_received(self, run_id: int, session_id: str, object_id: str, content: bytes) -> bool:
        """Store an object of the server's own message, without a limit."""
        with self.lock:
            return super().store_object(run_id, session_id, object_id, content)

    def get_object(self, run_id: int, object_id: str) -> bytes | None:
        """Return an object; all locks are taken in one order, or two threads could wait for each other for ever."""
        with self.lock:
            return super().get_object(run_id, object_id)

    def store_object(self, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        """Store an object of a client's reply, as long as what the client has sent stays below its limit."""
        with self._guard:
            node_id = self._node_of_session.get(session_id)
            if node_id is None:
                return False
            size = self._sizes.get(node_id, 0) + len(object_content)
            # Some objects may come twice, where a connection broke.
            if size > 2 * self._limits[0]:
                return False
            self._sizes[node_id] = size
        with self.lock:
            return super().store_object(run_id, session_id, object_id, object_content)

    def take_reply(self, run_id: int, message_id: str) -> Message | None:
        """Return the reply to a message once all of it is there, and drop both; its tensors stay in a file.

        Raises:
            OSError: There is no room for the file.
        """
        with self.lock:
            reply_id = self.message_ins_id_to_message_res_id.get(message_id)
            reply = self.message_res_store.get(reply_id) if reply_id is not None else None
            asked = self.message_ins_store.get(message_id)
        if reply is None or reply_id is None or asked is None:
            return None
        failure = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "no usable reply")
        answer = Message(failure, reply_to=asked)
        if not reply.has_error():
            announced = self._announced(run_id, reply_id)
            if announced is None:
                return None
            content = self._content(reply_id, announced)
            if content is not None:
                # Who answers what is known from the question; the client's own word on it does not count.
                answer = Message(content, reply_to=asked)
        self.drop([message_id])
        return answer

    def _content(self, reply_id: str, announced: frozenset[str]) -> RecordDict | None:
        """Return the content of a reply; None where its bytes are no message, or would become too large."""
        reader = ReplyReader(self.pieces.get, announced, self.pieces.directory, *self._limits)
        try:
            message = reader.read(reply_id)
            return message.content if message.has_content() else None
        except OSError:
            raise
        except Exception:  # noqa: BLE001  (whatever hostile bytes make Flower raise, there is no usable reply)
            return None

    def drop(self, message_ids: Iterable[str]) -> None:
        """Drop messages, with the replies and the objects that belong to them."""
        for message_id in message_ids:
            with self.lock:
                reply_id = self.message_ins_id_to_message_res_id.get(message_id)
                asked = self.message_ins_store.get(message_id)
            if asked is not None:
                with self._guard:
                    self._sizes.pop(asked.metadata.dst_node_id, None)
            self._trees.pop(reply_id or "", None)
            for object_id in (message_id, reply_id):
                if object_id is not None:
                    self.object_store.delete(object_id)
            self.delete_messages({message_id})

    def _announced(self, run_id: int, reply_id: str) -> frozenset[str] | None:
        """Return the ids of a reply's objects, or None while one is missing."""
        try:
            tree = self.pieces.get_object_tree(reply_id)
        except NoObjectInStoreError:
            return None
        announced = frozenset(node.object_id for node in iterate_object_tree(tree))
        for object_id in announced:
            # Flower looks for pushes that have come to nothing where an object is asked for that is not there.
            if not self.pieces.has(object_id) and not self.get_object(run_id, object_id):
                return None
        return announced


def limits_of(sizes: Sequence[int]) -> tuple[int, int]:
    """Return how many bytes and objects a reply may have.

    Args:
        sizes: Bytes of each tensor that is tuned.
    """
    from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK

    chunks = sum(1 + -(-size // CHUNK) for size in sizes)
    return sum(sizes) + len(sizes) * 1024 + 2**20, 2 * (chunks + len(sizes)) + OBJECTS_OF_A_MESSAGE
