"""Passages in prompts: fields without a value leave no trace, and what is too long is cut where it can be cut."""

from __future__ import annotations

import time
import unicodedata
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import data_rows
from tiny_tokenizers import tiny_tokenizer

from fedrag_cli.config import PromptConfig
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import DataError
from fedrag_cli.rag.build import build_knowledge_store
from fedrag_cli.rag.config import CausalLMConfig, SentenceTransformerConfig
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.passage_format import PassageFormat, plain_text
from fedrag_cli.rag.prompts import PromptEncoder
from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.runs.reporter import SilentReporter

NAN = float("nan")
EMPTY = [None, NAN, "", "  \n", [], {}, [None, ""], {"a": None}, np.float64("nan"), np.array([])]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((value, "") for value in EMPTY),
        ("The Cat", "The Cat"),
        (0, "0"),
        (False, "False"),
        (1999.0, "1999"),
        (1.5, "1.5"),
        (np.int64(7), "7"),
        (float("inf"), "inf"),
        (["red", None, "", ["blue", 3.0]], "red, blue, 3"),
        (np.array([1.0, 2.5]), "1, 2.5"),
        ({"name": "Ann", "born": None, "tags": ["a", "b"]}, "name: Ann, tags: a, b"),
        (date(2020, 2, 1), "2020-02-01"),
    ],
    ids=repr,
)
def test_values_as_text(value: Any, text: str) -> None:
    assert plain_text(value) == text


@pytest.mark.parametrize("absent", [True, False])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{title}: {text}", "TEXT"),
        ("{title} - {text}", "TEXT"),
        ("[{title}] {text}", "TEXT"),
        ("**{title}**: {text}", "TEXT"),
        ('"{title}" says: {text}', "says: TEXT"),
        ("<title>{title}</title><text>{text}</text>", "<text>TEXT</text>"),
        ("<doc>{title}: {text}</doc>", "<doc>TEXT</doc>"),
        ("Title: {title}\n{text}", "TEXT"),
        ("# {title}\n\n{text}", "TEXT"),
        ("Title:\n{title}\n\nText:\n{text}", "Text:\nTEXT"),
        ("{text} ({title})", "TEXT"),
        ("{text} [source: {title}].", "TEXT."),
        ("{text}\n\nSource: {title}", "TEXT"),
        ("({id}) {title}: {text}", "(p): TEXT"),
        ("{id} | title={title} | text={text}", "p | text=TEXT"),
        ("{text} ({title}, {title})", "TEXT"),
        ("{text} ({title}, {id})", "TEXT (p)"),
        ("{text} ({id}; {title})", "TEXT (p)"),
        ("{title}, {id}: {text}", "p: TEXT"),
        ("{title:>10}: {text}", "TEXT"),
        ("{title!r}: {text}", "TEXT"),
        ("{title[name]}: {text}", "TEXT"),
        ('<doc title="{title}">{text}</doc>', "<doc>TEXT</doc>"),
        ("- <doc id='{id}' title='{title}' lang=en>\n{text}\n</doc>", "- <doc id='p' lang=en>\nTEXT\n</doc>"),
        ('<doc title="{title}">\n{text}\n</doc>', "<doc>\nTEXT\n</doc>"),
        ('<doc a="{title}" lang="en" id={id}>{text}</doc>', '<doc lang="en" id=p>TEXT</doc>'),
        ('<a href="{title}">{title}</a>\n<br id="{title}" />\n{text}', "TEXT"),
        ("{title}\n=====\n{text}\n---", "TEXT\n---"),
    ],
)
def test_an_empty_field_leaves_no_trace(template: str, expected: str, absent: bool) -> None:
    passages = PassageFormat(template)
    for value in EMPTY:
        node = KnowledgeNode("p", "TEXT", {} if absent else {"title": value})
        assert passages.write(node) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{title}: {text}", "T: TEXT"),
        ("Title: {title} Author: {author}\n{text}", "Title: T Author: A, B\nTEXT"),
        ("<title>{title}</title> ({year:d}, {meta[author][name]}) {text!r}", "<title>T</title> (1999, Ann) 'TEXT'"),
        ("# {title}\n\n{{{text}}}\n", "# T\n\n{TEXT}\n"),
        ("{ title }", ""),
        ('<doc title="{title}" n="1" year={year}> {text} </doc>', '<doc title="T" n="1" year=1999> TEXT </doc>'),
    ],
)
def test_fields_with_values_are_written_as_the_template_says(template: str, expected: str) -> None:
    row = {"title": "T", "author": ["A", "B"], "year": 1999, "meta": {"author": {"name": "Ann"}}}
    assert PassageFormat(template).write(KnowledgeNode("p", "TEXT", row)) == expected


def system_of(models: dict[str, Path], nodes: list[KnowledgeNode], template: str) -> RAGSystem:
    retriever = SentenceTransformerRetriever.from_config(
        SentenceTransformerConfig(model=str(models["retriever"])), device="cpu"
    )
    generator = CausalLMGenerator.from_config(
        CausalLMConfig(model=str(models["generator"])), prompt=PromptConfig(passage_template=template), device="cpu"
    )
    return RAGSystem(retriever, build_knowledge_store(retriever, nodes, SilentReporter()), generator, top_k=2)


def test_what_some_passage_has_may_be_absent_from_others_but_not_from_all(models: dict[str, Path]) -> None:
    rows = data_rows()["corpus"][:4]
    nodes = [KnowledgeNode(row["id"], row["text"]) for row in rows]
    with_title = [*nodes, KnowledgeNode("last", "the barn", {"title": "T", "meta": {"year": 5}})]
    generator = system_of(models, with_title, "{title} ({meta[year]}): {text}").require_generator()
    assert generator.prompts.context(nodes[:1]) == rows[0]["text"]
    for template in ("{titel}: {text}", "{meta[yaer]}: {text}", "{0}: {text}"):
        with pytest.raises(DataError, match="no other passage has it"):
            system_of(models, with_title, template)


# Cutting


def kept_of(context: str, window: int, kind: str = "byte-level", chat: bool = False) -> tuple[str, int, Any]:
    """Return what is left of a context, the tokens of the prompt, and the encoded prompt."""
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}" if chat else None
    prompts = PromptEncoder(tiny_tokenizer(kind, template), PromptConfig(template="{context}|{query}"), window)
    found = prompts.encode_prompt("q", [KnowledgeNode("p", context)], reserved_tokens=0)
    text = prompts.tokenizer.decode(found.ids)
    assert text.endswith("|q][" if chat else "|q")
    return text.removeprefix("[").rpartition("|q")[0], len(found.ids), found


SCRIPTS = {
    "Chinese": "我们今天去港口坐船因为天气很好风也不大孩子们都很高兴。",
    "Japanese": "船は正午に港を出ます。切符は窓口で買えます。",
    "Thai": "เรือออกจากท่าตอนเที่ยงวันและผู้โดยสารรอที่ท่าเรือ",
    "Khmer": "កប៉ាល់ចាកចេញពីកំពង់ផែនៅពេលថ្ងៃត្រង់",
    "emoji": "👨‍👩‍👧🇩🇪👍🏽",
    "base64": "QmFzZTY0dGV4dA",
}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_context_without_blanks_fills_the_window(name: str, chat: bool) -> None:
    context = SCRIPTS[name] * 40
    kept, tokens, found = kept_of(context, 120, chat=chat)
    assert context.startswith(kept)
    # The largest of these characters, a family, has 18 bytes, each of them a token.
    assert 120 - 18 <= tokens <= 120
    assert found.dropped_tokens > 0
    assert not found.is_bare
    # It ends between two characters, with the marks and joiners that belong to them.
    following = context[len(kept)]
    assert unicodedata.category(following) not in ("Mn", "Mc", "Me")
    assert "\u200d" not in (following, kept[-1])
    assert following != "🏽"
    assert kept.count("🇩") == kept.count("🇪")


def test_words_stay_whole_where_there_are_blanks() -> None:
    for context in (
        "Donaudampfschifffahrtsgesellschaft " * 20,
        "καλημέρα σας " * 40,
        "안녕하세요 여러분 " * 40,
        "שלום עולם " * 40,
    ):
        kept, _, _ = kept_of(context, 100)
        assert kept
        assert context.startswith(kept + " ")
    mixed = "one two " + SCRIPTS["Chinese"] * 10 + " three"
    assert kept_of(mixed, 40)[0].startswith("one two 我们")
    assert kept_of("a" * 30 + " " + "b" * 30, 45)[0] == "a" * 30


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level", "wordpiece"])
@pytest.mark.parametrize(
    "context", ["the red cat sits " * 400, SCRIPTS["Chinese"] * 200, "." * 6000], ids=["en", "zh", "."]
)
def test_the_answer_counts_as_the_reserved_tokens_do(kind: str, context: str) -> None:
    prompts = PromptEncoder(tiny_tokenizer(kind), PromptConfig(template="{context}|{query}:"), 90)
    nodes = [KnowledgeNode("p", context)]
    pair = prompts.encode_pair("what", nodes, "red")
    assert 80 < len(pair.ids) + len(pair.answer) <= 90
    assert pair.ids == prompts.encode_prompt("what", nodes, reserved_tokens=len(pair.answer)).ids
    whole = PromptEncoder(prompts.tokenizer, prompts.config, 10**6).encode_pair("what", nodes, "red")
    assert pair.dropped_tokens == len(whole.ids) - len(pair.ids)
    assert (pair.answer, whole.dropped_tokens) == (whole.answer, 0)


@pytest.mark.parametrize("unit", ["the red cat ", "中", ".", "</s>"])
def test_the_time_of_a_prompt_grows_as_its_passage_does(unit: str) -> None:
    prompts = PromptEncoder(tiny_tokenizer("byte-level"), PromptConfig(), 500)

    def seconds(length: int) -> float:
        node = KnowledgeNode("p", (unit * length)[:length])
        times = []
        for _ in range(2):
            started = time.process_time()
            prompts.encode_pair("q", [node], "red")
            times.append(time.process_time() - started)
        return min(times)

    seconds(500)
    assert seconds(40_000) < 6 * seconds(10_000) + 0.2
