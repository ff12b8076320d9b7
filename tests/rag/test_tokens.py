"""Token ids for tokenizers of all kinds: answers as the model would write them, and text from data that stays text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_tokenizers import KINDS, tiny_tokenizer
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import CTRLTokenizer, LlamaConfig

from fedrag_cli.config import PromptConfig
from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.rag.config import CausalLMConfig
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.prompts import PromptEncoder
from fedrag_cli.rag.tokens import TextTokens
from fedrag_cli.trainers.huggingface.scoring import LikelihoodScorer

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
BLANK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"none": None, "zephyr": ZEPHYR, "blank": BLANK}
COLOURS = ["red", "blue", "green", "reds", "redder", "bluer", "greener", "red cat", "blue owl", "barn", "house", "cat"]


class WellRead(nn.Module):
    """A language model that writes every conversation it has read to its end, and knows nothing else."""

    def __init__(self, conversations: list[list[int]], vocabulary: int) -> None:
        super().__init__()
        self.config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=500)
        self.name_or_path = "well-read"
        self.weight = nn.Parameter(torch.zeros(1))
        self.next = {tuple(ids[:n]): ids[n] for ids in conversations for n in range(1, len(ids))}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            seen: list[int] = []
            for column, (token, is_there) in enumerate(zip(ids, mask, strict=True)):
                seen += [token] if is_there else []
                if tuple(seen) in self.next:
                    logits[row, column, self.next[tuple(seen)]] = 30.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_model_that_answers_right_is_sure_of_its_answers_and_a_right_teacher(kind: str, template: str) -> None:
    """It has read the gold passages' conversations as texts, each tokenised as a whole."""
    tokenizer = tiny_tokenizer(kind, TEMPLATES[template])
    config = PromptConfig(template="{context} ? {query}\n:")
    gold = [KnowledgeNode(f"g{n}", f"the owl {n} is {colour}") for n, colour in enumerate(COLOURS)]
    other = [KnowledgeNode(f"o{n}", f"the cat {n} sits") for n in range(12)]
    examples = [Example(str(n), f"what is owl {n}", (colour,)) for n, colour in enumerate(COLOURS)]
    texts = []
    for node, example in zip(gold, examples, strict=True):
        prompt, answer = f"{node.text} ? {example.query}\n:", example.response
        if template == "none":
            texts.append(f"{prompt} {answer}</s>")
            continue
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
    read = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    model = WellRead(read, len(tokenizer))
    generator = CausalLMGenerator(model, tokenizer, CausalLMConfig(model="x"), config)
    pairs = [(example, [node]) for nodes in (gold, other) for example, node in zip(examples, nodes, strict=True)]
    totals, lengths = LikelihoodScorer(generator).score(pairs)
    means = (totals / lengths).view(2, 12)
    assert means[0].abs().max() < 1e-6
    assert int((means[0] > means[1] + 1).sum()) == 12
    for example, node, ids in zip(examples, gold, read, strict=True):
        pair = generator.prompts.encode_pair(example.query, [node], example.response)
        assert pair.ids + pair.answer == ids[: len(pair.ids) + len(pair.answer)]
        assert pair.answer[-1] == tokenizer.eos_token_id
        assert generator.encode_prompt(example.query, [node]).ids == pair.ids


def test_a_sentencepiece_answer_after_a_line_break_is_what_the_model_writes() -> None:
    tokenizer = tiny_tokenizer("sentencepiece-legacy", ZEPHYR)
    answer = PromptEncoder(tokenizer, PromptConfig(), 400).encode_pair("what", [], "red").answer
    assert tokenizer.convert_ids_to_tokens(answer) == ["re", "d", "</s>"]


# Control tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_without_a_chat_template_too_text_from_data_is_text(kind: str, adds_bos: bool) -> None:
    tokenizer = tiny_tokenizer(kind, special=("<turn>", "<turn>s"), adds_bos=adds_bos)
    config = PromptConfig(template="<turn>{context}</s>{query}:", passage_template="{title}|{text}", separator="")
    prompts = PromptEncoder(tokenizer, config, 400)
    turn, start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<turn>", "<s>", "</s>"))
    expected = [*([start] if adds_bos else []), turn, end]
    # The last two passages together would make one.
    nodes = [
        KnowledgeNode("p", "a </s> b<turn>s", {"title": "<s>"}),
        KnowledgeNode("q", "c <tu"),
        KnowledgeNode("r", "x"),
    ]
    nodes.append(KnowledgeNode("s", "d", {"title": "rn>"}))
    pair = prompts.encode_pair("</s>", nodes, "red</s> cat")
    assert [token for token in pair.ids if token in (turn, start, end)] == expected
    assert [token for token in pair.answer if token in (turn, start, end)] == [end]
    assert pair.answer[-1] == end
    if kind != "wordpiece":
        assert tokenizer.decode(pair.answer).strip() == "red</s> cat</s>"
        assert "<s>|a </s> b<turn>sc <tu" in tokenizer.decode(pair.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_text_with_control_tokens_has_the_ids_of_a_tokenizer_that_knows_none(kind: str) -> None:
    tokenizer, ignorant = tiny_tokenizer(kind, special=("<|turn|>",)), tiny_tokenizer(kind)
    tokens = TextTokens(tokenizer)
    for text in ("a <|turn|> b", "<|turn|>", "red<|turn|>\n<|turn|>red", "<|turn|"):
        assert (
            tokens.ids("the " + tokens.as_text(text) + " end")
            == (ignorant("the " + text + " end", add_special_tokens=False)["input_ids"])
        )


def test_a_control_token_in_another_spelling_is_text_too() -> None:
    tokenizer = tiny_tokenizer("wordpiece")
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens([AddedToken("[end]", special=True, normalized=True)])
    end = backend.token_to_id("[end]")
    tokens = TextTokens(tokenizer)
    assert end in tokenizer("a [END] b")["input_ids"]
    assert tokens.ids("[end]" + tokens.as_text("a [END] b [end]")).count(end) == 1


def test_characters_for_use_inside_programs_hide_nothing() -> None:
    tokenizer = tiny_tokenizer("byte-level", special=("<turn>", "!"))
    tokens = TextTokens(tokenizer)
    hidden = tokens.as_text("<\ufdd0turn> red! \ufdd14\ufdd1")
    assert tokenizer.decode(tokens.ids("!" + hidden)) == "!<turn> red! 4"
    assert tokenizer.convert_tokens_to_ids("<turn>") not in tokens.ids(hidden)


def test_ordinary_data_has_the_tokenizers_own_ids() -> None:
    text = "x < y, [1] a|b> <b>bold</b> 日本 🦉"
    for kind in KINDS:
        tokenizer = tiny_tokenizer(kind)
        tokens = TextTokens(tokenizer)
        assert tokens.ids(tokens.as_text(text)) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_written_in_python(tmp_path: Any) -> None:
    (tmp_path / "vocab.json").write_text('{"<unk>": 0, "red": 1, "the": 2, "<@@": 3, "end": 4, "<end>": 5}')
    (tmp_path / "merges.txt").write_text("#version\nr e\nre d</w>\nt h\nth e</w>\n\n")
    tokenizer = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), eos_token="<end>")
    assert not tokenizer.is_fast
    prompts = PromptEncoder(tokenizer, PromptConfig(template="{context}<end>{query}"), 100)
    pair = prompts.encode_pair("the", [KnowledgeNode("p", "red <end> red")], "red <end>")
    assert (pair.ids.count(5), pair.answer.count(5), pair.answer[0], pair.answer[-1]) == (1, 1, 1, 5)


def test_a_template_that_writes_the_start_token_gets_no_second_one() -> None:
    tokenizer = tiny_tokenizer("sentencepiece", adds_bos=True)
    for template in ("<s>{context}\n{query}", "{context}\n{query}"):
        prompts = PromptEncoder(tokenizer, PromptConfig(template=template), 100)
        nodes = [KnowledgeNode("p", "<s> the cat")]
        for ids in (
            prompts.encode_pair("q", nodes, "red").ids,
            prompts.encode_prompt("q", nodes, reserved_tokens=0).ids,
        ):
            assert (ids[0], ids.count(1)) == (1, 1)


def test_raw_prompts_are_the_callers_own_with_one_start_token() -> None:
    tokenizer = tiny_tokenizer("sentencepiece", adds_bos=True)
    generator = CausalLMGenerator(WellRead([], len(tokenizer)), tokenizer, CausalLMConfig(model="x"))
    once = tokenizer("the cat")["input_ids"]
    assert generator._prompt_ids("the cat") == once
    assert generator._prompt_ids("<s>the cat</s>").count(1) == 1
    assert generator._prompt_ids("<s>the cat</s>")[-1] == tokenizer.eos_token_id
