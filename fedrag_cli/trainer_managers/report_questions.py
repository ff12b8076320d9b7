"""The questions that a run answers better and worse than its baseline, as a report shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Questions = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Records of the questions by the names of the runs and the ids of the questions."""


def won_and_lost(comparison: Mapping[str, Any], questions: Questions, most: int) -> list[dict[str, Any]]:
    """Return the questions that a run has won and lost, for each metric, the largest differences first.

    Args:
        comparison: As `Comparison.to_dict` gives it.
        questions: The records of both runs.
        most: How many are shown of each.
    """
    before, after = questions[comparison["baseline"]], questions[comparison["name"]]
    found = []
    for metric in (difference["metric"] for difference in comparison["differences"]):
        rows: dict[str, Any] = {"metric": metric}
        for outcome in ("won", "lost"):
            names = [str(name) for name in comparison[outcome][metric]]
            # Sorting keeps the questions' own order where differences are equal.
            pairs = sorted(((before[name], after[name]) for name in names), key=lambda pair: -_distance(pair, metric))
            rows[f"{outcome}_count"] = len(names)
            rows[outcome] = [_question(*pair, metric) for pair in pairs[:most]]
        found.append(rows)
    return found


def _distance(pair: tuple[Mapping[str, Any], Mapping[str, Any]], metric: str) -> float:
    return abs(float(pair[1]["metrics"][metric]) - float(pair[0]["metrics"][metric]))


def _question(before: Mapping[str, Any], after: Mapping[str, Any], metric: str) -> dict[str, Any]:
    return {
        "query": before["query"],
        "accepted": [text if text.strip() else "(no answer)" for text in before.get("accepted", ())],
        "baseline": _side(before, metric),
        "run": _side(after, metric),
    }


def _side(row: Mapping[str, Any], metric: str) -> dict[str, Any]:
    relevant = set(row.get("relevant_ids", ()))
    passages = [
        {
            "id": passage["id"],
            "score": passage["score"],
            "relevant": passage["id"] in relevant or "same_as" in passage,
        }
        for passage in row.get("passages", ())
    ]
    shown = {passage.get("same_as", passage["id"]) for passage in row.get("passages", ())}
    return {
        "value": row["metrics"][metric],
        "said": row["chosen"] if metric == "accuracy" else row.get("answer"),
        "passages": passages,
        "missed": sorted(relevant - shown) if passages else [],
    }
