"""Putting a client's reply together from its pieces, with the tensors in a file instead of in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path

from flwr.app import Array, ArrayRecord, Message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_head_values_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry

from fedrag_cli.federated.arrays import FileArray, ScratchFile


class ReplyReader:
    """Reads one reply.

    Args:
        get: Returns an object's content by its id.
        announced: Ids of the objects that the client has announced.
        directory: Where the tensors take their room.
        most_bytes: Largest sum of the tensors' bytes once their pieces are joined; a piece may occur repeatedly.
        most_pieces: Most pieces, each as often as it occurs.
    """

    def __init__(
        self,
        get: Callable[[str], bytes | None],
        announced: Collection[str],
        directory: Path,
        most_bytes: int,
        most_pieces: int,
    ) -> None:
        """Start with nothing read."""
        self._get = get
        self._announced = announced
        self._file = ScratchFile(directory)
        self._most_bytes = most_bytes
        self._pieces_left = most_pieces
        self._known: dict[str, InflatableObject] = {}

    def read(self, reply_id: str) -> Message:
        """Return the reply.

        Raises:
            ValueError: Its bytes are none, or would become too large; hostile bytes may raise other errors too.
            OSError: There is no room for it.
        """
        message = self._object(reply_id)
        if not isinstance(message, Message):
            raise ValueError("It is no message.")
        return message

    def _object(self, object_id: str) -> InflatableObject:
        if object_id not in self._known:
            content = self._content(object_id)
            kind, children, _ = get_object_head_values_from_object_content(content)
            if kind == Array.__qualname__:
                self._known[object_id] = self._array(content, children)
            elif kind == ArrayRecord.__qualname__:
                self._known[object_id] = self._record(content)
            else:
                inflated = {child: self._object(child) for child in children}
                self._known[object_id] = inflatable_class_registry[kind].inflate(content, inflated)
        return self._known[object_id]

    def _record(self, content: bytes) -> ArrayRecord:
        # Flower's own way copies the bytes of each array into memory.
        record = ArrayRecord()
        for name, object_id in json.loads(get_object_body(content, ArrayRecord)).items():
            array = self._object(object_id)
            if not isinstance(array, Array):
                raise ValueError("A record of arrays holds something else.")
            record[name] = array
        return record

    def _array(self, content: bytes, children: list[str]) -> FileArray:
        described = json.loads(get_object_body(content, Array))
        dtype, shape, stype = described["dtype"], described["shape"], described["stype"]
        if not (isinstance(dtype, str) and isinstance(stype, str) and all(isinstance(size, int) for size in shape)):
            raise ValueError("An array is not described.")
        offset = self._file.size
        for piece in described["arraychunk_ids"]:
            self._pieces_left -= 1
            data = get_object_body(self._content(children[int(piece)]), ArrayChunk)
            if self._pieces_left < 0 or self._file.size + len(data) > self._most_bytes:
                raise ValueError("It is too large.")
            self._file.append(data)
        return FileArray(dtype, tuple(shape), stype, self._file, offset, self._file.size - offset)

    def _content(self, object_id: str) -> bytes:
        content = self._get(object_id) if object_id in self._announced else None
        if not content:
            raise ValueError("It names an object that is not there.")
        return content
