"""Exact match and F1 against values worked out by hand."""

from __future__ import annotations

import pytest

from fedrag_cli.errors import DataError
from fedrag_cli.evaluation.answers import exact_match, f1, normalize_answer


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Paris.", "paris"),
        ("  an   apple\ta day\n", "apple day"),
        ("U.S.A.", "usa"),
        ("state-of-the-art", "stateoftheart"),
        ("Théâtre of THE Année", "théâtre of année"),
        ("ÄRGER", "ärger"),
        ("à la carte", "à la carte"),
        ("“the” end", "“ ” end"),
        ("The, a; an!", ""),
        ("?!...", ""),
        ("東京", "東京"),
        ("", ""),
    ],
)
def test_normalisation(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("The Paris.", ["paris"], 1.0),
        ("Lyon", ["Paris", "lyon!"], 1.0),
        ("Lyon", ["Paris", "Marseille"], 0.0),
        ("the cat sat", ["cat"], 0.0),
        ("", [""], 1.0),
        ("the", ["?!"], 1.0),
        ("", ["Paris"], 0.0),
        ("Paris", [""], 0.0),
    ],
)
def test_exact_match(prediction: str, golds: list[str], expected: float) -> None:
    assert exact_match(prediction, golds) == expected


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("the cat sat", ["cat"], 2 / 3),
        ("cat", ["cat"], 1.0),
        ("dog", ["cat"], 0.0),
        # Two of the three "cat" find a partner: precision 2/3, recall 1.
        ("cat cat cat", ["cat cat"], 0.8),
        # One of the two "cat" finds a partner: precision 1/2, recall 1/2.
        ("cat cat", ["cat dog"], 0.5),
        ("sat cat", ["cat sat"], 1.0),
        ("in the city of Paris", ["London", "Paris", "city of Lyon"], 4 / 7),
        ("été à Köln", ["Köln"], 0.5),
        ("", [""], 1.0),
        ("an", ["..."], 1.0),
        ("", ["Paris"], 0.0),
        ("Paris", ["the"], 0.0),
    ],
)
def test_f1(prediction: str, golds: list[str], expected: float) -> None:
    assert f1(prediction, golds) == pytest.approx(expected, abs=1e-12)


def test_no_gold_answer_is_an_error() -> None:
    with pytest.raises(DataError, match="no gold answer"):
        exact_match("Paris", [])
    with pytest.raises(DataError, match="no gold answer"):
        f1("Paris", [])
