"""Our metrics against the implementations of others, on random data and on edge cases."""

from __future__ import annotations

import random
import re
import string
import unicodedata
from collections import Counter

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from fedrag_cli.errors import DataError
from fedrag_cli.evaluation.answers import ROUGE_METRICS, exact_match, f1, rouge
from fedrag_cli.evaluation.ranking import ranking_metrics

CUTOFFS = [1, 3, 10]


def test_rankings_as_sentence_transformers_measures_them() -> None:
    generator = random.Random(11)
    corpus = [f"passage-{number}" for number in range(40)]
    rankings = [generator.sample(corpus, 30) for _ in range(200)]
    relevant = [set(generator.sample(corpus, generator.randint(1, 6))) for _ in range(200)]
    reference = InformationRetrievalEvaluator(
        queries={str(n): "query" for n in range(200)},
        corpus=dict.fromkeys(corpus, "text"),
        relevant_docs={str(n): ids for n, ids in enumerate(relevant)},
        mrr_at_k=[30],
        ndcg_at_k=CUTOFFS,
        accuracy_at_k=CUTOFFS,
        precision_recall_at_k=CUTOFFS,
        map_at_k=[30],
    )
    # Falling scores keep the order.
    hits = [[{"corpus_id": name, "score": -rank} for rank, name in enumerate(row)] for row in rankings]
    expected = reference.compute_metrics(hits)
    names = ["mrr", *(f"{family}@{k}" for family in ("hit", "recall", "ndcg") for k in CUTOFFS)]
    means = {name: sum(row) / 200 for name, row in ranking_metrics(rankings, relevant, names).items()}
    assert means["mrr"] == pytest.approx(expected["mrr@k"][30], abs=1e-9)
    for family, name in (("hit", "accuracy@k"), ("recall", "recall@k"), ("ndcg", "ndcg@k")):
        for k in CUTOFFS:
            assert means[f"{family}@{k}"] == pytest.approx(expected[name][k], abs=1e-9), (family, k)


def words_of(text: str) -> list[str]:
    """Normalise as SQuAD describes it, by another way than ours."""
    kept = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return [word for word in re.split(r"\s+", re.sub(r"\b(a|an|the)\b", " ", kept)) if word]


def reference_f1(prediction: str, gold: str) -> float:
    left, right = words_of(prediction), words_of(gold)
    if not left or not right:
        return float(left == right)
    common = sum(min(count, Counter(right)[word]) for word, count in Counter(left).items())
    if not common:
        return 0.0
    precision, recall = common / len(left), common / len(right)
    return 2 * precision * recall / (precision + recall)


LATIN_WORDS = ["the", "A", "cat", "Cat.", "sat", "an", "été", "U.S.", "3-4", "", "\t", "naïve", "“quoted”", "?!"]
WORDS_OF_THE_WORLD = [
    "the",
    "Москва",
    "«Москве»",
    "東京",
    "京都。",
    "は",
    "ภาษาไทย",
    "5",
    "ＡＢ",
    "دبي،",
    "",
    "x",
    "हिंदी।",
]


def random_answers(count: int, words: list[str]) -> list[tuple[str, list[str]]]:
    generator = random.Random(5)

    def text() -> str:
        return " ".join(generator.choices(words, k=generator.randint(0, 6)))

    return [(text(), [text() for _ in range(generator.randint(1, 4))]) for _ in range(count)]


def test_answers_as_squad_describes_it() -> None:
    for prediction, golds in random_answers(2000, LATIN_WORDS):
        same = any(words_of(prediction) == words_of(gold) for gold in golds)
        assert exact_match(prediction, golds) == float(same), (prediction, golds)
        expected = max(reference_f1(prediction, gold) for gold in golds)
        assert f1(prediction, golds) == pytest.approx(expected, abs=1e-12), (prediction, golds)


def mlqa_tokens(text: str) -> list[str]:
    """Normalise and split as MLQA's script does for Chinese, by another way than ours: character by character."""
    tokens = [""]
    for character in unicodedata.normalize("NFKC", text.lower()):
        unspaced = re.match(r"CJK UNIFIED|HIRAGANA|KATAKANA|THAI", unicodedata.name(character, ""))
        if unspaced and not unicodedata.combining(character):
            tokens += [character, ""]
        elif unspaced:
            tokens[-2] += character
        elif character.isspace():
            tokens.append("")
        elif not unicodedata.category(character).startswith("P") and character not in string.punctuation:
            tokens[-1] += character
    return [token for token in tokens if token not in ("", "a", "an", "the")]


def test_answers_in_other_scripts_as_mlqa_describes_it() -> None:
    others = 0
    for prediction, golds in random_answers(2000, WORDS_OF_THE_WORLD):
        for gold in golds:
            letters = ["LATIN" in unicodedata.name(character) for character in gold if character.isalpha()]
            if 2 * sum(letters) >= len(letters) and not set(mlqa_tokens(gold)) & set("東京都はภษ"):
                continue
            others += 1
            left, right = mlqa_tokens(prediction), mlqa_tokens(gold)
            assert exact_match(prediction, [gold]) == float(left == right), (prediction, gold)
            shared = (Counter(left) & Counter(right)).total()
            assert f1(prediction, [gold]) == pytest.approx(2 * shared / (len(left) + len(right))), (prediction, gold)
    assert others > 2000


@pytest.mark.parametrize(
    ("prediction", "gold", "exact", "overlap"),
    [
        ("«Москва».", "Москва", 1.0, 1.0),
        ("北 京。", "北京", 1.0, 1.0),
        ("北京大学", "北京", 0.0, 2 / 3),
        ("١٢، دبي", "دبي", 0.0, 2 / 3),
        ("១\u200bភាសា", "១ភាសា", 1.0, 1.0),
        # Full-width forms, and accents that stand apart, are the same characters.
        ("１２３", "123", 1.0, 1.0),
        ("e\u0301te\u0301", "été", 1.0, 1.0),
        ("a\u0300", "à", 1.0, 1.0),
        # SQuAD's numbers for English stay.
        ("“Paris”", "Paris", 0.0, 0.0),
        ("“α-helix”", "α-helix", 0.0, 0.0),
        ("α-helix", "α helix", 0.0, 0.0),
        ("«αβγ»", "αβγ", 1.0, 1.0),
        ("用Python。", "用 python", 1.0, 1.0),
    ],
)
def test_answers_worked_out_by_hand(prediction: str, gold: str, exact: float, overlap: float) -> None:
    assert exact_match(prediction, [gold]) == exact
    assert f1(prediction, [gold]) == pytest.approx(overlap)


@pytest.mark.parametrize("name", ROUGE_METRICS)
def test_rouge_is_the_best_over_the_accepted_answers(name: str) -> None:
    scorer = RougeScorer([name])
    ascii_words = [word for word in LATIN_WORDS if word.isascii()] + ["don't", "snake_case", "C++", "3.5%"]
    for prediction, golds in random_answers(300, ascii_words):
        expected = max(scorer.score(gold, prediction)[name].fmeasure for gold in golds)
        assert rouge(name, prediction, golds) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(DataError, match="no gold answer"):
        rouge(name, "a", [])


@pytest.mark.parametrize(
    ("name", "prediction", "gold", "expected"),
    [
        # Three of four words on one side, three of five on the other.
        ("rouge1", "the cat sat down", "the cat sat on mats", 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5)),
        # Two of three pairs, two of four.
        ("rouge2", "the cat sat down", "the cat sat on mats", 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),
        # The order counts: the longest common subsequence of "b a c" and "a b c" has two words.
        ("rougeL", "b a c", "a b c", 2 / 3),
        ("rouge1", "b a c", "a b c", 1.0),
        ("rouge2", "one", "one", 0.0),
        ("rouge1", "", "one", 0.0),
        ("rouge1", "", "", 0.0),
        ("rouge1", "В Москве", "в Москве", 1.0),
        ("rouge1", "Москва", "Рим", 0.0),
        ("rougeL", "ΟΔΌΣ Αθηνών", "οδός αθηνών", 1.0),
        ("rouge2", "東京タワー", "東京タワー", 1.0),
        # Two of five characters on one side, two of two on the other.
        ("rougeL", "東京タワー", "東京", 4 / 7),
        ("rouge2", "ภาษาไทย", "ภาษาไทย", 1.0),
        ("rouge1", "हिंदी भाषा", "हिंदी", 2 / 3),
        ("rouge1", "e\u0301te\u0301", "ÉTÉ", 1.0),
        ("rouge1", "ＡＢＣ", "abc", 1.0),
    ],
)
def test_rouge_worked_out_by_hand(name: str, prediction: str, gold: str, expected: float) -> None:
    assert rouge(name, prediction, [gold]) == pytest.approx(expected)
