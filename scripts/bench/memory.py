"""Measure the memory of training runs against the models alone, and write the figures to RESULTS.md.

    python scripts/bench/memory.py DATA_FOLDER [--steps 500]

Every row is a process of its own. The first loads both models and the knowledge store, and runs each model once; the
floor is what is resident then, because reading a GGUF file takes more for a moment. The others train with the
benchmark's settings; their growth is that of the resident memory from a fifth of the steps to the last one, each after
the C library (glibc) gave back what it keeps of freed blocks. Batches are small, so that 500 steps end.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import build_system, machine, prepare_data, resident, write_section

QUIET = ("validation.every=never", "save_every=never", "scheduler=constant", "learning_rate=1e-5")
FEW = "dataset.train.limit=48"
RUNS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "LSR": ("retriever", "lsr", ("batch_size=4", "top_k=4")),
    "RALT, LoRA": ("generator", "ralt", ("batch_size=1",)),
    "RALT, all weights": ("generator", "ralt", ("batch_size=1", "lora=null")),
}
MODELS = "models"
# oneDNN and PyTorch's layer above it keep compiled products by shape, 1024 of them, which grow as new lengths come.
NO_PRODUCTS_KEPT = "LSR, compiled products not kept"
RUNS[NO_PRODUCTS_KEPT] = RUNS["LSR"]
ENVIRONMENT = {NO_PRODUCTS_KEPT: {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16", "LRU_CACHE_CAPACITY": "16"}}
OF_ITS_OWN = {"LSR": 4, NO_PRODUCTS_KEPT: 4, "RALT, LoRA": 4, "RALT, all weights": 3}
"""Numbers a trained weight that training cannot do without: gradient, AdamW's two moments, and the weight itself where
it is not one of the models' (the queries' own copy of the encoder, or an adapter)."""


def main() -> None:
    """Parse the command line, run each row in a process, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        print(json.dumps(measured(options.row, options.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare_data(options.data.resolve(), Path(folder))
        found = {name: in_process(options.data, name, options.steps) for name in (MODELS, *RUNS)}
    text = table(found, options.steps)
    print(text)
    write_section("Memory", text)


def in_process(data: Path, row: str, steps: int) -> dict[str, float]:
    """Measure one row in a new process and return its numbers in bytes."""
    environment = {**os.environ, **ENVIRONMENT.get(row, {})}
    command = [sys.executable, __file__, str(data), "--row", row, "--steps", str(steps)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(row: str, steps: int) -> dict[str, float]:
    """Load or train in this process, and return its peak, its growth and the bytes of the trained weights."""
    if row == MODELS:
        rag_system = build_system("lsr", FEW)
        (found,) = rag_system.batch_retrieve(["Where is the tower?"], 1)
        rag_system.require_generator().target_log_probs(["Where is the tower?"], ["Paris"])
        assert found
        return {"peak": resident("VmHWM"), "resident": resident("VmRSS")}
    side, name, settings = RUNS[row]
    overrides = [f"trainer.{side}.{setting}" for setting in (*QUIET, f"max_steps={steps}", *settings)]
    trainer = trainer_of(side, build_system(name, FEW, *overrides))
    sizes: dict[int, int] = {}

    def on_step(step: int, _last: bool) -> None:
        if step in (steps // 5, steps):
            sizes[step] = in_use()

    trainer._on_step = on_step
    trainer.train()
    trained = sum(tensor.numel() * tensor.element_size() for tensor in trainer.trained_weights().values())
    return {"peak": resident("VmHWM"), "trained": trained, "growth": sizes[steps] - sizes[steps // 5]}


def in_use() -> int:
    """Return the resident bytes without blocks that were freed and that the C library keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def trainer_of(side: str, rag_system: Any) -> Any:
    """Return the trainer of one side."""
    from fedrag_cli.trainers.huggingface import HuggingFaceTrainerForLSR, HuggingFaceTrainerForRALT

    return (HuggingFaceTrainerForLSR if side == "retriever" else HuggingFaceTrainerForRALT)(rag_system)


def table(found: dict[str, dict[str, float]], steps: int) -> str:
    """Write the numbers as a Markdown table, in MB."""
    alone = found[MODELS]["resident"]
    rows = [
        f"`python scripts/bench/memory.py DATA_FOLDER`: {steps} steps each. The floor of a run is what is resident of "
        "the models alone, and what training cannot do without: gradients, AdamW's two moments, and an adapter or the "
        "queries' own encoder. Growth is that of the resident memory after `malloc_trim`, so without freed blocks that "
        "the C library keeps; the peak is with them. What LSR gains are compiled products for lengths of prompts that "
        "it meets for the first time.",
        "",
        f"| what | floor, MB | peak, MB | of the floor | growth from step {steps // 5} to {steps}, MB |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| both models and the knowledge store | {alone / 1e6:.0f} | {found[MODELS]['peak'] / 1e6:.0f} "
        f"| {found[MODELS]['peak'] / alone:.2f} |  |",
    ]
    for name in RUNS:
        floor = alone + OF_ITS_OWN[name] * found[name]["trained"]
        rows.append(
            f"| {name} | {floor / 1e6:.0f} | {found[name]['peak'] / 1e6:.0f} | {found[name]['peak'] / floor:.2f} "
            f"| {found[name]['growth'] / 1e6:+.1f} |"
        )
    return "\n".join([*rows, "", machine()])


if __name__ == "__main__":
    main()
