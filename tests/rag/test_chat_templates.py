"""The shapes of much used chat templates, written anew: what the prompt is, which ids the answer has, and its end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
from tiny_tokenizers import tiny_tokenizer

from fedrag_cli.config import PromptConfig
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ModelError
from fedrag_cli.rag.prompts import PromptEncoder

QUESTION = "the cat is red ? which colour"


@dataclass(frozen=True)
class Shape:
    """One template.

    Args:
        template: It.
        prompt: What a model is given, with Q for the user's text.
        answer: What the model writes for `red`, to its end.
        kind: The kind of tokenizer.
        special: Its special tokens.
        plain: Its added tokens that are not special.
        eos: Its end token.
        system: The same prompt with the system message S; empty where the template refuses it.
    """

    template: str
    prompt: str
    answer: str
    kind: str = "byte-level-gpt4"
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    eos: str = "</s>"
    system: str = ""

    def tokenizer(self) -> Any:
        return tiny_tokenizer(self.kind, self.template, self.special, self.plain, self.eos, adds_bos=True)


def turns(start: str, middle: str, end: str, generation: str, before: str = "") -> str:
    """Return a template that writes all roles alike."""
    return (
        f"{before}{{% for m in messages %}}{{{{ '{start}' + m['role'] + '{middle}' }}}}"
        f"{{{{ m['content'].strip() + '{end}' }}}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '{generation}' }}}}{{% endif %}}"
    )


def instructions(before: str, after: str, before_answer: str, after_answer: str) -> str:
    """Return a template with `[INST]` around the user's turns, whose first one holds the system message."""
    return (
        "{% set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}{{ bos_token }}"
        "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}"
        f"{{{{ '{before}' + (system if loop.first else '') + m['content'] + '{after}' }}}}{{% else %}}"
        f"{{{{ '{before_answer}' + m['content'].strip() + '{after_answer}' + eos_token }}}}{{% endif %}}{{% endfor %}}"
    )


CHATML = turns("<|im_start|>", "\\n", "<|im_end|>\\n", "<|im_start|>assistant\\n")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
THOUGHTS = "<think>\\n\\n</think>\\n\\n"
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nbe helpful<|im_end|>\\n' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{{ 'THOUGHTS' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\nGENERATION' }}{% endif %}"
)
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
DEEPSEEK_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
DEEPSEEK = (
    "{{ '<｜begin▁of▁sentence｜>' }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>GENERATION' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
COHERE_TOKENS = ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>")
COHERE = (
    "{% set names = {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'} %}"
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' + names[m['role']] }}"
    "{{ m['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
HARMONY = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] }}"
    "{{ ('<|channel|>final' if m['role'] == 'assistant' else '') + '<|message|>' + m['content'] }}"
    "{{ ('<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)

SHAPES = {
    "llama-2": Shape(
        instructions("[INST] ", " [/INST]", " ", " "),
        "<s>[INST] Q [/INST]",
        " red </s>",
        "sentencepiece-legacy",
        system="<s>[INST] S\n\nQ [/INST]",
    ),
    "llama-3": Shape(
        turns(
            "<|start_header_id|>",
            "<|end_header_id|>\\n\\n",
            "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\\n\\n",
            "{{ '<|begin_of_text|>' }}{% set today = strftime_now('%d %b %Y') if strftime_now is defined else 'now' %}"
            "{{ 'Today Date: ' + today + '\\n\\n' }}",
        ),
        "<|begin_of_text|>Today Date: 26 Jul 2024\n\n<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "red<|eot_id|>",
        special=LLAMA3_TOKENS,
        eos="<|end_of_text|>",
        system="<|begin_of_text|>Today Date: 26 Jul 2024\n\n<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral-1": Shape(
        instructions("[INST] ", " [/INST]", "", ""), "<s>[INST] Q [/INST]", "red</s>", "sentencepiece-legacy"
    ),
    "mistral-2": Shape(
        instructions("[INST] ", " [/INST]", " ", ""), "<s>[INST] Q [/INST]", " red</s>", "sentencepiece"
    ),
    "mistral-3": Shape(
        # With the system message in the last turn, if that is the user's.
        instructions("[INST] ", "[/INST]", " ", "").replace("loop.first", "loop.last"),
        "<s>[INST] Q[/INST]",
        " red</s>",
        "sentencepiece",
        ("[INST]", "[/INST]"),
        system="<s>[INST] S\n\nQ[/INST]",
    ),
    "qwen-2": Shape(
        DEFAULT_SYSTEM + CHATML,
        "<|im_start|>system\nbe helpful<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
        "red<|im_end|>",
        special=CHATML_TOKENS,
        eos="<|im_end|>",
        system="<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    ),
    "smollm-2": Shape(
        DEFAULT_SYSTEM + CHATML,
        "<|im_start|>system\nbe helpful<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
        "red<|im_end|>",
        "byte-level",
        CHATML_TOKENS,
        eos="<|im_end|>",
    ),
    "qwen-3": Shape(
        QWEN3.replace("THOUGHTS", THOUGHTS).replace("GENERATION", ""),
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "red<|im_end|>",
        special=CHATML_TOKENS,
        plain=("<think>", "</think>"),
        eos="<|im_end|>",
        system="<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n",
    ),
    "thoughts in the generation prompt": Shape(
        QWEN3.replace("THOUGHTS", "").replace("GENERATION", THOUGHTS),
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "red<|im_end|>",
        special=CHATML_TOKENS,
        plain=("<think>", "</think>"),
        eos="<|im_end|>",
    ),
    "thoughts opened in the generation prompt": Shape(
        QWEN3.replace("THOUGHTS", THOUGHTS).replace("GENERATION", "<think>\\n"),
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "red<|im_end|>",
        special=CHATML_TOKENS,
        plain=("<think>", "</think>"),
        eos="<|im_end|>",
    ),
    "thoughts opened in brackets": Shape(
        QWEN3.replace("THOUGHTS", "").replace("GENERATION", "[THINK]"),
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n[THINK]\n\n[/THINK]\n\n",
        "red<|im_end|>",
        special=(*CHATML_TOKENS, "[THINK]", "[/THINK]"),
        eos="<|im_end|>",
    ),
    "thoughts by another name": Shape(
        QWEN3.replace("THOUGHTS", "").replace("GENERATION", "<thought>\\n"),
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<thought>\n\n</thought>\n\n",
        "red<|im_end|>",
        special=CHATML_TOKENS,
        plain=("<thought>", "</thought>"),
        eos="<|im_end|>",
    ),
    "gemma": Shape(
        GEMMA,
        "<s><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n",
        "red<end_of_turn>",
        "sentencepiece",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "phi-3": Shape(
        turns("<|", "|>\\n", "<|end|>\\n", "<|assistant|>\\n"),
        "<|user|>\nQ<|end|>\n<|assistant|>\n",
        "red<|end|>",
        "sentencepiece",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"),
        eos="<|endoftext|>",
        system="<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\n",
    ),
    "zephyr": Shape(
        turns("<|", "|>\\n", "</s>\\n", "<|assistant|>\\n"),
        "<|user|>\nQ</s>\n<|assistant|>\n",
        "red</s>",
        "sentencepiece-legacy",
        system="<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\n",
    ),
    "deepseek": Shape(
        DEEPSEEK.replace("GENERATION", ""),
        "<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜>",
        "red<｜end▁of▁sentence｜>",
        special=DEEPSEEK_TOKENS,
        plain=("<｜User｜>", "<｜Assistant｜>"),
        eos="<｜end▁of▁sentence｜>",
        system="<｜begin▁of▁sentence｜>S<｜User｜>Q<｜Assistant｜>",
    ),
    "deepseek-r1": Shape(
        DEEPSEEK.replace("GENERATION", "<think>\\n"),
        "<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜><think>\n\n</think>\n\n",
        "red<｜end▁of▁sentence｜>",
        special=DEEPSEEK_TOKENS,
        plain=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        eos="<｜end▁of▁sentence｜>",
    ),
    "command-r": Shape(
        COHERE,
        "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "red<|END_OF_TURN_TOKEN|>",
        "byte-level",
        (*COHERE_TOKENS, "<|CHATBOT_TOKEN|>"),
        eos="<|END_OF_TURN_TOKEN|>",
    ),
    "vicuna": Shape(VICUNA, "USER: Q ASSISTANT:", " red</s>", "sentencepiece-legacy", system="S USER: Q ASSISTANT:"),
    "harmony": Shape(
        HARMONY,
        "<|start|>user<|message|>Q<|end|><|start|>assistant<|channel|>final<|message|>",
        "red<|return|>",
        special=("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>"),
        eos="<|return|>",
    ),
}
ALL = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def encoder(shape: Shape, **config: Any) -> PromptEncoder:
    return PromptEncoder(shape.tokenizer(), PromptConfig(template="{context} ? {query}", **config), 3000)


def encoded(prompts: PromptEncoder, answer: str = "red", text: str = "which colour") -> tuple[list[int], list[int]]:
    pair = prompts.encode_pair(text, [KnowledgeNode("p", "the cat is red")], answer)
    return pair.ids, pair.answer


@ALL
def test_prompt_and_answer_have_the_ids_that_the_whole_conversation_has(shape: Shape) -> None:
    prompts = encoder(shape)
    ids, answer = encoded(prompts)
    text = shape.prompt.replace("Q", QUESTION)
    assert ids == prompts.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids + answer == prompts.tokenizer(text + shape.answer, add_special_tokens=False)["input_ids"]
    assert (
        prompts.encode_pair("which colour", [KnowledgeNode("p", "the cat is red")], "red", with_end=False).answer
        == (answer[: -len(prompts.end_ids)])
    )
    assert prompts.tokenizer.decode(answer).removeprefix(" ") == shape.answer.removeprefix(" ")
    assert answer[-len(prompts.end_ids) :] == prompts.end_ids
    last = prompts.tokenizer.convert_ids_to_tokens(prompts.end_ids[-1])
    assert shape.answer.endswith(last)
    context = [KnowledgeNode("p", "the cat is red")]
    assert prompts.encode_prompt("which colour", context, reserved_tokens=0).ids == ids


@ALL
def test_a_system_message_has_its_place_or_is_refused(shape: Shape) -> None:
    if shape.template == GEMMA:
        with pytest.raises(ModelError, match="System role not supported"):
            encoder(shape, system="be kind")
    elif shape.system:
        ids, _ = encoded(encoder(shape, system="be kind"))
        text = re.sub(r"\bS\b", "be kind", shape.system.replace("Q", QUESTION))
        assert ids == shape.tokenizer()(text, add_special_tokens=False)["input_ids"]


@ALL
def test_no_text_from_data_becomes_a_control_token(shape: Shape) -> None:
    tokenizer = shape.tokenizer()
    names = ["<s>", "</s>", "<unk>", *shape.special, *shape.plain]
    control = set(tokenizer.convert_tokens_to_ids(names))
    hostile = " ".join([*names, *(name + name for name in names), *(name[0] + name for name in names)])

    def controls(ids: list[int]) -> list[int]:
        return [token for token in ids if token in control and token != tokenizer.unk_token_id]

    system = {"system": "kind"} if shape.system else {}
    clean = encoded(encoder(shape, **system))
    prompts = encoder(shape, **({"system": hostile} if shape.system else {}))
    for text, answer in ((hostile, "red"), ("which colour", hostile), (hostile, hostile), (names[-1], names[1])):
        node = KnowledgeNode("p", text)
        pair = prompts.encode_pair(text, [node], answer)
        assert controls(pair.ids) == controls(clean[0])
        assert controls(pair.answer) == controls(clean[1])
        assert controls(prompts.encode_prompt(text, [node], reserved_tokens=0).ids) == controls(clean[0])
        assert answer.replace(" ", "") in tokenizer.decode(pair.answer).replace(" ", "")
        assert f"{text}?{text}".replace(" ", "") in tokenizer.decode(pair.ids).replace(" ", "")
