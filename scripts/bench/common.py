"""What the benchmarks share: models and data of the XQuAD configs, memory, and figures in RESULTS.md."""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedrag_cli.rag.system import RAGSystem

RESULTS = Path(__file__).with_name("RESULTS.md")
HEAD = "# Benchmark results\n\nEach section is written by the script that it names.\n"
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "benchmarks"


def prepare_data(data: Path, target: Path) -> None:
    """Copy the data, with validation and test in one file, and let the configs find it."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("corpus", "train", "validation", "test"):
        (target / f"{name}.jsonl").write_bytes((data / f"{name}.jsonl").read_bytes())
    both = "".join((target / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("validation", "test"))
    (target / "validation-and-test.jsonl").write_text(both, encoding="utf-8")
    os.environ["FEDRAG_XQUAD"] = str(target)


def build_system(name: str, *overrides: str) -> RAGSystem:
    """Build the RAG system of `configs/benchmarks/xquad-NAME.yaml`; see `prepare_data`."""
    # Here, because what measures a process' memory must not have the models' libraries in it.
    from fedrag_cli.config import load_config
    from fedrag_cli.rag.build import build_rag_system
    from fedrag_cli.runs.reporter import SilentReporter

    return build_rag_system(load_config(CONFIGS / f"xquad-{name}.yaml", overrides), reporter=SilentReporter())


def resident(name: str) -> int:
    """Return the bytes of this process that are resident now (VmRSS), or were at most (VmHWM), as Linux tells them."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


def target(value: float, limit: float) -> str:
    """Return a limit as a table's cell, with a mark where a value misses it."""
    return f"<= {limit}" + ("" if value <= limit else " (missed)")


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
