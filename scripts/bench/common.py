"""What the benchmarks of speed share: the models and data of the XQuAD configs, and clocks for two sides in turn."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedrag_cli.config import load_config
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.runs.reporting import SilentReporter

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
    return build_rag_system(load_config(CONFIGS / f"xquad-{name}.yaml", overrides), reporter=SilentReporter())


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the wall time of a call in seconds, and what it returned."""
    started = time.perf_counter()
    found = call()
    return time.perf_counter() - started, found


def medians_in_turn(sides: Sequence[Callable[[], Any]], runs: int) -> list[tuple[float, Any]]:
    """Time several calls `runs` times, in turn, so that a slow moment of the machine hits all of them.

    Args:
        sides: The calls.
        runs: How often each is made.

    Returns:
        For each side the median of its wall times in seconds, and what its last call returned.
    """
    seconds: list[list[float]] = [[] for _ in sides]
    found: list[Any] = [None] * len(sides)
    for _ in range(runs):
        for number, side in enumerate(sides):
            taken, found[number] = timed(side)
            seconds[number].append(taken)
    return [(statistics.median(taken), result) for taken, result in zip(seconds, found, strict=True)]


def target(value: float, limit: float) -> str:
    """Return a limit as a table's cell, with a mark where a value misses it."""
    return f"<= {limit}" + ("" if value <= limit else " (missed)")
