"""ROUGE of an answer, by rouge-score, the reimplementation that Google Research made of the original script.

Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004). Without stemming. rouge-score's own
tokens are runs of ASCII letters and digits; these here are the same for ASCII, and know all other letters too.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from typing import Any

import regex

from fedrag_cli.data.splitting import WITHOUT_BLANKS
from fedrag_cli.errors import DataError

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
