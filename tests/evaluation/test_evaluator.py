"""The evaluator: which metrics, their values on a ranking that is known, and the records of each question."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fedrag_cli.config import EvaluationConfig, PromptConfig
from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ConfigError, DataError
from fedrag_cli.evaluation.answers import exact_match, f1
from fedrag_cli.evaluation.evaluator import PLAIN_ANSWER_METRICS, RANKING_METRICS, choose_metrics, evaluate
from fedrag_cli.evaluation.result import Evaluation
from fedrag_cli.rag.config import CausalLMConfig, SentenceTransformerConfig
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.knowledge_stores.memory import InMemoryKnowledgeStore
from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever
from fedrag_cli.rag.system import RAGSystem

JUDGED = Example("1", "q", ("a",), ("p0",))
UNJUDGED = Example("2", "q", ("a",))
ALL = [*RANKING_METRICS, *PLAIN_ANSWER_METRICS]
QUERY = "what is the colour of the cat ?"
OTHER = "where is the owl ?"


@pytest.fixture
def system(models: dict[str, Path]) -> RAGSystem:
    """Return a system whose ranking for QUERY is p0, p1, ... p11, and the reverse for no other known query."""
    retriever = SentenceTransformerRetriever.from_config(
        SentenceTransformerConfig(model=str(models["retriever"])), device="cpu"
    )
    query = retriever.encode_queries([QUERY])[0]
    store = InMemoryKnowledgeStore()
    nodes = [KnowledgeNode(f"p{number}", f"the barn number {number}") for number in range(12)]
    store.add(nodes, torch.stack([query * (1 - 0.05 * number) for number in range(12)]))
    store.encoder_fingerprint = retriever.fingerprint()
    generator = CausalLMGenerator.from_config(
        CausalLMConfig(model=str(models["generator"]), max_new_tokens=4), prompt=PromptConfig(), device="cpu"
    )
    return RAGSystem(retriever, store, generator, top_k=2)


def asked(id: str, relevant: tuple[str, ...] = (), responses: tuple[str, ...] = ("red",)) -> Example:
    return Example(id, QUERY, responses, relevant)


# Which metrics


@pytest.mark.parametrize(
    ("sides", "examples", "expected"),
    [
        (["retriever"], [JUDGED, UNJUDGED], list(RANKING_METRICS)),
        (["retriever"], [UNJUDGED], list(PLAIN_ANSWER_METRICS)),
        (["generator"], [JUDGED], list(PLAIN_ANSWER_METRICS)),
        (["generator"], [UNJUDGED], list(PLAIN_ANSWER_METRICS)),
        (["retriever", "generator"], [JUDGED], ALL),
        (["retriever", "generator"], [UNJUDGED], list(PLAIN_ANSWER_METRICS)),
    ],
)
def test_the_metrics_of_the_sides_are_chosen(sides: list[str], examples: list[Example], expected: list[str]) -> None:
    assert choose_metrics(None, sides, examples) == expected


@pytest.mark.parametrize("sides", [["retriever"], ["generator"], ["retriever", "generator"]])
def test_wanted_metrics_win_over_those_of_the_sides(sides: list[str]) -> None:
    assert choose_metrics(["f1", "hit@3"], sides, [JUDGED]) == ["f1", "hit@3"]
    assert choose_metrics(("exact_match",), sides, [UNJUDGED]) == ["exact_match"]


def test_a_ranking_metric_without_judged_examples_is_refused() -> None:
    with pytest.raises(DataError, match="mrr, hit@3 need relevant ids") as caught:
        choose_metrics(["mrr", "f1", "hit@3"], ["retriever"], [UNJUDGED])
    assert "relevant_ids" in caught.value.hint


# Values


def test_ranking_values_equal_those_worked_out_by_hand(system: RAGSystem) -> None:
    examples = [asked("first", ("p0",)), asked("third", ("p2",)), asked("two", ("p1", "p6")), asked("absent", ("px",))]
    result = evaluate(system, examples, ["mrr", "hit@1", "hit@3", "recall@5", "ndcg@10"])
    assert result.n == 4
    gain = [1.0, 1 / math.log2(4), (1 / math.log2(3) + 1 / math.log2(8)) / (1 + 1 / math.log2(3)), 0.0]
    assert result.values["mrr"] == pytest.approx([1.0, 1 / 3, 1 / 2, 0.0])
    assert result.values["hit@1"] == [1.0, 0.0, 0.0, 0.0]
    assert result.values["hit@3"] == [1.0, 1.0, 1.0, 0.0]
    assert result.values["recall@5"] == [1.0, 1.0, 0.5, 0.0]
    assert result.values["ndcg@10"] == pytest.approx(gain)
    assert result.means()["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 4)


def test_a_passage_with_the_text_of_a_relevant_one_is_relevant_too(system: RAGSystem) -> None:
    """p3 says what p1 says, in other capitals and spaces."""
    node = KnowledgeNode("p3", "THE  barn number 1")
    system.knowledge_store.add([node], system.knowledge_store.embeddings_at(torch.tensor([3])))
    examples = [asked("twin", ("p3",)), asked("both", ("p1", "p3", "p5"))]
    result = evaluate(system, examples, ["mrr", "hit@2", "recall@5", "recall@10"])
    assert result.values["mrr"] == pytest.approx([1 / 2, 1 / 2])
    assert result.values["hit@2"] == [1.0, 1.0]
    assert result.values["recall@5"] == [1.0, 0.5]
    assert result.values["recall@10"] == [1.0, 1.0]
    assert [passage.get("same_as") for passage in result.predictions[0]["passages"]] == [None, "p3"]
    oracle = evaluate(system, examples, ["f1"], EvaluationConfig(context="oracle"))
    assert [passage["id"] for passage in oracle.predictions[1]["passages"]] == ["p1", "p5"]


@pytest.mark.parametrize(("depth", "expected"), [(100, 1 / 8), (8, 1 / 8), (7, 0.0), (1, 0.0)])
def test_rankings_go_down_to_the_depth(system: RAGSystem, depth: int, expected: float) -> None:
    assert evaluate(system, [asked("1", ("p7",))], ["mrr"], EvaluationConfig(depth=depth)).values[
        "mrr"
    ] == pytest.approx([expected])


def test_the_depth_is_never_less_than_the_passages_of_a_prompt(system: RAGSystem) -> None:
    system.top_k = 5
    result = evaluate(system, [asked("1", ("p4",))], ["mrr"], EvaluationConfig(depth=1))
    assert result.values["mrr"] == pytest.approx([1 / 5])
    assert len(result.predictions[0]["passages"]) == 5


def test_unjudged_examples_are_left_out_of_ranking_metrics_only(system: RAGSystem) -> None:
    examples = [asked("a"), asked("b", ("p1",)), asked("c"), asked("d", ("p0",))]
    result = evaluate(system, examples, ["mrr", "exact_match"])
    assert result.values["mrr"] == [0.5, 1.0]
    assert len(result.values["exact_match"]) == 4
    assert ["mrr" in prediction["metrics"] for prediction in result.predictions] == [False, True, False, True]
    assert result.predictions[1]["metrics"]["mrr"] == 0.5
    intervals = result.intervals(EvaluationConfig(resamples=100), seed=0)
    assert (intervals["mrr"].n, intervals["exact_match"].n) == (2, 4)
    assert intervals["mrr"].mean == 0.75


def test_answer_values_are_those_of_the_systems_own_answers(system: RAGSystem) -> None:
    told = system.query(QUERY).text
    other = system.query(OTHER).text
    examples = [
        asked("right", responses=("nothing alike", told)),
        asked("wrong", responses=("zebra",)),
        Example("half", OTHER, (f"zebra {other}",)),
    ]
    result = evaluate(system, examples, ["exact_match", "f1"])
    assert [prediction["answer"] for prediction in result.predictions] == [told, told, other]
    assert result.values["exact_match"] == [1.0, 0.0, 0.0]
    for name, function in (("exact_match", exact_match), ("f1", f1)):
        assert result.values[name] == [
            function(prediction["answer"], example.responses)
            for prediction, example in zip(result.predictions, examples, strict=True)
        ]


def test_questions_without_accepted_answers_are_answered_but_not_judged(system: RAGSystem) -> None:
    examples = [asked("a", ("p0",), ()), asked("b", ("p1",))]
    result = evaluate(system, examples, ["mrr", "f1"])
    assert (len(result.values["mrr"]), len(result.values["f1"])) == (2, 1)
    assert "answer" in result.predictions[0]
    assert list(result.predictions[0]["metrics"]) == ["mrr"]
    with pytest.raises(DataError, match="f1 need accepted answers"):
        evaluate(system, examples[:1], ["f1"])


def test_ranking_metrics_without_any_judged_example_are_refused(system: RAGSystem) -> None:
    with pytest.raises(DataError, match="mrr need relevant ids"):
        evaluate(system, [asked("a")], ["mrr"])


def test_no_examples_are_a_data_error(system: RAGSystem) -> None:
    for metrics in (["mrr"], ["f1"]):
        with pytest.raises(DataError):
            evaluate(system, [], metrics)


def test_records_hold_all_that_a_reader_needs(system: RAGSystem) -> None:
    example = Example("id7", QUERY, ("red", "crimson"), ("p1", "p3"))
    record = evaluate(system, [example], ["mrr"]).predictions[0]
    assert record == {
        "id": "id7",
        "query": QUERY,
        "passages": [
            {"id": "p0", "score": pytest.approx(1.0, abs=1e-5)},
            {"id": "p1", "score": pytest.approx(0.95, abs=1e-5)},
        ],
        "accepted": ["red", "crimson"],
        "relevant_ids": ["p1", "p3"],
        "metrics": {"mrr": 0.5},
    }


def test_only_answer_metrics_need_a_generator(system: RAGSystem) -> None:
    system.generator = None
    result = evaluate(system, [asked("a", ("p0",))], ["mrr"])
    assert "prompts" not in result.truncated
    assert "answer" not in result.predictions[0]
    with pytest.raises(ConfigError, match="no generator"):
        evaluate(system, [asked("a")], ["f1"])


def test_cut_queries_and_cut_prompts_are_counted(models: dict[str, Path], system: RAGSystem) -> None:
    long = " ".join(["the cat"] * 40)
    assert evaluate(system, [asked("a", ("p0",))], ["mrr", "f1"]).truncated == {"queries": 0, "prompts": 0}
    result = evaluate(system, [asked("a", ("p0",)), Example("b", long, ("x",))], ["mrr", "f1"])
    assert result.truncated == {"queries": 1, "prompts": 0}
    generator = system.require_generator()
    room = len(generator.encode_prompt(QUERY, []).ids) + 4 + 3
    config = CausalLMConfig(model=str(models["generator"]), max_new_tokens=4, context_window=room)
    system.generator = CausalLMGenerator.from_config(config, prompt=PromptConfig(), device="cpu")
    assert evaluate(system, [asked("a"), asked("b")], ["f1"]).truncated == {"queries": 0, "prompts": 2}
    config = CausalLMConfig(model=str(models["generator"]), max_new_tokens=4, context_window=room - 3)
    system.generator = CausalLMGenerator.from_config(config, prompt=PromptConfig(), device="cpu")
    found = evaluate(system, [asked("a"), asked("b")], ["f1"]).truncated
    assert found == {"queries": 0, "prompts": 2, "contexts cut to nothing": 2}


def test_an_evaluation_comes_back_from_plain_values(system: RAGSystem) -> None:
    result = evaluate(system, [asked("a", ("p0",))], ["mrr"])
    again = Evaluation.from_dict(result.to_dict())
    assert (again.n, again.values, again.truncated) == (result.n, result.values, result.truncated)


def test_evaluating_twice_gives_the_same(system: RAGSystem) -> None:
    examples = [asked("a", ("p3",)), Example("b", OTHER, ("x",), ("p1",))]
    assert evaluate(system, examples, ALL) == evaluate(system, examples, ALL)
