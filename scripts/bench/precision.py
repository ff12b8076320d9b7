"""Measure what bfloat16 does to the language model as a teacher, and write the figures to RESULTS.md.

    python scripts/bench/precision.py [--seeds 3] [--xquad DATA_FOLDER] [--work FOLDER]

The passages of the training questions are scored in float32, in bfloat16 (`precision: bfloat16`, autocast), and in
bfloat16 with the last layer and the softmax in float32. Then the quickstart's retriever is tuned with the likelihoods
of each of the config's precisions, and its MRR is measured on the test split. With --xquad a sample of those questions
is scored too. What a former call has finished in the same folder is used again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import CONFIGS, machine, prepare_data, write_section
from torch import Tensor
from torch.nn import functional

from fedrag_cli.commands.run_data import load_run_data
from fedrag_cli.config import load_config
from fedrag_cli.evaluation.evaluator import evaluate
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.runs.reporter import SilentReporter
from fedrag_cli.trainer_managers.build import build_manager
from fedrag_cli.trainers.huggingface.scoring import LikelihoodScorer

QUICKSTART = CONFIGS.parent / "quickstart.yaml"
LSR = "{type: lsr, top_k: 6, learning_rate: 3.0e-5, epochs: 3, validation: {metric: mrr}}"
FORMATS = {
    "float32": ("weights", False),
    "bfloat16": ("bfloat16", False),
    "bfloat16, last layer in float32": ("bfloat16", True),
}
QUESTIONS = 120
TEMPERATURE = 0.1


def main() -> None:
    """Parse the command line, run, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--xquad", type=Path, metavar="DATA_FOLDER")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-precision"))
    options = parser.parse_args()
    sources = {"quickstart": QUICKSTART}
    if options.xquad is not None:
        prepare_data(options.xquad.resolve(), options.work.resolve() / "data")
        sources["xquad"] = CONFIGS / "xquad-lsr.yaml"
    teachers = {
        (source, name): kept(options.work / f"{source}-{number}.json", scored, path, *FORMATS[name])
        for source, path in sources.items()
        for number, name in enumerate(FORMATS)
    }
    tuned = {
        name: [
            kept(options.work / f"tuned-{name}-{seed}.json", mrr, FORMATS[name][0], seed, options.work)
            for seed in range(options.seeds)
        ]
        for name in ("float32", "bfloat16")
    }
    text = table(teachers, tuned)
    print(text)
    write_section("Precision of the teacher", text)


def kept(path: Path, compute: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a file holds, or compute and keep it."""
    if not path.exists():
        found = compute(*arguments)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def scored(path: Path, precision: str, exact_head: bool) -> dict[str, Any]:
    """Score the passages that the untuned retriever finds for the first training questions, one a prompt."""
    config = load_config(path, [f"rag_system.generator.precision={precision}"])
    data = load_run_data(config)
    rag_system = build_rag_system(config, nodes=data.nodes, reporter=SilentReporter())
    examples, top_k = data.train[:QUESTIONS], config.trainer.retriever.top_k
    found = rag_system.batch_retrieve([example.query for example in examples], top_k)
    pairs = [(example, [item.node]) for example, row in zip(examples, found, strict=True) for item in row]
    generator = rag_system.require_generator()
    started = time.process_time()
    with last_layer_in_float32(generator, exact_head):
        totals, lengths = LikelihoodScorer(generator).score(pairs)
    seconds = time.process_time() - started
    shape = (len(examples), top_k)
    return {"totals": totals.view(shape).tolist(), "lengths": lengths.view(shape).tolist(), "seconds": seconds}


@contextmanager
def last_layer_in_float32(generator: CausalLMGenerator, wanted: bool) -> Iterator[None]:
    """Compute the logits from the hidden states in float32, outside of autocast."""
    head = generator.model.get_output_embeddings()

    def exact(hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.float(), head.weight.float(), head.bias)

    if wanted:
        head.forward = exact
    try:
        yield
    finally:
        vars(head).pop("forward", None)


def mrr(precision: str, seed: int, work: Path) -> float:
    """Tune the quickstart's retriever with a teacher of a precision, and return its MRR on the test split."""
    overrides = ["trainer.mode=retriever", f"rag_system.generator.precision={precision}", f"run.seed={seed}"]
    overrides += ["rag_system.lexical=null", f"trainer.retriever={LSR}"]
    config = load_config(QUICKSTART, overrides)
    data = load_run_data(config)
    rag_system = build_rag_system(config, nodes=data.nodes, reporter=SilentReporter())
    manager = build_manager(config, rag_system, train=data.train, validation=data.validation)
    for trainer in manager.trainers.values():
        if trainer is not None:
            trainer.cache_directory = work / "likelihoods"
    manager.train()
    values = evaluate(rag_system, data.evaluation, ("mrr",), config.evaluation).values["mrr"]
    return sum(values) / len(values)


def table(teachers: dict[tuple[str, str], dict[str, Any]], tuned: dict[str, list[float]]) -> str:
    """Write both comparisons as Markdown tables."""
    rows = [
        "| data | format | processor seconds | sum: mean and largest difference | a token: mean difference | "
        "same best passage | pairs in the same order | KL at temperature 0.1: mean, largest |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (source, name), found in teachers.items():
        rows.append(f"| {source} | {name} | {found['seconds']:.0f} | {_compared(found, teachers[source, 'float32'])} |")
    rows += ["", "| format | seeds | MRR of each | mean |", "| --- | ---: | --- | ---: |"]
    for name, values in tuned.items():
        each = ", ".join(f"{value:.4f}" for value in values)
        rows.append(f"| {name} | {len(values)} | {each} | {sum(values) / len(values):.4f} |")
    facts = (
        "`python scripts/bench/precision.py [--xquad DATA_FOLDER]`, config `configs/quickstart.yaml`: the passages of "
        f"{QUESTIONS} training questions, scored in each format and compared with float32; then the quickstart's "
        "retriever, tuned by LSR with each teacher, on its test split."
    )
    return "\n".join([facts, "", *rows, "", machine()])


def _compared(found: dict[str, Any], exact: dict[str, Any]) -> str:
    totals, reference = torch.tensor(found["totals"]), torch.tensor(exact["totals"])
    lengths = torch.tensor(exact["lengths"])
    differences = (totals - reference).abs()
    best = (totals.argmax(dim=1) == reference.argmax(dim=1)).float().mean()
    first, second = torch.triu_indices(totals.shape[1], totals.shape[1], 1)
    signs = [torch.sign(values[:, first] - values[:, second]) for values in (totals, reference)]
    targets, wanted = (torch.log_softmax(values / lengths / TEMPERATURE, dim=1) for values in (totals, reference))
    divergence = (wanted.exp() * (wanted - targets)).sum(dim=1)
    return (
        f"{differences.mean():.4f}, {differences.max():.3f} | {(differences / lengths).mean():.4f} | {best:.4f} | "
        f"{(signs[0] == signs[1]).float().mean():.4f} | {divergence.mean():.4f}, {divergence.max():.3f}"
    )


if __name__ == "__main__":
    main()
