"""Writing benchmark figures into RESULTS.md, a section a benchmark."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")
HEAD = "# Benchmark results\n\nEach section is written by the script that it names.\n"


def machine() -> str:
    """Return date, processor and versions in one line."""
    model = "unknown processor"
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"model name\s*:\s*(.+)", information.read_text())
        model = found.group(1) if found else model
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "sentence-transformers")
    )
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return f"{date}; {os.cpu_count()} cores of {model}, no GPU; Python {platform.python_version()}, {versions}."


def write_section(title: str, text: str) -> None:
    """Put a section in the place of the one with the same title, or at the end."""
    content = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else HEAD
    parts = re.split(r"(?m)^(?=## )", content)
    section = f"## {title}\n\n{text.strip()}\n\n"
    kept = [
        part if part.endswith("\n\n") else part.rstrip() + "\n\n"
        for part in parts
        if not part.startswith(f"## {title}\n")
    ]
    RESULTS.write_text("".join([*kept, section]).rstrip() + "\n", encoding="utf-8")
