"""Ranking metrics by the definitions of trec_eval, computed by trec_eval's own code through ir-measures."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedrag_cli.errors import ConfigError, DataError, FedRAGError

if TYPE_CHECKING:
    import ir_measures

_CUTOFF_METRIC = re.compile(r"(hit|recall|ndcg)@([1-9][0-9]*)")


def ranking_metrics(
    rankings: Sequence[Sequence[str]],
    relevant: Sequence[Collection[str]],
    metric_names: Sequence[str],
    same: Mapping[str, str] | None = None,
) -> dict[str, list[float]]:
    """Compute ranking metrics for every question.

    - `mrr`: 1 / rank of the first relevant passage, 0 where none was found. (Its mean is the MRR.)
    - `hit@k`: 1 where any relevant passage is among the first k, else 0.
    - `recall@k`: share of the relevant passages that are among the first k.
    - `ndcg@k`: discounted gain of the first k, with gain 1 and discount log2(1 + rank), over that of the best order.

    Passages with the same text are one passage under several ids (`same`): whichever of them comes first finds it, at
    its rank. It counts once, among those found and among those there are to find; further ones of them take up their
    ranks and count for nothing, as in a prompt that repeats itself.

    Args:
        rankings: For every question, passage ids, best first. An empty ranking scores 0.
        relevant: For every question, the ids of its relevant passages, at least one.
        metric_names: Names from the list above.
        same: For passages, one id that all with the same text share; an id that is missing stands for itself.

    Returns:
        For every metric, one value in [0, 1] a question, in the order of the questions.

    Raises:
        ConfigError: If a name is no ranking metric.
        DataError: If the lengths differ or a question has no relevant passage.
        FedRAGError: If a ranking holds an id twice.
    """
    _check_questions(rankings, relevant)
    measures = {name: _measure(name) for name in metric_names}
    values = {name: [0.0] * len(rankings) for name in metric_names}
    # trec_eval has no notion of an empty ranking: such a question is left out and keeps its 0.
    answered = [position for position, ranking in enumerate(rankings) if ranking]
    if not answered or not measures:
        return values

    names = {measure: name for name, measure in measures.items()}
    shared = same or {}
    judgements = {
        str(position): {_of_text(shared.get(name, name)): 1 for name in relevant[position]} for position in answered
    }
    # trec_eval sorts by score and breaks ties by id; whole numbers that fall by 1 keep the given order.
    scores = {
        str(position): {name: float(-rank) for rank, name in enumerate(_once(rankings[position], shared))}
        for position in answered
    }
    for result in _provider().evaluator(list(measures.values()), judgements).iter_calc(scores):
        values[names[result.measure]][int(result.query_id)] = float(result.value)
    return values


def _once(ranking: Sequence[str], same: Mapping[str, str]) -> list[str]:
    """Return a ranking in which each text has one name, and its repetitions have names that nothing else has."""
    names: dict[str, None] = {}
    for rank, passage_id in enumerate(ranking):
        name = _of_text(same.get(passage_id, passage_id))
        names[name if name not in names else f"again-{rank}"] = None
    return list(names)


def _of_text(passage_id: str) -> str:
    return f"text-{passage_id}"


def _provider() -> Any:
    import ir_measures

    return ir_measures.pytrec_eval


def _measure(name: str) -> ir_measures.Measure:
    import ir_measures

    if name == "mrr":
        return ir_measures.RR
    match = _CUTOFF_METRIC.fullmatch(name)
    if match is None:
        raise ConfigError(f"'{name}' is no ranking metric.", "Ranking metrics: mrr, hit@K, recall@K, ndcg@K.")
    families = {"hit": ir_measures.Success, "recall": ir_measures.R, "ndcg": ir_measures.nDCG}
    return families[match[1]] @ int(match[2])


def _check_questions(rankings: Sequence[Sequence[str]], relevant: Sequence[Collection[str]]) -> None:
    if len(rankings) != len(relevant):
        raise DataError(f"There are {len(rankings)} rankings, but {len(relevant)} lists of relevant passages.")
    unjudged = [position for position, ids in enumerate(relevant) if not ids]
    if unjudged:
        raise DataError(
            f"{len(unjudged)} questions have no relevant passages, at the positions {_shorten(unjudged)}.",
            "Leave them out of the ranking metrics, or give them relevant_ids.",
        )
    repeated = [position for position, ranking in enumerate(rankings) if len(set(ranking)) != len(ranking)]
    if repeated:
        raise FedRAGError(
            f"{len(repeated)} rankings hold a passage twice, at the positions {_shorten(repeated)}.",
            "A ranking names every passage once; check that the corpus has no passage id twice.",
        )


def _shorten(positions: list[int], most: int = 10) -> str:
    listed = ", ".join(str(position) for position in positions[:most])
    return f"{listed}, ..." if len(positions) > most else listed
