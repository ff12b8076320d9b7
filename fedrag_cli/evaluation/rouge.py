"""ROUGE of an answer, by rouge-score, the reimplementation that Google Research made of the original script.

Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004). Without stemming; letters and digits of
ASCII only, as rouge-score tokenises.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from fedrag_cli.errors import DataError

ROUGE_METRICS = ("rouge1", "rouge2", "rougeL")


def rouge(name: str, prediction: str, golds: Sequence[str]) -> float:
    """Return the F-measure of an answer against the accepted answer that it is closest to.

    Args:
        name: rouge1 (words), rouge2 (pairs of words) or rougeL (longest common subsequence).
        prediction: The answer.
        golds: The accepted answers, at least one.

    Returns:
        A value in [0, 1]; 0 where the answer or the accepted answer has no word.

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

    return RougeScorer([name], use_stemmer=False)
