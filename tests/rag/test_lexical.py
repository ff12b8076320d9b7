"""BM25 over words: the formula, its order, scripts without blanks, and what is saved."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ConfigError, KnowledgeStoreError
from fedrag_cli.rag.config import LEXICAL_FILE, BM25Config
from fedrag_cli.rag.lexical import LexicalIndex, Tokenizer

TEXTS = (
    "The ferry leaves the harbour at six.",
    "The ferry to the island leaves at noon; the ferry back leaves at dusk.",
    "Dogs travel on the lower deck.",
    "Tickets are sold on board.",
)


def nodes(texts: Sequence[str] = TEXTS) -> list[KnowledgeNode]:
    return [KnowledgeNode(str(number), text) for number, text in enumerate(texts)]


def expected(query: Sequence[str], passages: Sequence[Sequence[str]], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """BM25 in Lucene's variant, as Kamphuis et al. write it down (without the constant k1 + 1)."""
    count, mean = len(passages), sum(map(len, passages)) / len(passages)
    scores = []
    for passage in passages:
        counts, score = Counter(passage), 0.0
        for word in query:
            containing = sum(word in other for other in passages)
            idf = math.log(1 + (count - containing + 0.5) / (containing + 0.5))
            if counts[word]:
                score += idf * counts[word] / (counts[word] + k1 * (1 - b + b * len(passage) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4), (0.0, 0.0)])
def test_scores_are_those_of_the_formula(k1: float, b: float) -> None:
    settings = BM25Config(k1=k1, b=b)
    index, tokenize = LexicalIndex.build(nodes(), settings), Tokenizer(settings)
    query = "When does the ferry to the moon leave? Ferry leaves!"
    wanted = expected(tokenize(query), [tokenize(text) for text in TEXTS], k1, b)
    assert index.scores(query).tolist() == pytest.approx(wanted, abs=1e-5)


def test_words_are_compared_without_case_and_in_one_form_of_unicode() -> None:
    assert Tokenizer(BM25Config())("Ｆｅｒｒｙ, STRASSE, Straße; cafe\u0301 snake_case 3.5") == [
        "ferry",
        "strasse",
        "strasse",
        "café",
        "snake_case",
        "3",
        "5",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("東京都の天気", ["東京", "京都", "都の", "の天", "天気"]),
        ("猫 and 犬", ["猫", "and", "犬"]),
        ("ภาษาไทย", ["ภา", "าษ", "ษา", "าไ", "ไท", "ทย"]),
        ("สวัส\u200bดี", ["สวั", "วัส", "สดี"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("", []),
        ("... !?", []),
    ],
)
def test_scripts_without_blanks_are_split_into_pairs_of_characters(text: str, words: list[str]) -> None:
    assert Tokenizer(BM25Config())(text) == words


def test_a_japanese_question_finds_its_passage() -> None:
    index = LexicalIndex.build(nodes(["大阪の名物はたこ焼きです。", "東京の天気は晴れです。"]), BM25Config())
    assert index.search(["天気はどうですか"], 1)[1].tolist() == [[1]]


def test_stems_and_stop_words() -> None:
    tokenize = Tokenizer(BM25Config(language="english", stemming=True, stop_words=True))
    assert tokenize("The ferries were leaving for the islands") == ["ferri", "were", "leav", "island"]
    with pytest.raises(ConfigError, match="no stemmer for 'klingon'"):
        Tokenizer(BM25Config(language="klingon", stemming=True))
    with pytest.raises(ConfigError, match="no list of stop words for 'klingon'") as caught:
        Tokenizer(BM25Config(language="klingon", stop_words=True))
    assert "english" in caught.value.hint
    assert "german" in caught.value.hint


def test_fields_count_as_often_as_they_weigh() -> None:
    passage = KnowledgeNode("a", "leaves at six", {"title": "Ferry", "owner": None})
    other = KnowledgeNode("b", "a ferry among many other words of this text", {"title": ""})
    index = LexicalIndex.build([passage, other], BM25Config(fields={"title": 3, "owner": 2}))
    wanted = expected(["ferry"], [["leaves", "at", "six", "ferry", "ferry", "ferry"], other.text.split()])
    assert index.scores("ferry").tolist() == pytest.approx(wanted, abs=1e-5)
    assert LexicalIndex.build([passage, other], BM25Config()).scores("ferry")[0] == 0


def test_equal_scores_are_ordered_by_position_and_passages_without_a_word_follow() -> None:
    texts = ["red", "blue", "red", "red", "blue"]
    scores, positions = LexicalIndex.build(nodes(texts), BM25Config()).search(["red", "blue", "green", ""], 4)
    assert positions.tolist() == [[0, 2, 3, 1], [1, 4, 0, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert scores[0, 0] == scores[0, 2] > 0 == scores[0, 3]
    assert not scores[2:].any()


def test_search_returns_the_largest_scores_of_many_passages() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 40, (500, 6), generator=generator).tolist()
    index = LexicalIndex.build(nodes([" ".join(f"w{word}" for word in row) for row in words]), BM25Config())
    queries = ["w1 w2 w3", "w7", "w39 w0"]
    scores, positions = index.search(queries, 50)
    for query, found, row in zip(queries, scores, positions, strict=True):
        every = torch.from_numpy(index.scores(query))
        order = sorted(range(500), key=lambda position: (-every[position].item(), position))
        assert row.tolist() == order[:50]
        assert torch.equal(found, every[row])
    assert torch.equal(index.scores_at(queries, positions), scores)


@pytest.mark.parametrize("texts", [["..."], ["one passage"], ["word " * 10_000, "other"]])
def test_any_corpus_can_be_indexed(texts: list[str], tmp_path: Path) -> None:
    index = LexicalIndex.build(nodes(texts), BM25Config())
    index.save(tmp_path / "lexical")
    loaded = LexicalIndex.load(tmp_path / "lexical", BM25Config())
    assert len(loaded) == len(texts)
    for query in ("word", "passage", "", "unknown"):
        assert loaded.scores(query).tolist() == index.scores(query).tolist()


@pytest.mark.parametrize("memory_map", [False, True])
def test_a_saved_index_gives_the_same_scores(memory_map: bool, tmp_path: Path) -> None:
    index = LexicalIndex.build(nodes(), BM25Config(k1=1.2))
    index.save(tmp_path / "lexical")
    loaded = LexicalIndex.load(tmp_path / "lexical", BM25Config(k1=1.2), memory_map=memory_map)
    assert torch.equal(loaded.search(["ferry island"], 4)[0], index.search(["ferry island"], 4)[0])
    assert not list((tmp_path / "lexical").glob("*.pkl"))


def test_an_index_of_other_settings_or_with_damage_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "lexical"
    LexicalIndex.build(nodes(), BM25Config()).save(folder)
    with pytest.raises(KnowledgeStoreError, match=r"other settings \(k1, fields\)"):
        LexicalIndex.load(folder, BM25Config(k1=1.0, fields={"title": 2}))
    for damage in ("{", json.dumps({"version": 1}), json.dumps([])):
        (folder / LEXICAL_FILE).write_text(damage)
        with pytest.raises(KnowledgeStoreError, match="is damaged"):
            LexicalIndex.load(folder, BM25Config())
    with pytest.raises(KnowledgeStoreError, match="is damaged"):
        LexicalIndex.load(tmp_path / "missing", BM25Config())


@pytest.mark.parametrize("memory_map", [False, True])
def test_an_index_whose_scores_are_gone_or_empty_is_refused(memory_map: bool, tmp_path: Path) -> None:
    """Without its scores it would find nothing, and an empty file is no error of the file system to NumPy."""
    folder = tmp_path / "lexical"
    LexicalIndex.build(nodes(), BM25Config()).save(folder)
    scores = sorted(folder.glob("*.npy"))
    assert scores
    for file in scores:
        content = file.read_bytes()
        file.write_bytes(b"")
        with pytest.raises(KnowledgeStoreError, match="is damaged"):
            LexicalIndex.load(folder, BM25Config(), memory_map=memory_map)
        file.write_bytes(content)
    for file in scores:
        file.unlink()
    with pytest.raises(KnowledgeStoreError, match="is damaged"):
        LexicalIndex.load(folder, BM25Config(), memory_map=memory_map)


def test_a_saved_index_is_opened_and_one_of_other_passages_is_refused(tmp_path: Path) -> None:
    folder, settings = tmp_path / "lexical", BM25Config(fields={"title": 1})
    passages = [KnowledgeNode("a", "one", {"title": "Ferry", "owner": "x"}), KnowledgeNode("b", "two")]
    built = LexicalIndex.from_config(settings, passages, folder)
    assert not folder.exists()
    built.save(folder)
    # What BM25 does not read may change.
    renamed = [KnowledgeNode("c", "one", {"title": "Ferry"}), KnowledgeNode("b", "two")]
    assert (
        LexicalIndex.from_config(settings, renamed, folder).scores("ferry").tolist() == built.scores("ferry").tolist()
    )
    for other in (passages[::-1], passages[:1], [KnowledgeNode("a", "one"), passages[1]]):
        with pytest.raises(KnowledgeStoreError, match="of other passages") as caught:
            LexicalIndex.from_config(settings, other, folder)
        assert "fedrag index" in caught.value.hint
