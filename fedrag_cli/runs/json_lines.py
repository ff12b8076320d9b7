"""Files of JSON lines that are only ever appended to; a line counts once its newline is there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def whole_lines(path: Path) -> list[bytes]:
    """Return the complete lines of a file, and remove from its end what a kill cut off.

    Args:
        path: The file.
    """
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return whole.splitlines()


def append_line(path: Path, record: Any) -> None:
    """Append one record, and return when it is on the disk.

    Args:
        path: The file; it is made where it is missing.
        record: Anything that JSON can hold.
    """
    with path.open("ab") as file:
        # Lone surrogates, which UTF-8 cannot hold, become the escapes that JSON has for them.
        file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
        file.flush()
        os.fsync(file.fileno())
