"""Prompts: where an answer begins, chat templates, start and end tokens, and truncation of the context."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedrag_cli.config import PromptConfig
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import DataError, ModelError
from fedrag_cli.rag.generators.base import EncodedPrompt
from fedrag_cli.rag.lengths import TruncationCount
from fedrag_cli.rag.prompts import PromptEncoder, token_limit

PLAIN = PromptConfig(template="{context} ? {query} :")
CHAT_WITH_BOS = (
    "{{ '<s>' }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def encoder(folder: Path, config: PromptConfig = PLAIN, window: int = 200) -> PromptEncoder:
    return PromptEncoder(tokenizer_of(folder), config, window)


def letters(*, bos: bool = False, eos: bool = False, merges: tuple[tuple[str, str], ...] = ()) -> Any:
    """Make a tokenizer with a token a byte, which may add a start token and an end token of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>", "<s>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    single = " ".join([*(["<s>"] if bos else []), "$A", *(["</s>"] if eos else [])])
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


def nodes(*texts: str) -> list[KnowledgeNode]:
    return [KnowledgeNode(f"p{number}", text) for number, text in enumerate(texts)]


# Spans


def pair_of(
    prompts: PromptEncoder, query: str, context: list[KnowledgeNode], answer: str
) -> tuple[list[int], list[int]]:
    pair = prompts.encode_pair(query, context, answer)
    return pair.ids, pair.answer


def test_where_a_merge_crosses_the_border_the_answer_begins_at_its_first_character() -> None:
    tokenizer = letters(merges=((":", "Ġ"),))
    prompts = PromptEncoder(tokenizer, PLAIN, 100)
    prompt, answer = pair_of(prompts, "q", [], "red")
    assert prompt + answer == tokenizer(" ? q : red</s>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(answer) == "red</s>"
    # One token has characters of both.
    tokenizer = letters(merges=((":", "Ġ"), (":Ġ", "r")))
    prompt, answer = pair_of(PromptEncoder(tokenizer, PLAIN, 100), "q", [], "red")
    assert [tokenizer.decode(ids) for ids in (prompt, answer)] == [" ? q ", ": red</s>"]


def test_without_a_merge_the_answer_is_all_that_follows_the_prompt() -> None:
    tokenizer = letters()
    prompts = PromptEncoder(tokenizer, PLAIN, 100)
    prompt, answer = pair_of(prompts, "q", [], "red")
    assert prompt == prompts.encode_prompt("q", [], reserved_tokens=0).ids
    assert [tokenizer.decode(ids) for ids in (prompt, answer)] == [" ? q :", " red</s>"]


def test_a_prompt_that_ends_in_white_space_gets_no_second_blank(models: dict[str, Path]) -> None:
    for ending in (" ", "\n"):
        prompts = encoder(models["generator"], PromptConfig(template="{context} ? {query} :" + ending))
        prompt, answer = pair_of(prompts, "q", [], "red")
        assert prompts.tokenizer.decode(prompt + answer) == f" ? q :{ending}red<|end|>"


def test_prompt_and_answer_decode_to_the_text(models: dict[str, Path]) -> None:
    prompts = encoder(models["generator"])
    context = nodes("the barn", "a house")
    ids = prompts.encode_prompt("where is the cat", context, reserved_tokens=0).ids
    assert prompts.tokenizer.decode(ids) == "the barn\na house ? where is the cat :"
    prompt, answer = pair_of(prompts, "where is the cat", context, " red \n")
    assert prompt == ids
    assert prompts.tokenizer.decode(ids + answer) == "the barn\na house ? where is the cat : red<|end|>"


def test_an_answer_has_its_end_token_where_it_is_wanted(models: dict[str, Path]) -> None:
    for name in ("generator", "chat_generator"):
        prompts = encoder(models[name])
        without = prompts.encode_pair("q", nodes("a"), "  red house\n", with_end=False)
        assert pair_of(prompts, "q", nodes("a"), "red house") == (without.ids, without.answer + prompts.end_ids)


def test_the_answer_keeps_its_end_token_where_padding_and_end_are_one(models: dict[str, Path]) -> None:
    prompts = encoder(models["generator"])
    end = prompts.tokenizer.eos_token_id
    assert prompts.tokenizer.pad_token_id == end
    assert prompts.end_ids == [end]
    answer = prompts.encode_pair("q", [], "red").answer
    assert answer.count(end) == 1
    assert answer[-1] == end


@pytest.mark.parametrize("with_end", [True, False])
@pytest.mark.parametrize("blank", ["", "  ", "\n\t"])
@pytest.mark.parametrize("name", ["generator", "chat_generator"])
def test_a_blank_answer_is_refused(models: dict[str, Path], name: str, blank: str, with_end: bool) -> None:
    with pytest.raises(DataError, match="no tokens to learn"):
        encoder(models[name]).encode_pair("q", [], blank, with_end=with_end)


def test_end_ids_cannot_be_changed_from_outside(models: dict[str, Path]) -> None:
    prompts = encoder(models["generator"])
    prompts.end_ids.append(7)
    assert len(prompts.end_ids) == 1


# Chat templates


@pytest.mark.parametrize("system", [None, "you are helpful"])
def test_the_chat_prompt_is_an_id_prefix_of_the_whole_conversation(models: dict[str, Path], system: str | None) -> None:
    config = PromptConfig(template="{context} ? {query}", system=system)
    prompts = encoder(models["chat_generator"], config)
    prompt = prompts.encode_prompt("where is the cat", nodes("the barn"), reserved_tokens=0).ids
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": "user", "content": "the barn ? where is the cat"},
        {"role": "assistant", "content": "red house"},
    ]
    whole = prompts.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert (prompt, whole[len(prompt) :]) == pair_of(prompts, "where is the cat", nodes("the barn"), "red house")
    assert (prompts.tokenizer.convert_tokens_to_ids("<|system|>") in prompt) == (system is not None)


def test_never_leaves_the_chat_template_alone(models: dict[str, Path]) -> None:
    never = encoder(models["chat_generator"], PromptConfig(template=PLAIN.template, chat_template="never"))
    plain = encoder(models["generator"])
    context = nodes("the barn")
    assert never.encode_prompt("q", context, reserved_tokens=0) == plain.encode_prompt("q", context, reserved_tokens=0)
    assert pair_of(never, "q", context, "red") == pair_of(plain, "q", context, "red")


def test_always_without_a_template_is_refused(models: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="'always'"):
        encoder(models["generator"], PromptConfig(chat_template="always"))
    encoder(models["chat_generator"], PromptConfig(chat_template="always"))


def test_of_several_templates_the_default_one_is_used(models: dict[str, Path]) -> None:
    tokenizer = tokenizer_of(models["chat_generator"])
    plain = PromptEncoder(tokenizer, PLAIN, 200).encode_prompt("q", [], reserved_tokens=0)
    tokenizer.chat_template = {"tools": "x", "default": tokenizer.chat_template}
    assert PromptEncoder(tokenizer, PLAIN, 200).encode_prompt("q", [], reserved_tokens=0) == plain
    tokenizer.chat_template = {"tools": "x", "other": "y"}
    with pytest.raises(ModelError, match="several chat templates"):
        PromptEncoder(tokenizer, PLAIN, 200)


@pytest.mark.parametrize(("name", "choice"), [("generator", "auto"), ("chat_generator", "never")])
def test_a_system_message_without_a_place_for_it_is_refused(models: dict[str, Path], name: str, choice: Any) -> None:
    with pytest.raises(ModelError, match=r"rag_system\.prompt\.system"):
        encoder(models[name], PromptConfig(system="you are helpful", chat_template=choice))


@pytest.mark.parametrize(
    "template",
    [
        # A prompt that ends otherwise than the conversation goes on.
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|system|>think:{% endif %}",
        # A prompt without the question.
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        # A user's turn that is cut off as soon as an answer follows.
        "{% for m in messages %}{% if loop.last %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    ],
)
def test_a_template_whose_prompt_is_no_prefix_is_refused(models: dict[str, Path], template: str) -> None:
    tokenizer = tokenizer_of(models["chat_generator"])
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match="no prefix of the whole conversation") as caught:
        PromptEncoder(tokenizer, PLAIN, 200)
    assert "never" in caught.value.hint
    PromptEncoder(tokenizer, PromptConfig(chat_template="never"), 200)


def test_a_template_that_refuses_the_system_message_is_a_model_error(models: dict[str, Path]) -> None:
    tokenizer = tokenizer_of(models["chat_generator"])
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tokenizer.chat_template
    )
    PromptEncoder(tokenizer, PLAIN, 200)
    with pytest.raises(ModelError, match="System role not supported"):
        PromptEncoder(tokenizer, PromptConfig(system="you are helpful"), 200)


@pytest.mark.parametrize("broken", ["{{ 1 / 0 }}", "{{ messages | sum }}", "{{ messages[0].no.such }}", "{{"])
def test_a_template_that_fails_is_a_model_error(models: dict[str, Path], broken: str) -> None:
    tokenizer = tokenizer_of(models["chat_generator"])
    tokenizer.chat_template = broken
    with pytest.raises(ModelError, match="chat template refuses the prompt"):
        PromptEncoder(tokenizer, PLAIN, 200)


def test_a_template_that_cannot_be_written_is_a_model_error(models: dict[str, Path]) -> None:
    tokenizer = tokenizer_of(models["chat_generator"])
    tokenizer.chat_template = "{{ messages[0]['content'] + 3 }}" + tokenizer.chat_template
    with pytest.raises(ModelError, match="can only concatenate str"):
        PromptEncoder(tokenizer, PLAIN, 200)


def test_a_template_that_leaves_the_system_message_out_is_refused_where_there_is_one(models: dict[str, Path]) -> None:
    tokenizer = tokenizer_of(models["chat_generator"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "in messages %}", "in messages if m['role'] != 'system' %}"
    )
    tokenizer.chat_template = tokenizer.chat_template.replace("m['role']", "message['role']")
    PromptEncoder(tokenizer, PLAIN, 200)
    with pytest.raises(ModelError, match="leaves the system message out"):
        PromptEncoder(tokenizer, PromptConfig(system="you are helpful"), 200)


def test_the_end_of_a_turn_may_be_several_tokens_or_another_than_the_end_token() -> None:
    tokenizer = letters()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    turn, end = tokenizer.convert_tokens_to_ids("<turn>"), tokenizer.eos_token_id
    body = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}ENDING{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )

    def ends(ending: str) -> list[int]:
        tokenizer.chat_template = body.replace("ENDING", ending)
        return PromptEncoder(copy.deepcopy(tokenizer), PLAIN, 200).end_ids

    letter = tokenizer("!")["input_ids"]
    assert ends("<turn>") == [turn]
    assert ends("<turn>!") == [turn]
    assert ends("!</s>") == [*letter, end]
    assert ends("!") == [*letter, end]
    assert ends("") == [end]


def test_an_answer_that_could_never_end_is_refused() -> None:
    tokenizer = letters()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end token"):
        PromptEncoder(tokenizer, PLAIN, 200)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ModelError, match="no end token"):
        PromptEncoder(tokenizer, PLAIN, 200)


# Start and end tokens


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_a_prompt_has_one_start_token_at_most_and_stays_open(bos: bool, eos: bool) -> None:
    tokenizer = letters(bos=bos, eos=eos)
    prompts = PromptEncoder(tokenizer, PLAIN, 100)
    for context in ([], nodes("abc"), nodes("a" * 300)):
        ids = prompts.encode_prompt("q", context, reserved_tokens=10).ids
        assert ids.count(1) == int(bos)
        assert ids[0] == 1 or not bos
        assert 2 not in ids
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text.endswith(" ? q :")
        assert text.startswith("a") or not context or len(context[0].text) > 100
    assert (
        tokenizer.decode(prompts.encode_prompt("q", nodes("abc"), reserved_tokens=0).ids, skip_special_tokens=True)
        == "abc ? q :"
    )
    prompt, answer = pair_of(prompts, "q", nodes("abc"), "red")
    assert prompt.count(1) == int(bos)
    assert 1 not in answer
    assert answer.count(2) == 1


def test_a_template_that_writes_the_start_token_itself_gets_no_second_one() -> None:
    tokenizer = letters(bos=True, eos=True)
    tokenizer.chat_template = CHAT_WITH_BOS
    prompts = PromptEncoder(tokenizer, PLAIN, 100)
    ids = prompts.encode_prompt("q", nodes("abc"), reserved_tokens=0).ids
    assert ids.count(1) == 1
    assert tokenizer.decode(ids) == "<s>[user]abc ? q :</s>[assistant]"
    assert prompts.end_ids == [2]


# Truncation


def words(count: int) -> str:
    return " ".join(f"w{number}" for number in range(count))


@pytest.mark.parametrize("name", ["generator", "chat_generator"])
@pytest.mark.parametrize("reserved", [0, 7, 60])
def test_truncation_takes_context_from_its_end_only_and_as_little_as_possible(
    models: dict[str, Path], name: str, reserved: int
) -> None:
    prompts, window = encoder(models[name], window=150), 150
    context = words(200)
    found = prompts.encode_prompt("where is the cat", nodes(context), reserved_tokens=reserved)
    whole = encoder(models[name], window=10_000).encode_prompt("where is the cat", nodes(context), reserved_tokens=0)
    assert whole.dropped_tokens == 0
    assert len(found.ids) <= window - reserved
    assert found.dropped_tokens == len(whole.ids) - len(found.ids)
    head, question = prompts.tokenizer.decode(found.ids).split(" ? ")
    assert question.startswith("where is the cat :")
    kept = head.removeprefix("<|user|>")
    assert context.startswith(kept)
    assert not kept.endswith(" ")
    count = len(kept.split())
    assert words(count) == kept
    longer = encoder(models[name], window=10_000).encode_prompt(
        "where is the cat", nodes(words(count + 1)), reserved_tokens=0
    )
    assert len(longer.ids) > window - reserved


def test_one_token_a_character_is_cut_to_the_exact_number() -> None:
    prompts = PromptEncoder(letters(bos=True), PLAIN, 20)
    # <s>, "aa bb cc dd", " ? q :" are 1 + 11 + 6 tokens.
    assert prompts.encode_prompt("q", nodes("aa bb cc dd"), reserved_tokens=2) == EncodedPrompt(
        [1, *prompts.tokenizer("aa bb cc dd ? q :", add_special_tokens=False)["input_ids"]], 0
    )
    cut = prompts.encode_prompt("q", nodes("aa bb cc dd"), reserved_tokens=3)
    assert (prompts.tokenizer.decode(cut.ids[1:]), cut.dropped_tokens) == ("aa bb cc ? q :", 3)
    cut = prompts.encode_prompt("q", nodes("aa bb", "cc dd"), reserved_tokens=13)
    assert (prompts.tokenizer.decode(cut.ids[1:]), cut.dropped_tokens) == (" ? q :", 11)


def test_the_best_passage_survives_the_worst(models: dict[str, Path]) -> None:
    prompts = encoder(models["generator"], window=60)
    found = prompts.encode_prompt("where", nodes("the red barn", words(100)), reserved_tokens=0)
    assert prompts.tokenizer.decode(found.ids).startswith("the red barn\nw0 w1")


@pytest.mark.parametrize("name", ["generator", "chat_generator"])
def test_a_question_that_does_not_fit_is_refused_with_the_numbers(models: dict[str, Path], name: str) -> None:
    needed = len(encoder(models[name]).encode_prompt("where is the cat", [], reserved_tokens=0).ids)
    exact = encoder(models[name], window=needed + 5)
    assert len(exact.encode_prompt("where is the cat", nodes("the barn"), reserved_tokens=5).ids) == needed
    with pytest.raises(
        DataError, match=f"needs {needed} tokens.* and 6 for the answer, but the context window has {needed + 5}"
    ):
        exact.encode_prompt("where is the cat", nodes("the barn"), reserved_tokens=6)


def test_a_long_question_is_shortened_in_the_message_only(models: dict[str, Path]) -> None:
    with pytest.raises(DataError) as caught:
        encoder(models["generator"], window=50).encode_prompt(words(500), [], reserved_tokens=0)
    assert len(caught.value.message) < 250


def test_truncation_is_counted() -> None:
    count = TruncationCount()
    for dropped in (0, 5, 0, 7):
        count.add(EncodedPrompt([1], dropped).tokens, dropped)
    assert count.to_dict() == {"prompts": 4, "truncated": 2, "dropped_tokens": 12, "tokens": 16}


# Passages


def test_passage_template_takes_metadata_and_the_fields_of_the_node_win(models: dict[str, Path]) -> None:
    config = PromptConfig(template=PLAIN.template, passage_template="{id} {title} : {text}", separator=" , ")
    prompts = encoder(models["generator"], config)
    passages = [
        KnowledgeNode("a", "the barn", {"title": "cat", "text": "wrong", "id": "wrong"}),
        KnowledgeNode("b", "a tree", {"title": "owl"}),
    ]
    assert prompts.context(passages) == "a cat : the barn , b owl : a tree"
    assert prompts.context([]) == ""


def test_a_missing_field_names_passage_field_and_what_there_is(models: dict[str, Path]) -> None:
    prompts = encoder(models["generator"], PromptConfig(passage_template="{title} : {text}"))
    with pytest.raises(DataError, match="'p7' has no field 'title'") as caught:
        prompts.context([KnowledgeNode("p7", "the barn", {"owner": "x"})])
    assert caught.value.hint == "Its fields: id, owner, text."


@pytest.mark.parametrize("template", ["{title.name} {text}", "{title:>10d} {text}", "{title[name]} {text}"])
def test_a_field_that_does_not_fit_the_template_is_a_data_error(models: dict[str, Path], template: str) -> None:
    prompts = encoder(models["generator"], PromptConfig(passage_template=template))
    with pytest.raises(DataError, match="p7"):
        prompts.context([KnowledgeNode("p7", "the barn", {"title": "x"})])


@pytest.mark.parametrize("text", ["{x} {query} {context} {0} {}", "}{", "{{text}}", "%s %(a)s $x"])
@pytest.mark.parametrize("name", ["generator", "chat_generator"])
def test_braces_in_passages_queries_and_metadata_stay_as_they_are(
    models: dict[str, Path], name: str, text: str
) -> None:
    config = PromptConfig(template=PLAIN.template, passage_template="{title}|{text}")
    prompts = encoder(models[name], config)
    ids = prompts.encode_prompt(text, [KnowledgeNode("a", text, {"title": text})], reserved_tokens=0).ids
    assert f"{text}|{text} ? {text} :" in prompts.tokenizer.decode(ids)
    assert text in prompts.tokenizer.decode(prompts.encode_pair("q", [], text).answer)


@pytest.mark.parametrize("text", ["Zürich für Ünö", "日本語の質問", "🦉🦊 e\u0301", "שלום عربي", "a\u00a0b\u2028c"])
@pytest.mark.parametrize("name", ["generator", "chat_generator"])
def test_unicode_comes_through(models: dict[str, Path], name: str, text: str) -> None:
    prompts = encoder(models[name])
    decoded = prompts.tokenizer.decode(prompts.encode_prompt(text, nodes(text), reserved_tokens=0).ids)
    assert f"{text} ? {text} :" in decoded
    assert text in prompts.tokenizer.decode(prompts.encode_pair("q", [], text).answer)


def test_unicode_is_cut_between_words_never_inside_a_character(models: dict[str, Path]) -> None:
    prompts = encoder(models["generator"], window=60)
    decoded = prompts.tokenizer.decode(prompts.encode_prompt("q", nodes("日本 " * 60), reserved_tokens=0).ids)
    assert "\ufffd" not in decoded
    assert decoded.startswith("日本 日本")


# The context window


class Limits:
    """Stands for a model's config."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def test_the_window_is_the_smallest_limit_that_is_known() -> None:
    tokenizer = letters()
    assert token_limit(Limits(), tokenizer, None) == 2048
    assert token_limit(Limits(n_positions=64), tokenizer, None) == 64
    tokenizer.model_max_length = 50
    assert token_limit(Limits(max_position_embeddings=64), tokenizer, None) == 50
    assert token_limit(Limits(max_position_embeddings=64), tokenizer, 20) == 20
    with pytest.raises(ModelError, match="is 51, but the model has 50 positions"):
        token_limit(Limits(max_position_embeddings=64), tokenizer, 51)
