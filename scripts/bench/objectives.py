"""Measure every objective on the English part of XQuAD, and write the figures to RESULTS.md.

    python scripts/bench/objectives.py DATA_FOLDER [retriever|generator ...] [--work FOLDER]

Each objective trains with its shipped config, `configs/benchmarks/xquad-NAME.yaml`, from the same untuned models. The
retriever is measured over validation and test together (n = 490), because no choice is made on validation; the
generator on test (n = 340). What a former call has finished in the same folder is used again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from common import machine, prepare_data, write_section

from fedrag_cli.commands.run_data import load_run_data
from fedrag_cli.config import load_config
from fedrag_cli.evaluation.comparison import Comparison, Evaluated, compare
from fedrag_cli.evaluation.evaluator import evaluate
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.runs.reporter import SilentReporter
from fedrag_cli.trainer_managers.build import build_manager

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "benchmarks"
UNTUNED = "untuned"
OBJECTIVES = {
    "retriever": ("lsr", "pdist", "emdr2", "contrastive"),
    "generator": ("ralt", "raft", "alternating"),
}
METRICS = {
    "retriever": ("mrr", "recall@1", "recall@5", "ndcg@10"),
    "generator": ("mrr", "recall@1", "exact_match", "f1"),
}


def main() -> None:
    """Parse the command line, run, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument(
        "sides", nargs="*", default=list(OBJECTIVES), metavar="SIDE", help="retriever, generator or both"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/bench-objectives"))
    options = parser.parse_args()
    if set(options.sides) - set(OBJECTIVES):
        parser.error(f"the sides are {' and '.join(OBJECTIVES)}")
    prepare_data(options.data.resolve(), options.work.resolve() / "data")
    for side in options.sides:
        found = {name: measured(side, name, options.work.resolve()) for name in (UNTUNED, *OBJECTIVES[side])}
        text = table(side, found)
        print(text)
        write_section(f"XQuAD, objectives of the {side}", text)


def measured(side: str, name: str, work: Path) -> dict[str, Any]:
    """Train with an objective and measure, or return what a former call has found.

    Args:
        side: retriever or generator.
        name: The objective, or `untuned`.
        work: Where results and likelihoods are kept.

    Returns:
        The records of the questions, the steps and the seconds of the training.
    """
    finished = work / side / f"{name}.json"
    if finished.exists():
        known: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        return known
    config = load_config(CONFIGS / f"xquad-{OBJECTIVES[side][0] if name == UNTUNED else name}.yaml")
    data = load_run_data(config)
    rag_system = build_rag_system(config, nodes=data.nodes, reporter=SilentReporter())
    steps, seconds = 0, 0.0
    if name != UNTUNED:
        manager = build_manager(config, rag_system, train=data.train, validation=[])
        for trainer in manager.trainers.values():
            if trainer is not None:
                trainer.cache_directory = work / "likelihoods"
        started = time.monotonic()
        steps = manager.train().steps
        seconds = time.monotonic() - started
    evaluation = evaluate(rag_system, data.evaluation, METRICS[side], config.evaluation)
    found = {"predictions": evaluation.predictions, "steps": steps, "seconds": seconds}
    finished.parent.mkdir(parents=True, exist_ok=True)
    finished.write_text(json.dumps(found), encoding="utf-8")
    return found


def table(side: str, found: dict[str, dict[str, Any]]) -> str:
    """Write all objectives as a Markdown table, with paired differences to the untuned models."""
    settings = load_config(CONFIGS / f"xquad-{OBJECTIVES[side][0]}.yaml").evaluation
    untuned = Evaluated(UNTUNED, found[UNTUNED]["predictions"])
    comparisons = {name: compare(untuned, Evaluated(name, row["predictions"]), settings) for name, row in found.items()}
    rows = [
        "| objective | steps | seconds | " + " | ".join(METRICS[side]) + " |",
        "| --- | ---: | ---: |" + " --- |" * len(METRICS[side]),
    ]
    for name, comparison in comparisons.items():
        cells = [_cell(comparison, metric, name) for metric in METRICS[side]]
        rows.append(f"| {name} | {found[name]['steps']} | {found[name]['seconds']:.0f} | {' | '.join(cells)} |")
    facts = (
        f"`python scripts/bench/objectives.py DATA_FOLDER {side}`, configs `configs/benchmarks/xquad-NAME.yaml`, "
        f"n = {comparisons[UNTUNED].questions}: mean, and the paired difference to untuned with its 95 % interval. "
        "Likelihoods that an objective before had computed were used again, so the first one's seconds hold them."
    )
    return "\n".join([facts, "", *rows, "", machine()])


def _cell(comparison: Comparison, metric: str, name: str) -> str:
    item = next(item for item in comparison.differences if item.metric == metric)
    if name == UNTUNED:
        return f"{item.after:.4f}"
    difference = dataclasses.asdict(item.difference)
    return "{after:.4f} ({mean:+.4f} [{low:+.4f}, {high:+.4f}])".format(after=item.after, **difference)


if __name__ == "__main__":
    main()
