"""Scoring with common beginnings computed once: the numbers of single forwards, and the batches that are formed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from fedrag_cli.config import PromptConfig
from fedrag_cli.rag.config import CausalLMConfig
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.generators.likelihood import TokenPair
from fedrag_cli.rag.generators.shared_prefix import scoring_batches, shared_prefix_log_probs
from fedrag_cli.trainers.config import LoRAConfig
from fedrag_cli.trainers.huggingface.adapters import add_adapter


def load(folder: Path, **settings: object) -> CausalLMGenerator:
    config = CausalLMConfig(model=str(folder), **settings)  # type: ignore[arg-type]
    return CausalLMGenerator.from_config(config, prompt=PromptConfig(), device="cpu")


def passages_and_questions(passages: int = 5, questions: int = 6, *, seed: int = 1) -> list[TokenPair]:
    """Return prompts of several passages, each with several questions, shuffled, and some that share nothing."""
    numbers = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [numbers.randrange(5, 300) for _ in range(numbers.randint(least, most))]

    pairs = []
    for _ in range(passages):
        passage = ids(20, 40)
        pairs += [(passage + ids(1, 9), ids(1, 5)) for _ in range(questions)]
    pairs += [(ids(1, 30), ids(1, 5)) for _ in range(7)]
    numbers.shuffle(pairs)
    return pairs


def single(generator: CausalLMGenerator, pair: TokenPair) -> list[float]:
    prompt, target = pair
    with torch.no_grad():
        logits = generator.model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    rows: list[float] = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).squeeze(1).tolist()
    return rows


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", ["generator", "gpt2"])
def test_the_numbers_are_those_of_single_forwards(models: dict[str, Path], name: str, adapter: bool) -> None:
    generator = load(models[name])
    if adapter:
        generator.model = add_adapter(generator.model, LoRAConfig(r=4), seed=0)
        with torch.no_grad():
            for key, parameter in generator.model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(0, 0.1)
        generator.model.eval()
    pairs = passages_and_questions()
    found: dict[int, list[float]] = {}
    generator.token_log_probs_of_ids(
        pairs, lambda batch, rows: found.update(zip(batch, (row.tolist() for row in rows), strict=True))
    )
    for position, pair in enumerate(pairs):
        assert found[position] == pytest.approx(single(generator, pair), abs=1e-4), position


def test_common_beginnings_are_computed_once(models: dict[str, Path]) -> None:
    generator, pairs = load(models["generator"]), passages_and_questions()
    tokens = 0

    def count(_module: object, _arguments: object, options: dict[str, torch.Tensor], _output: object) -> None:
        nonlocal tokens
        tokens += options["input_ids"].numel()

    generator.model.register_forward_hook(count, with_kwargs=True)
    generator.log_probs_of_ids(pairs)
    assert tokens < 0.6 * sum(len(prompt) + len(target) for prompt, target in pairs)


def test_batches_hold_every_position_once_within_the_budget() -> None:
    pairs = passages_and_questions(9, 11)
    for budget in (1, 60, 200, 10_000):
        batches = list(scoring_batches(pairs, budget))
        assert sorted(position for batch in batches for position in batch.positions) == list(range(len(pairs)))
        for batch in batches:
            members = [pairs[position] for position in batch.positions]
            rest = max(len(prompt) + len(target) for prompt, target in members) - batch.shared
            assert batch.shared + rest * len(members) <= budget or len(members) == 1
            assert len({tuple(prompt[: batch.shared]) for prompt, _ in members}) == 1
            assert all(batch.shared < len(prompt) for prompt, _ in members)
    grouped = [batch for batch in scoring_batches(pairs, 10_000) if batch.shared]
    assert [len(batch.positions) for batch in grouped] == [11] * 9
    assert list(scoring_batches([], 10)) == []


def test_equal_prompts_keep_their_last_token_out_of_the_common_beginning(models: dict[str, Path]) -> None:
    generator = load(models["generator"])
    pairs = [([7, 8, 9, 10], [11]), ([7, 8, 9, 10], [12, 13]), ([7, 8, 9], [10])]
    batch = next(iter(scoring_batches(pairs, 1000)))
    assert (sorted(batch.positions), batch.shared) == ([0, 1, 2], 2)
    expected = [sum(single(generator, pair)) for pair in pairs]
    assert generator.log_probs_of_ids(pairs).tolist() == pytest.approx(expected, abs=1e-4)


def test_what_a_killed_run_left_forms_the_same_batches() -> None:
    pairs = passages_and_questions(8, 9)
    for budget in (150, 400):
        batches = list(scoring_batches(pairs, budget))
        for done in range(len(batches)):
            finished = {position for batch in batches[:done] for position in batch.positions}
            rest = [position for position in range(len(pairs)) if position not in finished]
            again = [
                [rest[number] for number in batch.positions]
                for batch in scoring_batches([pairs[position] for position in rest], budget)
            ]
            assert again == [batch.positions for batch in batches[done:]]


def test_a_model_that_cannot_share_its_memory_is_scored_the_plain_way(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.cache_utils import DynamicLayer

    from fedrag_cli.rag.generators import shared_prefix

    class OtherLayer(DynamicLayer):
        pass

    generator, pairs = load(models["generator"]), passages_and_questions(2, 4)
    expected = generator.log_probs_of_ids(pairs)
    monkeypatch.setattr(shared_prefix, "DynamicLayer", OtherLayer)
    with torch.no_grad():
        assert shared_prefix_log_probs(generator.model, [([5, 6, 7], [8])], shared=2, pad_id=0) is None
    assert torch.allclose(generator.log_probs_of_ids(pairs), expected, atol=1e-4)
