"""The file of embeddings: safetensors with one tensor, written and read block by block."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedrag_cli.rag.knowledge_stores.vectors import rows_at_once

_TENSOR = "embeddings"
_FORMATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _FORMATS.items()}
_LENGTH = 8


@dataclass(frozen=True)
class EmbeddingsFile:
    """What a file of embeddings says of itself.

    Args:
        path: The file.
        metadata: Texts by names.
        rows: How many embeddings it holds.
        dimension: How many numbers each has.
        dtype: Their number format.
        offset: Where they begin, in bytes.
    """

    path: Path
    metadata: dict[str, str]
    rows: int
    dimension: int
    dtype: torch.dtype
    offset: int

    @classmethod
    def open(cls, path: Path) -> EmbeddingsFile:
        """Look at a file without reading its embeddings.

        Raises:
            SafetensorError: It is damaged.
            ValueError: It holds something other than embeddings.
            OSError: It cannot be read.
        """
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            if names != [_TENSOR]:
                raise ValueError(f"it holds {names} in the place of {_TENSOR}")
            found = file.get_slice(_TENSOR)
            shape, format = found.get_shape(), found.get_dtype()
        if len(shape) != 2 or format not in _FORMATS:
            raise ValueError(f"it holds {format} of the shape {shape}")
        with path.open("rb") as raw:
            offset = _LENGTH + int.from_bytes(raw.read(_LENGTH), "little")
        return cls(path, metadata, shape[0], shape[1], _FORMATS[format], offset)

    def blocks(self) -> Iterator[Tensor]:
        """Read all embeddings in their order, a block at a time, each valid until the next is asked for."""
        step = min(rows_at_once(self.dimension), max(self.rows, 1))
        block = torch.empty((step, self.dimension), dtype=self.dtype)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            for start in range(0, self.rows, step):
                part = block[: min(step, self.rows - start)]
                raw = raw_bytes(part)
                if file.readinto(raw) != len(raw):
                    raise ValueError("it ends early")
                yield part


def write_embeddings(
    path: Path,
    blocks: Iterable[Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> None:
    """Write embeddings as safetensors.

    Args:
        path: The file.
        blocks: Tensors that make up the embeddings, in their order and number format.
        shape: How many there are, and how many numbers each has.
        dtype: Their number format.
        metadata: Texts to keep with them.
    """
    size = shape[0] * shape[1] * dtype.itemsize
    about = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": (0, size)}
    header = json.dumps({"__metadata__": dict(metadata), _TENSOR: about}).encode()
    # The format wants the numbers to begin at a multiple of eight.
    header += b" " * (-len(header) % _LENGTH)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(_LENGTH, "little") + header)
        for block in blocks:
            file.write(raw_bytes(block))


def raw_bytes(embeddings: Tensor) -> memoryview:
    """Return the bytes of embeddings as they lie in memory and in files."""
    array: Any = embeddings.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)
