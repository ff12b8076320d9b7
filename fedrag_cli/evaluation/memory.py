"""What an evaluation has computed so far, kept in a file so that it goes on after a kill."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedrag_cli.errors import DataError
from fedrag_cli.runs.atomic import os_errors
from fedrag_cli.runs.json_lines import append_line, whole_lines


class EvaluationMemory:
    """Results by kind and key, in memory and, where a path is given, in a file of JSON lines, one a batch.

    Args:
        path: The file; a line that a kill cut off is dropped.

    Raises:
        DataError: The file is damaged.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Read what the file holds."""
        self._values: dict[tuple[str, str], Any] = {}
        self._path = path
        if path is not None and path.exists():
            with os_errors(path):
                self._read(path)

    def get(self, kind: str, key: str) -> Any:
        """Return a result, or None where it was not computed yet."""
        return self._values.get((kind, key))

    def put(self, kind: str, values: Mapping[str, Any]) -> None:
        """Keep one batch of results of a kind."""
        self._values.update({(kind, key): value for key, value in values.items()})
        if self._path is None:
            return
        with os_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self._path, {"kind": kind, "values": values})

    def _read(self, path: Path) -> None:
        try:
            for line in whole_lines(path):
                record = json.loads(line)
                self._values.update({(record["kind"], key): value for key, value in record["values"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"'{path}', which holds the evaluation so far, is damaged: {error}",
                "Remove the file; the questions are evaluated anew.",
            ) from error
