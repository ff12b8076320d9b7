"""Packages with an entry point in the group `fedrag.components`, put where Python finds them, as pip does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedrag_cli.registry import registry


def install(folder: Path, name: str, entry_point: str) -> Path:
    """Write what a distribution with an entry point (`module:attribute`) leaves in a folder; returns the folder."""
    information = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (information / "entry_points.txt").write_text(f"[fedrag.components]\n{name} = {entry_point}\n", encoding="utf-8")
    return folder


@contextmanager
def installed(folder: Path, name: str, entry_point: str) -> Iterator[None]:
    """Let this process see a distribution whose module can be imported already."""
    sys.path.insert(0, str(install(folder, name, entry_point)))
    registry.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        registry.cache_clear()
