"""Scoring in packs: the numbers of single forwards, and the packs that are formed."""

from __future__ import annotations

import copy
import inspect
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fedrag_cli.config import PromptConfig
from fedrag_cli.rag.config import CausalLMConfig
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.generators.likelihood import PACK_TOKENS, TokenPair, can_pack, packs
from fedrag_cli.trainers.config import LoRAConfig
from fedrag_cli.trainers.huggingface.generator import add_adapter


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


def test_packs_come_in_few_lengths(models: dict[str, Path]) -> None:
    generator, pairs = load(models["generator"]), passages_and_questions()
    lengths: set[tuple[int, int]] = set()

    def note(_module: object, _arguments: object, options: dict[str, torch.Tensor], output: Any) -> None:
        lengths.add((options["input_ids"].shape[1], output.logits.shape[1]))

    assert can_pack(generator.model, 40)
    generator.model.register_forward_hook(note, with_kwargs=True)
    for count in range(1, 20):
        generator.token_log_probs_of_ids(pairs[:count], lambda batch, rows: None)
    assert len(lengths) > 5
    assert all(tokens % 8 == rows % 8 == 0 for tokens, rows in lengths)


def test_packs_hold_every_position_once_within_the_budget() -> None:
    pairs = passages_and_questions(9, 11)
    for budget in (1, 60, 200, 10_000):
        found = list(packs(pairs, budget))
        assert sorted(position for pack in found for position in pack) == list(range(len(pairs)))
        for pack in found:
            branches = {tuple(tokens[:depth]) for tokens in _read(pairs, pack) for depth in range(1, len(tokens) + 1)}
            assert len(branches) <= min(budget, PACK_TOKENS) or len(pack) == 1
    assert list(packs([], 10)) == []


def test_a_long_common_beginning_makes_a_larger_pack() -> None:
    passage = [number % 300 + 5 for number in range(PACK_TOKENS)]
    pairs: list[TokenPair] = [([*passage, 9, number], [7] * 10) for number in range(60)]
    # 513 tokens in common, and 10 of each pair.
    assert [len(pack) for pack in packs(pairs, 4096)] == [51, 9]
    assert [len(pack) for pack in packs(pairs, 700)] == [18, 18, 18, 6]


def _read(pairs: list[TokenPair], pack: list[int]) -> list[list[int]]:
    return [pairs[position][0] + pairs[position][1][:-1] for position in pack]


def test_equal_prompts_and_prompts_within_prompts(models: dict[str, Path]) -> None:
    generator = load(models["generator"])
    pairs = [([7, 8, 9, 10], [11]), ([7, 8, 9, 10], [12, 13]), ([7, 8, 9], [10]), ([7], [8, 9, 10]), ([7], [8, 9, 10])]
    assert len(list(packs(pairs, 1000))) == 1
    expected = [sum(single(generator, pair)) for pair in pairs]
    assert generator.log_probs_of_ids(pairs).tolist() == pytest.approx(expected, abs=1e-4)


def test_what_a_killed_run_left_forms_the_same_packs() -> None:
    pairs = passages_and_questions(8, 9)
    for budget in (150, 400):
        found = list(packs(pairs, budget))
        for done in range(len(found)):
            finished = {position for pack in found[:done] for position in pack}
            rest = [position for position in range(len(pairs)) if position not in finished]
            again = [[rest[n] for n in pack] for pack in packs([pairs[position] for position in rest], budget)]
            assert again == found[done:]


def test_models_that_read_masks_or_positions_their_own_way_are_scored_the_plain_way(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, pairs = load(models["generator"]), passages_and_questions(2, 4)
    model = generator.model
    with torch.no_grad():
        assert can_pack(model, 10)
        for name, value in (("layer_types", ["sliding_attention"]), ("sliding_window", 9)):
            with monkeypatch.context() as patch:
                patch.setattr(model.config, name, value, raising=False)
                assert not can_pack(model, 10)
                assert can_pack(model, 9) == (name == "sliding_window")
        expected = generator.log_probs_of_ids(pairs)
        whole = type(model).forward

        def without_positions(self: Any, *arguments: Any, position_ids: Any = None, **options: Any) -> Any:
            return whole(self, *arguments, **options)

        without_positions.__signature__ = inspect.signature(whole)  # type: ignore[attr-defined]
        monkeypatch.setattr(type(model), "forward", without_positions)
        assert not can_pack(model, 10)
    assert torch.allclose(generator.log_probs_of_ids(pairs), expected, atol=1e-4)


ROTARY: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "dynamic": {"factor": 2.0},
    "longrope": {
        "short_factor": [1.0] * 8,
        "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0],
        "original_max_position_embeddings": 32,
        "factor": 4.0,
    },
}


@pytest.mark.parametrize("kind", ROTARY)
def test_rotary_positions_of_every_kind_are_those_of_single_forwards(models: dict[str, Path], kind: str) -> None:
    given = load(models["generator"])
    config = copy.deepcopy(given.model.config)
    config.max_position_embeddings = 128
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, **ROTARY[kind]}
    model = type(given.model)(config)
    model.load_state_dict(given.model.state_dict())
    generator = CausalLMGenerator(model, given.tokenizer, given.config)
    # Of 2 to 55 tokens: some within the length of the training of the models that are stretched, some beyond.
    pairs = passages_and_questions()
    assert {len(prompt) + len(target) > 32 for prompt, target in pairs} == {True, False}
    expected = [sum(single(generator, pair)) for pair in pairs]
    assert generator.log_probs_of_ids(pairs).tolist() == pytest.approx(expected, abs=1e-4)
    assert can_pack(model, 55) == (kind not in ("dynamic", "longrope"))
    prompts = [prompt for prompt, _ in pairs[:9]]
    assert generator.generate_from_ids(prompts) == [generator.generate_from_ids([prompt])[0] for prompt in prompts]
