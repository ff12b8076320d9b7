"""Log-likelihoods of answers: against the model's own loss, for ragged batches, with padding on either side."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedrag_cli.config import PromptConfig
from fedrag_cli.errors import DataError
from fedrag_cli.rag.config import CausalLMConfig
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.generators.likelihood import TokenPair, length_sorted_batches, padded, padding_rule, token_log_probs
from fedrag_cli.trainers.config import LoRAConfig
from fedrag_cli.trainers.huggingface.generator import add_adapter

ARCHITECTURES = ["generator", "gpt2"]


def load(folder: Path, **settings: object) -> CausalLMGenerator:
    config = CausalLMConfig(model=str(folder), **settings)  # type: ignore[arg-type]
    return CausalLMGenerator.from_config(config, prompt=PromptConfig(), device="cpu")


def ragged_pairs(count: int = 9, *, seed: int = 3, vocabulary: int = 300) -> list[TokenPair]:
    numbers = random.Random(seed)
    return [
        (
            [numbers.randrange(5, vocabulary) for _ in range(numbers.randint(1, 30))],
            [numbers.randrange(5, vocabulary) for _ in range(numbers.randint(1, 6))],
        )
        for _ in range(count)
    ]


def loss_times_tokens(model: nn.Module, pair: TokenPair) -> float:
    """Return the log-probability by the model's own loss, for one row without padding."""
    prompt, target = pair
    ids = torch.tensor([prompt + target])
    labels = torch.tensor([[-100] * len(prompt) + target])
    with torch.no_grad():
        return -float(model(input_ids=ids, labels=labels).loss) * len(target)


def by_unshifted_gather(model: nn.Module, pair: TokenPair) -> float:
    """Return what comes out where the logits are read one position late."""
    prompt, target = pair
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) :]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum())


def score(model: nn.Module, pairs: list[TokenPair], pad_id: int = 0) -> Tensor:
    with torch.no_grad():
        return torch.stack([row.sum() for row in token_log_probs(model, pairs, pad_id=pad_id)])


def score_on_the_left(model: nn.Module, pairs: list[TokenPair], pad_id: int = 0) -> Tensor:
    """Return the same from rows that are padded on the left, as the model wants them in training."""
    rule = padding_rule(model, pad_id)
    assert rule.on_left
    ids, mask, _ = padded(pairs, pad_id, "left")
    with torch.no_grad():
        log_probs = model(input_ids=ids, attention_mask=mask, **rule.positions(mask)).logits.log_softmax(-1)
    targets = [torch.tensor(target) for _, target in pairs]
    rows = [row[-len(target) - 1 : -1] for row, target in zip(log_probs, targets, strict=True)]
    return torch.stack([row.gather(1, ids[:, None]).sum() for row, ids in zip(rows, targets, strict=True)])


SIDES = [score, score_on_the_left]


class LogitShapes:
    """Keeps the shapes of the logits that a model's forward returns."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        model.register_forward_hook(lambda _module, _args, output: self.shapes.append(tuple(output.logits.shape)))


@pytest.mark.parametrize("scored", SIDES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_row_of_a_ragged_batch_equals_the_models_own_loss(
    models: dict[str, Path], name: str, scored: Callable[..., Tensor]
) -> None:
    model, pairs = load(models[name]).model, ragged_pairs()
    expected = [loss_times_tokens(model, pair) for pair in pairs]
    assert scored(model, pairs).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_unshifted_gather_would_be_far_off(models: dict[str, Path], name: str) -> None:
    model, pairs = load(models[name]).model, ragged_pairs()
    late = torch.tensor([by_unshifted_gather(model, pair) for pair in pairs])
    difference = (late - score(model, pairs)).abs()
    assert difference.min() > 1e-2
    assert difference.mean() > 0.3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_on_either_side_and_any_padding_token_give_the_same(models: dict[str, Path], name: str) -> None:
    model, pairs = load(models[name]).model, ragged_pairs()
    reference = score(model, pairs)
    for scored in SIDES:
        for pad_id in (0, 7, pairs[0][1][0]):
            assert (scored(model, pairs, pad_id) - reference).abs().max() < 1e-4


def test_left_padding_without_position_ids_would_differ_on_gpt2(models: dict[str, Path]) -> None:
    model = load(models["gpt2"]).model
    pairs: list[TokenPair] = [([9, 10, 11], [12, 13]), (list(range(20, 50)), [14, 15])]
    ids, mask = torch.zeros((1, 32), dtype=torch.long), torch.zeros((1, 32), dtype=torch.long)
    ids[0, 27:], mask[0, 27:] = torch.tensor([9, 10, 11, 12, 13]), 1
    plain_positions = torch.arange(32)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=plain_positions).logits[0, 29:31]
    without = float(logits.log_softmax(-1).gather(1, torch.tensor([[12], [13]])).sum())
    ours = float(score_on_the_left(model, pairs)[0])
    assert ours == pytest.approx(loss_times_tokens(model, pairs[0]), abs=1e-4)
    assert abs(without - ours) > 1e-2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_ragged_batch_equals_one_row_at_a_time(models: dict[str, Path], name: str) -> None:
    model, pairs = load(models[name]).model, ragged_pairs()
    single = torch.cat([score(model, [pair]) for pair in pairs])
    assert torch.allclose(score(model, pairs), single, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_probabilities_of_all_one_token_continuations_sum_to_one(models: dict[str, Path], name: str) -> None:
    generator = load(models[name])
    pairs: list[TokenPair] = [([5, 17, 40, 9], [token]) for token in range(generator.model.config.vocab_size)]
    total = generator.log_probs_of_ids(pairs).double().exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-5)


def test_chain_rule_a_long_target_is_the_sum_of_its_parts(models: dict[str, Path]) -> None:
    generator = load(models["generator"])
    whole, first, second = generator.log_probs_of_ids(
        [([5, 6, 7], [8, 9, 10, 11]), ([5, 6, 7], [8, 9]), ([5, 6, 7, 8, 9], [10, 11])]
    ).tolist()
    assert whole == pytest.approx(first + second, abs=1e-4)


def test_only_the_needed_logits_are_computed(models: dict[str, Path]) -> None:
    for name in ARCHITECTURES:
        generator = load(models[name])
        spy = LogitShapes(generator.model)
        prompt = list(range(10, 110))
        score(generator.model, [(prompt, [5, 6, 7]), (prompt[:98], [5, 6])])
        # Right padding: the shorter row's first needed position is 97, of 103.
        assert spy.shapes[-1][:2] == (2, 103 - 97)


def test_needed_logits_only_with_an_adapter_too(models: dict[str, Path]) -> None:
    generator = load(models["generator"])
    generator.model = add_adapter(generator.model, LoRAConfig(r=2, alpha=4.0), seed=0).eval()
    spy = LogitShapes(generator.model.get_base_model())
    score(generator.model, [(list(range(10, 60)), [5])])
    assert spy.shapes[0][:2] == (1, 2)


@pytest.mark.parametrize("scored", SIDES)
def test_an_adapter_changes_nothing_until_it_is_tuned_and_is_scored_once_it_is(
    models: dict[str, Path], scored: Callable[..., Tensor]
) -> None:
    generator, pairs = load(models["generator"]), ragged_pairs()
    plain = scored(generator.model, pairs)
    generator.model = add_adapter(generator.model, LoRAConfig(r=2, alpha=4.0), seed=0).eval()
    assert torch.allclose(scored(generator.model, pairs), plain, atol=1e-5)
    with torch.no_grad():
        for name, parameter in generator.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    tuned = scored(generator.model, pairs)
    assert (tuned - plain).abs().min() > 1e-3
    assert tuned.tolist() == pytest.approx([loss_times_tokens(generator.model, pair) for pair in pairs], abs=1e-4)


def test_scoring_ignores_dropout_and_leaves_the_mode_and_the_gradients_alone(models: dict[str, Path]) -> None:
    generator, pairs = load(models["generator"]), ragged_pairs()
    generator.model = add_adapter(generator.model, LoRAConfig(r=2, alpha=4.0, dropout=0.9), seed=0)
    with torch.no_grad():
        for name, parameter in generator.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    generator.model.train()
    first, second = generator.log_probs_of_ids(pairs), generator.log_probs_of_ids(pairs)
    assert torch.equal(first, second)
    assert generator.model.training
    assert not first.requires_grad
    assert all(parameter.grad is None for parameter in generator.model.parameters())


def test_bfloat16_is_near_float32_but_another_number(models: dict[str, Path]) -> None:
    pairs: list[TokenPair] = [(prompt, target[:2]) for prompt, target in ragged_pairs()]
    exact = load(models["generator"]).log_probs_of_ids(pairs)
    rounded = load(models["generator"], precision="bfloat16").log_probs_of_ids(pairs)
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).abs().max() < 0.2


# target_log_probs, log_probs_of_ids


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_target_log_probs_of_texts_equal_those_of_their_ids(models: dict[str, Path], name: str) -> None:
    generator = load(models[name])
    prompts = ["the colour of the cat is", "where ?", "what is the colour of the owl : "]
    targets = [" red", " in the barn .", "blue"]
    ids = [generator.tokenizer(prompt + target)["input_ids"] for prompt, target in zip(prompts, targets, strict=True)]
    # The blank before "blue" is one token with it, which the model writes after ":".
    starts = [len(generator.tokenizer(prompt.rstrip())["input_ids"]) for prompt in prompts]
    pairs = [(row[:start], row[start:]) for row, start in zip(ids, starts, strict=True)]
    assert [generator.tokenizer.decode(target) for _, target in pairs] == [" red", " in the barn .", " blue"]
    result = generator.target_log_probs(prompts, targets)
    assert result.shape == (3,)
    assert result.dtype == torch.float32
    assert result.tolist() == pytest.approx([loss_times_tokens(generator.model, pair) for pair in pairs], abs=1e-4)


def test_a_token_budget_of_one_scores_row_by_row(models: dict[str, Path]) -> None:
    pairs = ragged_pairs(5)
    wide, narrow = load(models["generator"]), load(models["generator"], batch_tokens=1)
    spy = LogitShapes(narrow.model)
    assert torch.allclose(narrow.log_probs_of_ids(pairs), wide.log_probs_of_ids(pairs), atol=1e-5)
    # The first calls are the trial of whether the model can be packed. Each row stands alone, filled up to 8 columns.
    assert len(spy.shapes) == 9
    assert all(len(target) <= 8 for _, target in pairs)
    assert [tuple(shape[:2]) for shape in spy.shapes[-5:]] == [(1, 8)] * 5


def test_batches_are_reported_with_their_positions(models: dict[str, Path]) -> None:
    generator, pairs = load(models["generator"], batch_tokens=40), ragged_pairs(7)
    seen: dict[int, float] = {}
    result = generator.log_probs_of_ids(
        pairs, on_batch=lambda batch, values: seen.update(zip(batch, values.tolist(), strict=True))
    )
    assert [seen[position] for position in range(7)] == result.tolist()


def test_no_rows_give_no_results(models: dict[str, Path]) -> None:
    assert load(models["generator"]).target_log_probs([], []).shape == (0,)


def test_lists_of_unequal_length_are_refused_with_both_numbers(models: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="2 prompts but 1 targets"):
        load(models["generator"]).target_log_probs(["a", "b"], ["c"])


def test_an_empty_target_is_refused_by_row(models: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="Row 1 has no target tokens"):
        load(models["generator"]).target_log_probs(["a", "b"], ["c", ""])


def test_an_empty_prompt_is_refused_by_row(models: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="Row 0 has no prompt tokens"):
        load(models["generator"]).target_log_probs(["", "b"], ["c", "d"])


def test_a_row_over_the_context_window_is_refused_and_one_that_fills_it_is_not(models: dict[str, Path]) -> None:
    generator = load(models["gpt2"], context_window=20)
    assert torch.isfinite(generator.log_probs_of_ids([(list(range(10, 28)), [5, 6])])).all()
    with pytest.raises(DataError, match="Row 1 has 21 tokens, but the context window has 20"):
        generator.log_probs_of_ids([([5], [6]), (list(range(10, 29)), [5, 6])])


# length_sorted_batches


@pytest.mark.parametrize("budget", [1, 7, 30, 64, 1000])
def test_batches_hold_every_position_once_within_the_budget(budget: int) -> None:
    numbers = random.Random(budget)
    lengths = [numbers.randint(1, 40) for _ in range(200)]
    batches = list(length_sorted_batches(lengths, budget))
    assert sorted(position for batch in batches for position in batch) == list(range(200))
    for batch in batches:
        padded = max(lengths[position] for position in batch) * len(batch)
        assert padded <= budget or len(batch) == 1
    assert batches == list(length_sorted_batches(lengths, budget))
    flat = [lengths[position] for batch in batches for position in batch]
    assert flat == sorted(lengths, reverse=True)


def test_batches_are_filled_as_far_as_the_budget_goes() -> None:
    assert list(length_sorted_batches([3, 5, 5, 2, 1], 10)) == [[1, 2], [0, 3, 4]]


def test_what_exceeds_the_budget_is_a_batch_by_itself() -> None:
    assert list(length_sorted_batches([4, 99, 4], 8)) == [[1], [0, 2]]


def test_the_rest_after_any_batch_forms_the_same_batches() -> None:
    numbers = random.Random(5)
    lengths = [numbers.randint(1, 40) for _ in range(60)]
    batches = list(length_sorted_batches(lengths, 90))
    for done in range(len(batches)):
        finished = {position for batch in batches[:done] for position in batch}
        rest = [position for position in range(60) if position not in finished]
        again = [[rest[i] for i in batch] for batch in length_sorted_batches([lengths[i] for i in rest], 90)]
        assert again == batches[done:]


def test_no_lengths_make_no_batches() -> None:
    assert list(length_sorted_batches([], 10)) == []
