"""Measure the scoring of answers against single forward passes with full logits, and write RESULTS.md.

    python scripts/bench/scoring.py DATA_FOLDER [--passages 24] [--precision weights|fast]

Questions are the training questions of XQuAD, each with the 8 passages that the untuned retriever finds. A sample takes
all pairs of every n-th passage, because it is the recurrence of passages that is to be used. In the second row the
passages that follow in the corpus stand behind each, until a pair has 300 to 400 tokens. The third scores all pairs of
the sample five times through a cache on disk, and the fourth with a new scorer over the same cache, as a resumed run
does.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from common import machine, write_section
from torch import Tensor

from fedrag_cli.commands.run_data import load_run_data
from fedrag_cli.config import load_config
from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.trainers.huggingface.scoring import LikelihoodScorer

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "benchmarks" / "xquad-lsr.yaml"
TOP_K, EPOCHS = 8, 5
SHORTEST, LONGEST = 300, 400
Pair = tuple[Example, Sequence[KnowledgeNode]]


def main() -> None:
    """Parse the command line, run, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--passages", type=int, default=24, help="passages of a sample")
    parser.add_argument("--precision", choices=("weights", "fast"), default="weights")
    options = parser.parse_args()
    os.environ["FEDRAG_XQUAD"] = str(options.data.resolve())
    config = load_config(CONFIG, [f"rag_system.generator.precision={options.precision}", "dataset.test=null"])
    data = load_run_data(config)
    rag_system = build_rag_system(config, nodes=data.nodes)
    by_passage = found_pairs(rag_system, data.train)
    text = table(rag_system, by_passage, options.passages)
    print(text)
    write_section(f"Scoring of answers, precision {options.precision}", text)


def found_pairs(rag_system: RAGSystem, examples: Sequence[Example]) -> list[list[Pair]]:
    """Return all pairs of a question and a passage that is found for it, a list a passage."""
    pairs: dict[str, list[Pair]] = {}
    for example, found in zip(
        examples, rag_system.batch_retrieve([example.query for example in examples], TOP_K), strict=True
    ):
        for scored in found:
            pairs.setdefault(scored.node.id, []).append((example, [scored.node]))
    return list(pairs.values())


def lengthened(rag_system: RAGSystem, pairs: Sequence[Pair]) -> list[Pair]:
    """Put the passages that follow in the corpus behind each, and keep the pairs that have 300 to 400 tokens so."""
    nodes, generator = rag_system.knowledge_store.nodes, rag_system.require_generator()
    places = {node.id: place for place, node in enumerate(nodes)}
    found: list[Pair] = []
    for example, (first,) in pairs:
        context, length = [first], length_of(generator, (example, [first]))
        for node in nodes[places[first.id] + 1 :]:
            if length >= SHORTEST:
                break
            context.append(node)
            length = length_of(generator, (example, context))
        if SHORTEST <= length <= LONGEST:
            found.append((example, context))
    return found


def table(rag_system: RAGSystem, by_passage: list[list[Pair]], passages: int) -> str:
    """Measure all rows and write them as a Markdown table."""
    generator = rag_system.require_generator()
    every = max(1, len(by_passage) // passages)
    groups = by_passage[::every][:passages]
    sample = [pair for group in groups for pair in group]
    long = lengthened(rag_system, [pair for group in groups[: passages // 2] for pair in group])
    rows = [
        "| what | pairs | tokens a pair | peer, s | fedrag, s | ratio | target | largest difference |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        compared(generator, "all pairs of a sample of passages, against single forwards", sample, "<= 0.40"),
        compared(generator, "the same with 300 to 400 tokens", long, "<= 0.75"),
        *cached(generator, sample),
    ]
    facts = (
        f"`python scripts/bench/scoring.py DATA_FOLDER --passages {passages} "
        f"--precision {generator.config.precision}`, config `configs/benchmarks/xquad-lsr.yaml`, "
        f"{torch.get_num_threads()} threads. A passage occurs "
        f"{sum(map(len, by_passage)) / len(by_passage):.1f} times in all pairs."
    )
    return "\n".join([facts, "", *rows, "", machine()])


def compared(generator: CausalLMGenerator, what: str, pairs: Sequence[Pair], target: str) -> str:
    """Return the row of scoring against single forward passes; their halves alternate."""
    middle = len(pairs) // 2
    peer = own = difference = 0.0
    scorer = LikelihoodScorer(generator)
    for half in (pairs[:middle], pairs[middle:]):
        started = time.perf_counter()
        single = single_forwards(generator, half)
        peer += time.perf_counter() - started
        started = time.perf_counter()
        totals, _ = scorer.score(half)
        own += time.perf_counter() - started
        difference = max(difference, (totals - single).abs().max().item())
    cells = [len(pairs), f"{tokens(generator, pairs):.0f}", f"{peer:.1f}", f"{own:.1f}", f"{own / peer:.2f}"]
    return f"| {what} | {' | '.join(map(str, cells))} | {target} | {difference:.1e} |"


@torch.inference_mode()
def single_forwards(generator: CausalLMGenerator, pairs: Sequence[Pair]) -> Tensor:
    """Score one sequence at a time, with the logits of all positions."""
    found = []
    for example, nodes in pairs:
        encoded = generator.prompts.encode_pair(example.query, nodes, example.response, with_end=False)
        ids = torch.tensor([encoded.ids + encoded.answer], device=generator.device)
        with torch.autocast(generator.device.type, torch.bfloat16, enabled=generator.computes_in_bfloat16):
            logits = generator.model(input_ids=ids).logits
        log_probs = torch.log_softmax(logits[0, :-1].float(), dim=-1)
        found.append(log_probs.gather(1, ids[0, 1:, None])[len(encoded.ids) - 1 :].sum().cpu())
    return torch.stack(found)


def cached(generator: CausalLMGenerator, pairs: Sequence[Pair]) -> list[str]:
    """Return the rows of five epochs against one, and of a resumed run against one epoch."""
    with tempfile.TemporaryDirectory() as folder:
        scorer, seconds = LikelihoodScorer(generator, Path(folder)), []
        for _ in range(EPOCHS):
            started = time.perf_counter()
            first, _ = scorer.score(pairs)
            seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        again, _ = LikelihoodScorer(generator, Path(folder)).score(pairs)
        resumed = time.perf_counter() - started
    rows = (("five epochs through the cache, against one", sum(seconds), "<= 1.15"), ("a resumed run", resumed, ""))
    difference = (again - first).abs().max().item()
    return [
        f"| {what} | {len(pairs)} | {tokens(generator, pairs):.0f} | {seconds[0]:.1f} | {value:.1f} | "
        f"{value / seconds[0]:.2f} | {target} | {difference:.1e} |"
        for what, value, target in rows
    ]


def tokens(generator: CausalLMGenerator, pairs: Sequence[Pair]) -> float:
    """Return the mean number of tokens of prompts and answers."""
    return sum(length_of(generator, pair) for pair in pairs) / len(pairs)


def length_of(generator: CausalLMGenerator, pair: Pair) -> int:
    """Return the tokens of a prompt and its answer."""
    example, nodes = pair
    encoded = generator.prompts.encode_pair(example.query, nodes, example.response, with_end=False)
    return len(encoded.ids) + len(encoded.answer)


if __name__ == "__main__":
    main()
