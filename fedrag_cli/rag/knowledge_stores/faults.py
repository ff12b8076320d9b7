"""What is wrong with the files of a store, in words for the end of a sentence."""

from __future__ import annotations

import re
from pathlib import Path

from fedrag_cli.errors import KnowledgeStoreError

REBUILD = "Build it anew with 'fedrag index CONFIG --rebuild'."


def no_store(directory: Path, error: Exception, kind: str = "") -> KnowledgeStoreError:
    """Return the error of a folder that lacks files of a store.

    Args:
        directory: The folder.
        error: What reading it has raised.
        kind: Says whose store was looked for; it begins with a space.
    """
    return KnowledgeStoreError(f"'{directory}' holds no knowledge store{kind}: {fault_of(error)}", REBUILD)


def damaged_store(directory: Path, error: Exception) -> KnowledgeStoreError:
    """Return the error of a folder whose files are not as they were written.

    Args:
        directory: The folder.
        error: What reading it has raised.
    """
    return KnowledgeStoreError(f"The knowledge store in '{directory}' is damaged: {fault_of(error)}", REBUILD)


def fault_of(error: Exception) -> str:
    """Return what an error of reading a store's files says, with a full stop.

    Args:
        error: What the system, a library or the store itself has raised.
    """
    if isinstance(error, OSError):
        # safetensors names the file in its text alone.
        name = Path(str(error.filename or str(error).rpartition(": ")[2])).name
        if isinstance(error, FileNotFoundError):
            return f"'{name}' is missing."
        return f"'{name}' cannot be read ({error.strerror or error})."
    if isinstance(error, KeyError):
        return f"it has no {error}."
    if type(error) is ValueError:
        return sentence(str(error))
    return f"it is not as it was written ({error})."


def sentence(text: str) -> str:
    """Return what a library says with a full stop at its end, and without the system's number in front."""
    text = re.sub(r"^\[Errno -?\d+\] ", "", text)
    return text if text.endswith((".", "!", "?")) else f"{text}."
