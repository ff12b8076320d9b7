"""Run every benchmark, one after the other, so that RESULTS.md is written anew.

    python scripts/bench/all.py DATA_FOLDER [--only NAME ...]

DATA_FOLDER holds corpus.jsonl, train.jsonl, validation.jsonl and test.jsonl of the English part of XQuAD. Those of
speed take minutes each, the last four together some hours.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
DATA = "DATA_FOLDER"
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "startup": ("startup.py",),
    "search": ("search.py",),
    "index-build": ("index_build.py", f"{DATA}/corpus.jsonl"),
    "scoring": ("scoring.py", DATA),
    "scoring-fast": ("scoring.py", DATA, "--precision", "fast"),
    "training-step": ("training_step.py", DATA),
    "memory": ("memory.py", DATA),
    "federation-overhead": ("federation_overhead.py",),
    "federation-traffic": ("federation_traffic.py",),
    "hybrid": ("hybrid.py", "--xquad", DATA),
    "objectives-retriever": ("objectives.py", DATA, "retriever"),
    "objectives-generator": ("objectives.py", DATA, "generator"),
    "federation-lsr": ("federation.py", DATA, "lsr"),
    "federation-ralt": ("federation.py", DATA, "ralt"),
}


def main() -> int:
    """Parse the command line, run, and return how many benchmarks failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS), metavar="NAME")
    options = parser.parse_args()
    failed = []
    for name in options.only:
        script, *arguments = BENCHMARKS[name]
        given = [argument.replace(DATA, str(options.data.resolve())) for argument in arguments]
        started = time.monotonic()
        print(f"{name}: started", file=sys.stderr, flush=True)
        if subprocess.run([sys.executable, str(HERE / script), *given], check=False).returncode:
            failed.append(name)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
