"""Exact match, token F1 and ROUGE of an answer."""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import regex

from fedrag_cli.data.splitting import WITHOUT_BLANKS, ZERO_WIDTH_SPACE
from fedrag_cli.errors import DataError

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# The full-width forms of ASCII, and the blank of their width.
_FULL_WIDTH = {0x3000: " ", **{code + 0xFEE0: chr(code) for code in range(0x21, 0x7F)}}
_LETTER = regex.compile(r"\p{L}")
_OTHER_LETTER = regex.compile(r"[\p{L}--\p{Latin}]", regex.V1)
_PUNCTUATION = regex.compile(r"\p{P}")
_UNSPACED_CHARACTER = regex.compile(rf"(?={WITHOUT_BLANKS})\X", regex.V1)


def normalize_answer(text: str, *, beyond_latin: bool = False) -> str:
    """Bring an answer into the form in which SQuAD compares answers.

    Lower case, then ASCII punctuation removed, then the articles a, an and the removed, then white space reduced to
    single blanks. Punctuation outside ASCII (such as typographic quotes) stays, as in the SQuAD script. Canonically
    equal characters are made the same, and full-width forms of ASCII are that.

    Args:
        text: An answer.
        beyond_latin: It is compared with an answer in another script: all punctuation is removed, and blanks stand
            around each character of a script without blanks.

    Returns:
        The normalised answer; empty where nothing but punctuation, articles and white space was there.
    """
    text = unicodedata.normalize("NFKC" if beyond_latin else "NFC", text.translate(_FULL_WIDTH)).lower()
    if beyond_latin:
        text = _UNSPACED_CHARACTER.sub(r" \g<0> ", _PUNCTUATION.sub("", text.replace(ZERO_WIDTH_SPACE, " ")))
    without_punctuation = text.translate(_WITHOUT_PUNCTUATION)
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
    pairs = (_normalized(prediction, gold) for gold in golds)
    return float(any(predicted == accepted for predicted, accepted in pairs))


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
    pairs = (_normalized(prediction, gold) for gold in golds)
    return max(_token_f1(predicted.split(), accepted.split()) for predicted, accepted in pairs)


def _normalized(prediction: str, gold: str) -> tuple[str, str]:
    others = len(_OTHER_LETTER.findall(gold))
    # A Greek letter in a Latin word does not make another script of it.
    beyond_latin = 2 * others > len(_LETTER.findall(gold)) or _UNSPACED_CHARACTER.search(gold) is not None
    return (
        normalize_answer(prediction, beyond_latin=beyond_latin),
        normalize_answer(gold, beyond_latin=beyond_latin),
    )


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


ROUGE_METRICS = ("rouge1", "rouge2", "rougeL")
TOKEN = regex.compile(rf"(?={WITHOUT_BLANKS})\X|[[\p{{L}}\p{{N}}\p{{M}}]--{WITHOUT_BLANKS}]+", regex.V1)


def rouge(name: str, prediction: str, golds: Sequence[str]) -> float:
    """Return the F-measure of an answer against the accepted answer that it is closest to.

    Args:
        name: rouge1 (words), rouge2 (pairs of words) or rougeL (longest common subsequence).
        prediction: The answer.
        golds: The accepted answers, at least one.

    Returns:
        A value in [0, 1]; 0 where the answer or the accepted answer has no letter and no digit.

    Raises:
        DataError: There is no accepted answer.
    """
    if not golds:
        raise DataError(
            "An answer cannot be judged: its question has no gold answer.", "Give every evaluated example a response."
        )
    scores = _scorer(name).score_multi(list(golds), prediction)
    return float(scores[name].fmeasure)


@functools.cache
def _scorer(name: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([name], tokenizer=_UnicodeTokenizer())


class _UnicodeTokenizer:
    """Splits a text into words, and what is written in a script without blanks into characters."""

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())
        return tokens
