"""The only module here that knows Flower's internals: its protocol's messages, and how a message becomes bytes.

A message travels in Flower's own form, with the numbers of bytes in the place of its tensors' bytes. These come after
it, one behind the other and cut into pieces whatever tensor they belong to, each under its SHA-256: a line that breaks
costs a piece, and a model of many small tensors takes few requests.
"""

from __future__ import annotations

import hashlib
import weakref
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.app.exception import AppExitException
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives import asymmetric
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fedrag_cli.federated.weights import FileArray, ScratchFile

KEY_HEADER, SIGNATURE_HEADER = FLEET_HTTP_PUBLIC_KEY_HEADER.lower(), FLEET_HTTP_SIGNATURE_HEADER.lower()
ROUTES = ("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "pull-object")
ACTIVATE, DEACTIVATE, HEARTBEAT, PULL_MESSAGES, PUSH_MESSAGES, PULL_OBJECT = (f"/v1/fleet/{name}" for name in ROUTES)
PUSH_OBJECT = "/v1/fleet/push-object"
TYPES: dict[str, tuple[Any, Any]] = {
    ACTIVATE: (fleet_pb2.ActivateNodeRequest, fleet_pb2.ActivateNodeResponse),
    DEACTIVATE: (fleet_pb2.DeactivateNodeRequest, fleet_pb2.DeactivateNodeResponse),
    HEARTBEAT: (heartbeat_pb2.SendNodeHeartbeatRequest, heartbeat_pb2.SendNodeHeartbeatResponse),
    PULL_MESSAGES: (fleet_pb2.PullMessagesRequest, fleet_pb2.PullMessagesResponse),
    PUSH_MESSAGES: (fleet_pb2.PushMessagesRequest, fleet_pb2.PushMessagesResponse),
    PULL_OBJECT: (message_pb2.PullObjectRequest, message_pb2.PullObjectResponse),
    PUSH_OBJECT: (message_pb2.PushObjectRequest, message_pb2.PushObjectResponse),
}
"""What is asked and answered on each route."""
PIECE_BYTES = 512 * 2**10
_SIZE_BYTES = 8


def identify() -> None:
    """Make this process the sender of messages; Flower reads that from here."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message the id that a transport knows it by."""
    message.metadata.__dict__["_message_id"] = message_id


def failed(asked: Message, reason: str) -> Message:
    """Return the reply to a message that nothing usable came back to."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=asked)


class _Tensors:
    """The bytes of the tensors of records, in pieces."""

    def __init__(self, records: list[ArrayRecord]) -> None:
        # Kept, so that no other record takes its place in memory as long as this lives.
        self.records = records
        self._data = [memoryview(array.data) for record in records for array in record.values()]
        self._ends = list(accumulate(len(data) for data in self._data))
        size = self._ends[-1] if self._ends else 0
        self.ids = [hashlib.sha256(self.cut(start)).hexdigest() for start in range(0, size, PIECE_BYTES)]
        self.starts = {object_id: place * PIECE_BYTES for place, object_id in enumerate(self.ids)}

    def cut(self, start: int) -> bytes:
        """Return the piece that begins there."""
        parts, left, number = [], PIECE_BYTES, bisect_right(self._ends, start)
        while left and number < len(self._data):
            data = self._data[number]
            offset = start - (self._ends[number] - len(data))
            parts.append(data[offset : offset + left])
            start, left, number = start + len(parts[-1]), left - len(parts[-1]), number + 1
        return b"".join(parts)


@dataclass(frozen=True)
class Outgoing:
    """A message that can be fetched: the bare message, and its tensors' pieces."""

    head: MessageProto
    tensors: _Tensors

    @property
    def tree(self) -> ObjectTree:
        """The pieces in their order; one that occurs repeatedly is named as often."""
        children = [ObjectTree(object_id=object_id) for object_id in self.tensors.ids]
        return ObjectTree(object_id=self.head.metadata.message_id, children=children)

    def piece(self, object_id: str) -> bytes | None:
        """Return a piece; None where there is none of this name."""
        start = self.tensors.starts.get(object_id)
        return self.tensors.cut(start) if start is not None else None


class Packer:
    """Packs messages; of several that hold the same records the tensors are looked at once."""

    def __init__(self) -> None:
        """Start with nothing packed."""
        self._last: weakref.ref[_Tensors] | None = None

    def pack(self, message: Message, message_id: str) -> Outgoing:
        """Return a message under its id."""
        set_message_id(message, message_id)
        if message.has_error():
            return Outgoing(message_to_proto(message), _Tensors([]))
        records = list(message.content.array_records.values())
        tensors = self._last() if self._last is not None else None
        if tensors is None or [id(record) for record in tensors.records] != [id(record) for record in records]:
            tensors = _Tensors(records)
            self._last = weakref.ref(tensors)
        bare = make_message(message.metadata, _with_arrays(message.content, _sized), None)
        return Outgoing(message_to_proto(bare), tensors)


class UnusableError(ValueError):
    """A message is none, or not as agreed; the reason is in our own words."""


class Incoming:
    """A message that comes in pieces, each of which is held against its name; the tensors lie in a file.

    Args:
        head: The bare message.
        tree: What it announces.
        directory: Where the tensors take their room.
        most_bytes: Largest sum of the tensors' bytes.
    """

    def __init__(self, head: MessageProto, tree: ObjectTree, directory: Path, most_bytes: int) -> None:
        """Look at what is announced.

        Raises:
            UnusableError: It is too large or does not add up; hostile bytes may make Flower raise other errors too.
            OSError: There is no room for a file.
        """
        self.message = message_from_proto(head)
        records = self.message.content.array_records.values() if self.message.has_content() else ()
        arrays = [array for record in records for array in record.values()]
        if any(len(array.data) != _SIZE_BYTES for array in arrays):
            raise UnusableError("it does not say how large its tensors are")
        self._size = sum(int.from_bytes(array.data, "big") for array in arrays)
        if self._size > most_bytes:
            raise UnusableError("it is larger than agreed")
        self._places: dict[str, list[int]] = {}
        for place, child in enumerate(tree.children):
            self._places.setdefault(child.object_id, []).append(place * PIECE_BYTES)
        if len(tree.children) != -(-self._size // PIECE_BYTES):
            raise UnusableError("its pieces do not add up")
        self._missing = set(self._places)
        self._file = ScratchFile(directory) if arrays else None

    @property
    def pieces(self) -> frozenset[str]:
        """The names of all pieces."""
        return frozenset(self._places)

    @property
    def is_complete(self) -> bool:
        """Whether all pieces have come."""
        return not self._missing

    @property
    def missing(self) -> list[str]:
        """The names of the pieces that have not come yet, in their order."""
        return [object_id for object_id in self._places if object_id in self._missing]

    def put(self, object_id: str, content: bytes) -> bool:
        """Keep a piece, and return whether it is what was announced; raises OSError where there is no room for it."""
        places = self._places.get(object_id, [])
        fits = all(len(content) == min(PIECE_BYTES, self._size - place) for place in places)
        if not places or not fits or hashlib.sha256(content).hexdigest() != object_id:
            return False
        assert self._file is not None
        for place in places:
            self._file.write(content, place)
        self._missing.discard(object_id)
        return True

    def content(self) -> RecordDict:
        """Return what has come, once nothing is missing; raises ValueError where it is no content."""
        offset = 0

        def lying_in_file(array: Array) -> Array:
            nonlocal offset
            assert self._file is not None
            size, start = int.from_bytes(array.data, "big"), offset
            offset += size
            return FileArray(array.dtype, array.shape, array.stype, self._file, start, size)

        return _with_arrays(self.message.content, lying_in_file)


def _with_arrays(content: RecordDict, change: Callable[[Array], Array]) -> RecordDict:
    """Return a content with other arrays, in the same order."""
    changed = RecordDict()
    for name, record in content.items():
        changed[name] = record
        if isinstance(record, ArrayRecord):
            # Flower copies the bytes of arrays that it is given at once.
            changed[name] = arrays = ArrayRecord()
            arrays.update({key: change(array) for key, array in record.items()})
    return changed


def _sized(array: Array) -> Array:
    """Return an array with the number of its bytes in their place."""
    return Array(array.dtype, tuple(array.shape), array.stype, len(array.data).to_bytes(_SIZE_BYTES, "big"))
