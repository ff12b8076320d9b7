"""Measure the steps of training against bare loops on the same batches, and write the figures to RESULTS.md.

    python scripts/bench/training_step.py DATA_FOLDER [--steps 10] [--runs 3]

Both sides do the same arithmetic: forward, backward, clipping, AdamW. The bare loop gets the batches that the trainer
has collated; the trainer collates, schedules, logs and records besides. Both start from the same weights, in turn.
Lengths are grouped over all instances of an epoch, so that row compares tokens with padding, and the time of steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import build_system, machine, prepare_data, target, write_section
from torch import Tensor, nn

from fedrag_cli.trainers.huggingface import HuggingFaceTrainerForLSR, HuggingFaceTrainerForRALT
from fedrag_cli.trainers.huggingface.base import HuggingFaceTrainer
from fedrag_cli.trainers.huggingface.generator import answer_loss

FULL = "trainer.generator.lora=null"
QUIET = ("validation.every=never", "save_every=never", "precision=float32")


class Steps:
    """Trains for some steps from the weights of now, and keeps batches and seconds of each.

    Args:
        trainer: The trainer; its weights are put back after each run.
    """

    def __init__(self, trainer: HuggingFaceTrainer) -> None:
        """Watch the trainer's batches and steps."""
        self.trainer = trainer
        self.weights = trainer.trained_weights()
        self.batches: list[dict[str, Any]] = []
        self.steps = 0
        self._ends: list[float] = []
        collate = trainer._collate

        def collated(instances: list[Any]) -> dict[str, Any]:
            batch = collate(instances)
            self.batches.append(dict(batch))
            return batch

        trainer._collate = collated  # type: ignore[method-assign]
        trainer._on_step = lambda _step, _last: self._ends.append(time.perf_counter())  # type: ignore[method-assign]

    def train(self) -> list[float]:
        """Return the seconds of each step but the first."""
        self.trainer.load_trained_weights(self.weights)
        self.batches.clear()
        self._ends.clear()
        self.steps = self.trainer.train().steps
        return [after - before for before, after in zip(self._ends, self._ends[1:], strict=False)]

    def bare(self, loss: Callable[[dict[str, Any]], Tensor]) -> list[float]:
        """Return the seconds of each step but the first of a bare loop over the batches of the last training."""
        self.trainer.load_trained_weights(self.weights)
        config, model = self.trainer.config, self.trainer.model
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        model.train()
        seconds = []
        # The trainer collates one batch ahead.
        for batch in self.batches[: self.steps]:
            started = time.perf_counter()
            loss(batch).backward()
            nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
        model.eval()
        return seconds[1:]

    def generator_loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the loss on the answers of a batch of the generator's trainer."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return answer_loss(self.trainer.model(**inputs), batch["labels"])


def generator(steps: int, *overrides: str) -> Steps:
    """Return a trainer of the generator with the benchmark's settings, quiet, in float32, for some steps."""
    settings = [f"trainer.generator.{setting}" for setting in (*QUIET, f"max_steps={steps}", "learning_rate=1e-5")]
    return Steps(HuggingFaceTrainerForRALT(build_system("ralt", *settings, *overrides)))


def retriever(steps: int) -> Steps:
    """Return an LSR trainer with the benchmark's settings on as many examples as the steps take."""
    settings = [f"trainer.retriever.{setting}" for setting in (*QUIET, "epochs=1", "top_k=4")]
    trainer = HuggingFaceTrainerForLSR(build_system("lsr", *settings))
    trainer.train_examples = trainer.train_examples[: steps * trainer.config.batch_size]
    # Likelihoods come from this folder from the second training on.
    trainer.cache_directory = Path(tempfile.mkdtemp())
    return Steps(trainer)


def in_turn(steps: Steps, loss: Callable[[dict[str, Any]], Tensor], runs: int) -> tuple[float, float]:
    """Return the mean seconds of a step of the trainer and of the bare loop, of each step the fastest of all runs."""
    own: list[list[float]] = []
    bare: list[list[float]] = []
    steps.train()
    for _ in range(runs):
        bare.append(steps.bare(loss))
        own.append(steps.train())
    return fastest(own), fastest(bare)


def fastest(runs: list[list[float]]) -> float:
    """Return the mean over the steps of the least time that a run took for the step."""
    return statistics.mean(min(times) for times in zip(*runs, strict=True))


def bare_retriever_loss(steps: Steps) -> Callable[[dict[str, Any]], Tensor]:
    """Return LSR's loss written out: one encoding of the queries, a product with all passages, and two softmaxes."""
    trainer = steps.trainer
    assert isinstance(trainer, HuggingFaceTrainerForLSR)
    store, encoder = trainer.rag_system.knowledge_store, trainer.rag_system.retriever
    config = trainer.config

    def loss(batch: dict[str, Any]) -> Tensor:
        queries = encoder.embed(encoder.query_encoder, batch["features"])
        scores, positions = (queries @ store.embeddings.T).topk(config.top_k, dim=1)
        examples = [trainer.train_examples[number] for number in batch["examples"].tolist()]
        taught = torch.log_softmax(trainer._lm_scores(examples, positions) / config.lm_temperature, dim=1)
        found = torch.log_softmax(scores / config.retriever_temperature, dim=1)
        return nn.functional.kl_div(found, taught, log_target=True, reduction="batchmean")

    return loss


def encodings(steps: Steps) -> float:
    """Return how often the query encoder runs in a step, over one training."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    prepare = steps.trainer._prepare

    def prepared(*arguments: Any) -> Sequence[Any]:
        nonlocal calls
        found = prepare(*arguments)
        calls = 0
        return found

    steps.trainer._prepare = prepared  # type: ignore[method-assign]
    encoder = steps.trainer.rag_system.retriever.query_encoder
    assert isinstance(encoder, nn.Module)
    handle = encoder.register_forward_hook(count)
    taken = len(steps.train()) + 1
    handle.remove()
    return calls / taken


def padding(steps: Steps) -> tuple[int, float]:
    """Return the tokens of the batches, padding included, and the padding's share."""
    masks = [batch["attention_mask"] for batch in steps.batches]
    tokens = sum(mask.numel() for mask in masks)
    return tokens, 1 - sum(int(mask.sum()) for mask in masks) / tokens


def rows(steps: int, runs: int) -> Iterator[str]:
    """Measure, and yield the lines of the table."""
    yield "| what | fedrag, s a step | peer, s a step | ratio | target |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    full = generator(steps, FULL)
    own, bare = in_turn(full, full.generator_loss, runs)
    yield line("RALT, all weights, against a bare loop", own, bare, 1.03)
    adapters = generator(steps)
    lora, bare_lora = in_turn(adapters, adapters.generator_loss, runs)
    yield line("RALT, LoRA, against a bare loop", lora, bare_lora, 1.03)
    yield line("RALT, LoRA against all weights", lora, own, 0.75)
    encoder = retriever(steps)
    own, bare = in_turn(encoder, bare_retriever_loss(encoder), runs)
    yield line("LSR with known likelihoods, against a bare loop", own, bare, 1.03)
    yield f"| LSR: encodings of the queries in a step | {encodings(encoder):g} | 1 |  | 1 |"


def line(what: str, own: float, peer: float, limit: float) -> str:
    """Return a row of the table."""
    return f"| {what} | {own:.3f} | {peer:.3f} | {own / peer:.3f} | {target(own / peer, limit)} |"


def epoch(group: str) -> Steps:
    """Return a trainer of an epoch of 160 questions, grouped by length or in random order."""
    options = [f"group_by_length={group}", "max_steps=null", "epochs=1"]
    return generator(1, *(f"trainer.generator.{option}" for option in options), "dataset.train.limit=160")


def grouped() -> str:
    """Return what grouping by length saves of an epoch's tokens and of the time of its steps."""
    seconds: dict[str, list[float]] = {"false": [], "true": []}
    paddings: dict[str, tuple[int, float]] = {}
    epochs = {group: epoch(group) for group in seconds}
    for _ in range(2):
        for group, steps in epochs.items():
            seconds[group].append(sum(steps.train()))
            paddings[group] = padding(steps)
    (tokens, share), (fewer, less) = paddings["false"], paddings["true"]
    longer, shorter = min(seconds["false"]), min(seconds["true"])
    return (
        f"An epoch of 160 questions in random order has {tokens:,} tokens, {share:.0%} of them padding; grouped by "
        f"length {fewer:,}, {less:.0%} padding. Its steps take {shorter / longer:.2f} of the time ({shorter:.0f} s "
        f"instead of {longer:.0f} s, of each the faster of two epochs)."
    )


def main() -> None:
    """Parse the command line, run, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=10, help="steps of a run (10 by default)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each side, in turn (3 by default)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare_data(options.data.resolve(), Path(folder) / "data")
        facts = (
            f"`python scripts/bench/training_step.py DATA_FOLDER`, float32, settings of "
            f"`configs/benchmarks/xquad-ralt.yaml` and `xquad-lsr.yaml`, {torch.get_num_threads()} threads, mean of "
            f"{options.steps} steps, of each the fastest of {options.runs} runs. Retrieval, scoring and tokenisation "
            "come before the first step."
        )
        text = "\n".join([facts, "", *rows(options.steps, options.runs), "", grouped(), "", machine()])
    print(text)
    write_section("Training steps", text)


if __name__ == "__main__":
    main()
