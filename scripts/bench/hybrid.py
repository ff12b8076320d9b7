"""Measure retrieval by words, by embeddings and by both, untuned and tuned, and write the figures to RESULTS.md.

    python scripts/bench/hybrid.py [--xquad DATA_FOLDER] [--seeds 42 43 44] [--work FOLDER]

The quickstart's questions, and with `--xquad` those of the English part of XQuAD (validation and test together,
n = 490, because no choice is made on validation). Encoders are tuned by contrastive learning with the shipped configs.
What a former call has finished in the same folder is used again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import CONFIGS, machine, prepare_data, write_section

RETRIEVAL = {"dense": "null", "hybrid": "{}"}
OVERRIDES = ["trainer.mode=retriever", "rag_system.generator=null", "evaluation.metrics=[mrr,recall@5]"]


def main() -> None:
    """Parse the command line, run, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--xquad", type=Path)
    parser.add_argument("--seeds", nargs="*", type=int, default=[42, 43, 44])
    parser.add_argument("--work", type=Path, default=Path("runs/bench-hybrid"))
    options = parser.parse_args()
    work = options.work.resolve()
    configs = {"quickstart": CONFIGS.parent / "quickstart.yaml"}
    if options.xquad is not None:
        prepare_data(options.xquad.resolve(), work / "data")
        configs["XQuAD"] = CONFIGS / "xquad-contrastive.yaml"
    rows = [
        "| data | retrieval | untuned | tuned, each seed | mean | to the untuned hybrid, each seed |",
        "| --- | --- | ---: | --- | ---: | --- |",
    ]
    for source, config in configs.items():
        found = {
            name: [_trained(config, lexical, seed, work / source / f"{name}-{seed}.json") for seed in options.seeds]
            for name, lexical in RETRIEVAL.items()
        }
        rows += _rows(source, found)
    text = "\n".join(
        [
            "`python scripts/bench/hybrid.py --xquad DATA_FOLDER`, configs `configs/quickstart.yaml` and "
            "`configs/benchmarks/xquad-contrastive.yaml`: MRR; the last column has paired differences with 95 % "
            "intervals.",
            "",
            *rows,
            "",
            machine(),
        ]
    )
    print(text)
    write_section("Hybrid retrieval", text)


def _trained(config: Path, lexical: str, seed: int, finished: Path) -> dict[str, Any]:
    """Train in a process of its own, and return the part of the summary that holds it against untuned retrieval."""
    if not finished.exists():
        overrides = [*OVERRIDES, f"rag_system.lexical={lexical}", f"run.seed={seed}"]
        command = [sys.executable, "-W", "ignore", "-m", "fedrag_cli", "train", str(config), *overrides]
        command += [f"run.output_dir={finished.parent / 'runs'}", "--json", "--quiet"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=dict(os.environ))
        finished.parent.mkdir(parents=True, exist_ok=True)
        finished.write_text(json.dumps(json.loads(done.stdout)["untuned"]), encoding="utf-8")
    found: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
    return found


def _rows(source: str, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    first = {row["name"]: row["differences"][0] for row in found["dense"][0]["rows"]}
    rows = [f"| {source} | BM25 | {first['BM25']['before']:.4f} |  |  |  |"]
    for name, runs in found.items():
        items = [next(row for row in run["rows"] if row["name"] == "hybrid")["differences"][0] for run in runs]
        means = [item["after"] for item in items]
        changes = [item["difference"] for item in items]
        told = ", ".join(f"{change['mean']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]" for change in changes)
        each = ", ".join(f"{mean:.4f}" for mean in means)
        rows.append(
            f"| {source} | {name} | {first[name]['before']:.4f} | {each} | {sum(means) / len(means):.4f} | {told} |"
        )
    return rows


if __name__ == "__main__":
    main()
