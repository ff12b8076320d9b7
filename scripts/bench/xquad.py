"""Measure LSR and RALT on the English part of XQuAD and write the figures to RESULTS.md.

    python scripts/bench/xquad.py DATA_FOLDER [lsr] [ralt] [--runs FOLDER]

LSR is measured over validation and test together (n = 490), because no choice is made on validation; RALT on test.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from results import machine, write_section

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {"lsr": "xquad-lsr.yaml", "ralt": "xquad-ralt.yaml"}


def run(name: str, data: Path, runs: Path) -> dict[str, Any]:
    """Train with the shipped config and return the run's summary."""
    overrides = [f"run.output_dir={runs}"]
    with tempfile.TemporaryDirectory() as folder:
        if name == "lsr":
            both = Path(folder) / "validation-and-test.jsonl"
            both.write_text("".join((data / f"{split}.jsonl").read_text("utf-8") for split in ("validation", "test")))
            overrides.append(f"dataset.test.path={both}")
        command = [sys.executable, "-m", "fedrag_cli", "train", str(ROOT / "configs" / "benchmarks" / CONFIGS[name])]
        environment = {**os.environ, "FEDRAG_XQUAD": str(data.resolve())}
        done = subprocess.run([*command, *overrides, "--json"], stdout=subprocess.PIPE, env=environment, check=True)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def table(name: str, summary: dict[str, Any]) -> str:
    """Write a run's differences as a Markdown table."""
    rows = [
        "| metric | n | before | after | difference | 95 % interval | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for item in summary["differences"]:
        d = item["difference"]
        rows.append(
            f"| {item['metric']} | {item['n']} | {item['before']:.4f} | {item['after']:.4f} | {d['mean']:+.4f} "
            f"| [{d['low']:+.4f}, {d['high']:+.4f}] | {item['verdict']} |"
        )
    command = f"python scripts/bench/xquad.py DATA_FOLDER {name}"
    config = f"configs/benchmarks/{CONFIGS[name]}"
    facts = f"`{command}`, config `{config}`: {summary['steps']} steps, {summary['seconds']:.0f} s."
    return "\n".join([facts, "", *rows, "", machine()])


def main() -> None:
    """Parse the command line, run, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("names", nargs="*", choices=sorted(CONFIGS), default=sorted(CONFIGS))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    for name in options.names:
        summary = run(name, options.data, options.runs)
        text = table(name, summary)
        print(text)
        write_section(f"XQuAD, {name.upper()}", text)


if __name__ == "__main__":
    main()
