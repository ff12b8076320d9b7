"""Packages with an entry point in the group `fedrag.components`, put where Python finds them, as pip does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedrag_cli.registry import registry


def install(folder: Path, name: str, source: str | None = None, *, entry_point: str | None = None) -> Path:
    """Write what a distribution leaves in a folder, and return the folder.

    Its entry point is `register` of the module that is named as it is and has the source, or another one.
    """
    module = name.replace("-", "_")
    information = folder / f"{module}-1.0.dist-info"
    information.mkdir(parents=True)
    if source is not None:
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    entry = f"[fedrag.components]\n{name} = {entry_point or f'{module}:register'}\n"
    (information / "entry_points.txt").write_text(entry, encoding="utf-8")
    return folder


@contextmanager
def installed(folder: Path, name: str, source: str | None = None, *, entry_point: str | None = None) -> Iterator[None]:
    """Let this process see a distribution; see `install`."""
    sys.path.insert(0, str(install(folder, name, source, entry_point=entry_point)))
    registry.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(name.replace("-", "_"), None)
        registry.cache_clear()
