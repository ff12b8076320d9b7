"""Exact match and token F1 of an answer, after the normalisation of SQuAD.

Source: Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", arXiv 1606.05250, and the
evaluation script of version 1.1 that came with it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from fedrag_cli.errors import DataError

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Bring an answer into the form in which SQuAD compares answers.

    Lower case, then ASCII punctuation removed, then the articles a, an and the removed, then white space reduced to
    single blanks. Punctuation outside ASCII (such as typographic quotes) stays, as in the SQuAD script.

    Args:
        text: An answer.

    Returns:
        The normalised answer; empty where nothing but punctuation, articles and white space was there.
    """
    without_punctuation = text.lower().translate(_WITHOUT_PUNCTUATION)
    # An article leaves a blank behind, because a neighbour outside ASCII may touch it without white space.
    without_articles = _ARTICLES.sub(" ", without_punctuation)
    return " ".join(without_articles.split())


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """Say whether an answer equals one of the gold answers after normalisation.

    Args:
        prediction: The answer to judge.
        golds: The gold answers, at least one.

    Returns:
        1.0 where the answer equals a gold answer (both may be empty), 0.0 otherwise.

    Raises:
        DataError: If there is no gold answer.
    """
    _require_golds(golds)
    predicted = normalize_answer(prediction)
    return float(any(predicted == normalize_answer(gold) for gold in golds))


def f1(prediction: str, golds: Sequence[str]) -> float:
    """Measure how many tokens an answer shares with the gold answer that it is closest to.

    Tokens are counted as often as they occur: an answer that repeats a token gains nothing by it.

    Args:
        prediction: The answer to judge.
        golds: The gold answers, at least one.

    Returns:
        The largest F1 over the gold answers, in [0, 1]. Two empty answers give 1, one empty answer gives 0.

    Raises:
        DataError: If there is no gold answer.
    """
    _require_golds(golds)
    predicted = normalize_answer(prediction).split()
    return max(_token_f1(predicted, normalize_answer(gold).split()) for gold in golds)


def _token_f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    shared = (Counter(predicted) & Counter(gold)).total()
    return 2 * shared / (len(predicted) + len(gold))


def _require_golds(golds: Sequence[str]) -> None:
    if not golds:
        raise DataError(
            "An answer cannot be judged: its question has no gold answer.",
            "Give every evaluated example a response.",
        )
