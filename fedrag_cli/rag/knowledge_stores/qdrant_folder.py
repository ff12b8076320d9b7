"""What lies beside an embedded Qdrant in its folder: what the files have to be, and which state this is."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from fedrag_cli.errors import KnowledgeStoreError
from fedrag_cli.rag.knowledge_stores.faults import REBUILD, damaged_store, no_store
from fedrag_cli.rag.knowledge_stores.passages import STORE_FILE, file_fingerprint

FORMAT = "fedrag-qdrant-folder-1"
LOCK_FILE = ".lock"
META_FILE = "meta.json"
"""What the client writes of its collections, by its own name."""


def seal_folder(directory: Path) -> None:
    """Note what a folder holds, after the client that wrote it is closed; it is not written to again."""
    (directory / LOCK_FILE).unlink()
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    about = {
        "format": FORMAT,
        "version": uuid.uuid4().hex,
        "files": {path.relative_to(directory).as_posix(): file_fingerprint(path) for path in files},
    }
    (directory / STORE_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def version_of_folder(directory: Path) -> str:
    """Return what tells this state of a folder from all others, after a look at its files.

    Raises:
        KnowledgeStoreError: The folder holds no store, or a damaged one.
    """
    try:
        about = json.loads((directory / STORE_FILE).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise KnowledgeStoreError(f"The knowledge store in '{directory}' is of another format.", REBUILD)
        for name, fingerprint in about["files"].items():
            if file_fingerprint(directory / name) != fingerprint:
                raise KnowledgeStoreError(
                    f"The knowledge store in '{directory}' is damaged: '{name}' is not as it was written.", REBUILD
                )
        return str(about["version"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise no_store(directory, error, " of Qdrant") from error
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise damaged_store(directory, error) from error
