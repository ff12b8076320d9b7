"""Evaluation from retrieved, relevant or no passages; ensembles; likelihoods, choices, groups, resuming."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import data_rows

from fedrag_cli import build_rag_system, load_config
from fedrag_cli.cli.main import main
from fedrag_cli.config import EvaluationConfig
from fedrag_cli.data.examples import Example
from fedrag_cli.errors import DataError
from fedrag_cli.evaluation.evaluator import choose_metrics, evaluate
from fedrag_cli.evaluation.generator_metrics import Candidate, choose
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.system import RAGSystem

CAT = "what is the colour of the cat ?"
OWL = Example("owl", "where is the owl ?", ("barn",), ("home-owl",), {"site": "b"})
RED = Example("cat", CAT, ("red", "crimson"), ("colour-cat",), {"site": "a"}, ("blue", "red", "green and gold"))


@pytest.fixture
def system(write_config: Callable[..., Path]) -> RAGSystem:
    return build_rag_system(load_config(write_config()))


def next_token_probabilities(generator: CausalLMGenerator, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.softmax(generator.model(torch.tensor([ids])).logits[0, -1].double(), dim=-1)


def token_probabilities(generator: CausalLMGenerator, prompt: list[int], answer: list[int]) -> list[float]:
    return [
        float(next_token_probabilities(generator, prompt + answer[:position])[token])
        for position, token in enumerate(answer)
    ]


# Ensembles


def test_an_ensemble_decodes_the_weighted_mean_of_the_passages_distributions(system: RAGSystem) -> None:
    system.inference, system.ensemble_temperature, system.top_k = "ensemble", 0.5, 3
    generator = system.require_generator()
    queries = [CAT, "where is the owl ?", "the colour of the fox"]
    answers = system.batch_query(queries)
    for query, answer in zip(queries, answers, strict=True):
        weights = torch.softmax(torch.tensor([s.score for s in answer.sources]).double() / 0.5, dim=0)
        prompts = [generator.encode_prompt(query, [scored.node]).ids for scored in answer.sources]
        chosen: list[int] = []
        while len(chosen) < 4:
            rows = torch.stack([next_token_probabilities(generator, prompt + chosen) for prompt in prompts])
            chosen.append(int((weights[:, None] * rows).sum(dim=0).argmax()))
            if chosen[-1] == generator.tokenizer.eos_token_id:
                break
        assert answer.text == generator.tokenizer.decode(chosen, skip_special_tokens=True).strip()


def test_the_weights_of_an_ensemble_matter(system: RAGSystem) -> None:
    system.inference, system.top_k = "ensemble", 2
    scored = system.retrieve(CAT)
    flat = system.passage_log_weights(scored)
    assert flat.exp().sum() == pytest.approx(1)
    assert flat.tolist() == pytest.approx(
        torch.log_softmax(torch.tensor([item.score for item in scored]) / 0.05, dim=0).tolist()
    )
    system.ensemble_temperature = 1e-6
    answers = [system.answer([CAT], [[scored[first], scored[1 - first]]])[0].text for first in (0, 1)]
    alone = system.answer([CAT], [[scored[0]]])[0].text
    assert answers == [alone, alone]


def test_sampling_from_an_ensemble_is_repeatable_and_differs_from_greedy(system: RAGSystem) -> None:
    system.inference = "ensemble"
    generator = system.require_generator()
    greedy = [answer.text for answer in system.batch_query([CAT] * 3)]
    generator.config = dataclasses.replace(generator.config, temperature=5.0)
    first, second = ([answer.text for answer in system.batch_query([CAT] * 3)] for _ in range(2))
    assert first == second
    assert first != greedy
    assert len(set(first)) > 1


def test_a_question_without_passages_is_asked_without_context(system: RAGSystem) -> None:
    expected = system.require_generator().generate_from_ids([system.require_generator().encode_prompt(CAT, []).ids])
    for inference in ("concat", "ensemble"):
        system.inference = inference  # type: ignore[assignment]
        assert [system.answer([CAT], [[]])[0].text] == expected


# Contexts


def test_the_contexts_of_an_evaluation(system: RAGSystem) -> None:
    examples = [RED, OWL, Example("none", "who ?", ("a",))]
    ids = {
        context: [
            [passage["id"] for passage in row["passages"]]
            for row in evaluate(system, examples, ["f1"], EvaluationConfig(context=context)).predictions  # type: ignore[arg-type]
        ]
        for context in ("retrieved", "oracle", "none")
    }
    assert ids["oracle"] == [["colour-cat"], ["home-owl"], []]
    assert ids["none"] == [[], [], []]
    assert all(len(row) == 2 for row in ids["retrieved"])


def test_an_oracle_needs_relevant_ids(system: RAGSystem) -> None:
    with pytest.raises(DataError, match="oracle, but no example has relevant ids"):
        evaluate(system, [Example("1", "q", ("a",))], ["f1"], EvaluationConfig(context="oracle"))


# Likelihoods


@pytest.mark.parametrize("inference", ["concat", "ensemble"])
def test_negative_log_likelihood_and_perplexity(system: RAGSystem, inference: Any) -> None:
    system.inference = inference
    generator = system.require_generator()
    found = evaluate(system, [RED, OWL], ["negative_log_likelihood", "perplexity"])
    expected = []
    for example in (RED, OWL):
        scored = system.retrieve(example.query)
        contexts = [[item.node] for item in scored] if inference == "ensemble" else [[item.node for item in scored]]
        pairs = [generator.prompts.encode_pair(example.query, nodes, example.response) for nodes in contexts]
        answer = pairs[0].answer
        weights = system.passage_log_weights(scored).exp().tolist()
        rows = [token_probabilities(generator, pair.ids, answer) for pair in pairs]
        mixed = [sum(w * p for w, p in zip(weights, column, strict=True)) for column in zip(*rows, strict=True)]
        expected.append(-sum(math.log(p) for p in mixed) / len(answer))
    assert found.values["negative_log_likelihood"] == pytest.approx(expected, abs=1e-4)
    assert found.values["perplexity"] == pytest.approx([math.exp(value) for value in expected], rel=1e-3)
    assert found.means()["perplexity"] == pytest.approx(math.exp(sum(expected) / 2), rel=1e-3)
    interval = found.intervals(EvaluationConfig(resamples=500), seed=0)
    for end in ("low", "mean", "high"):
        loss = getattr(interval["negative_log_likelihood"], end)
        assert getattr(interval["perplexity"], end) == pytest.approx(math.exp(loss))


def choice_scores(system: RAGSystem, example: Example) -> list[float]:
    generator = system.require_generator()
    nodes = [item.node for item in system.retrieve(example.query)]
    pairs = [generator.prompts.encode_pair(example.query, nodes, text, with_end=False) for text in example.choices]
    return [sum(math.log(p) for p in token_probabilities(generator, pair.ids, pair.answer)) for pair in pairs]


@pytest.mark.parametrize("score", ["sum", "token", "character", "prior"])
def test_choices_are_scored_by_likelihood(system: RAGSystem, score: Any) -> None:
    generator = system.require_generator()
    expected = choice_scores(system, RED)
    bare = [generator.prompts.encode_pair("", [], choice, with_end=False) for choice in RED.choices]
    if score == "token":
        expected = [total / len(pair.answer) for total, pair in zip(expected, bare, strict=True)]
    elif score == "character":
        expected = [total / len(choice) for total, choice in zip(expected, RED.choices, strict=True)]
    elif score == "prior":
        priors = [sum(math.log(p) for p in token_probabilities(generator, pair.ids, pair.answer)) for pair in bare]
        expected = [total - prior for total, prior in zip(expected, priors, strict=True)]
    found = evaluate(system, [RED, OWL], ["accuracy"], EvaluationConfig(choice_score=score))
    record = found.predictions[0]
    assert record["choice_scores"] == pytest.approx(expected, abs=1e-3)
    assert record["chosen"] == RED.choices[expected.index(max(expected))]
    assert found.values["accuracy"] == [float(record["chosen"] in RED.responses)]
    assert "chosen" not in found.predictions[1]
    for right in RED.choices:
        asked = dataclasses.replace(RED, responses=(right,))
        value = evaluate(system, [asked], ["accuracy"], EvaluationConfig(choice_score=score)).values["accuracy"]
        assert value == [float(right == record["chosen"])]


def test_of_choices_that_are_equally_likely_the_first_is_taken() -> None:
    candidates = [Candidate(str(number), text, torch.zeros(1)) for number, text in enumerate(RED.choices)]
    totals = {"0": -3.0, "1": -2.0, "2": -2.0}
    assert choose(RED, candidates, totals, EvaluationConfig(), {}) == ("red", [-3.0, -2.0, -2.0])


def test_which_metrics_questions_with_choices_have() -> None:
    assert choose_metrics(None, ["generator"], [RED]) == ["accuracy"]
    assert choose_metrics(None, ["generator"], [RED, OWL]) == ["accuracy", "exact_match", "f1"]
    assert choose_metrics(None, ["retriever"], [RED], "none") == ["accuracy"]
    with pytest.raises(DataError, match="accuracy needs choices"):
        choose_metrics(["accuracy"], ["generator"], [OWL])


def test_an_unanswerable_question_counts_for_answers_and_not_for_likelihood(system: RAGSystem) -> None:
    unanswerable = Example("none", "who is the eel ?", ("",))
    found = evaluate(system, [unanswerable, OWL], ["exact_match", "negative_log_likelihood"])
    assert [len(found.values[name]) for name in ("exact_match", "negative_log_likelihood")] == [2, 1]


# Groups


def test_groups_of_questions(system: RAGSystem) -> None:
    third = dataclasses.replace(OWL, id="third", metadata={"site": "a"}, relevant_ids=())
    found = evaluate(system, [RED, OWL, third], ["f1", "mrr"], EvaluationConfig(group_by="site"))
    by_id = {row["id"]: row["metrics"] for row in found.predictions}
    assert found.groups == {
        "a": {"f1": [by_id["cat"]["f1"], by_id["third"]["f1"]], "mrr": [by_id["cat"]["mrr"]]},
        "b": {"f1": [by_id["owl"]["f1"]], "mrr": [by_id["owl"]["mrr"]]},
    }
    settings = EvaluationConfig(resamples=100)
    assert found.group_intervals(settings, 0)["a"]["f1"].n == 2
    with pytest.raises(DataError, match="example 'cat' has no 'ward'"):
        evaluate(system, [RED], ["f1"], EvaluationConfig(group_by="ward"))


# Resuming


def test_what_was_computed_is_not_computed_again(
    system: RAGSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = ["f1", "negative_log_likelihood", "accuracy"]
    examples = [RED, OWL, *(Example(f"q{n}", f"where is the {n} house ?", ("red",)) for n in range(6))]
    generator = system.require_generator()
    generator.config = dataclasses.replace(generator.config, batch_tokens=80)
    expected = evaluate(system, examples, metrics)
    memory = tmp_path / "so-far.jsonl"
    assert evaluate(system, examples, metrics, memory=memory) == expected
    lines = memory.read_bytes().splitlines(keepends=True)
    assert len(lines) > 4
    answered: list[int] = []
    original = CausalLMGenerator.generate_batch

    def counted(self: CausalLMGenerator, prompts: list[list[int]], *rest: Any) -> list[str]:
        answered.append(len(prompts))
        return original(self, prompts, *rest)

    monkeypatch.setattr(CausalLMGenerator, "generate_batch", counted)
    # A kill in the middle of a line of the answers, and one in the middle of the scoring.
    for kept in (2, len(lines) - 2):
        memory.write_bytes(b"".join(lines[:kept]) + lines[kept][:10])
        answered.clear()
        assert evaluate(system, examples, metrics, memory=memory) == expected
        known = sum(len(json.loads(line)["values"]) for line in lines[:kept] if b'"answers"' in line)
        assert sum(answered) == len(examples) - known
        assert b"".join(memory.read_bytes().splitlines(keepends=True)) == b"".join(lines)
    memory.write_text("nothing\n", encoding="utf-8")
    with pytest.raises(DataError, match="is damaged"):
        evaluate(system, examples, metrics, memory=memory)


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_evaluations_have_a_run_directory_and_are_resumed(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(evaluation={"resamples": 200, "metrics": ["mrr", "f1"], "group_by": "site"})
    assert main(["evaluate", str(config), "--json"]) == 0
    whole = document(capsys)
    run = Path(whole["run_dir"])
    assert (run / "plots" / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run.glob("evaluation/*so-far*"))
    assert set(whole["groups"]) == {"0", "1"}
    assert sum(group["f1"]["n"] for group in whole["groups"].values()) == whole["n"] == 6
    assert main(["evaluate", str(config)]) == 0
    shown = capsys.readouterr().err
    assert "site 1: mrr" in shown

    original = CausalLMGenerator.generate_batch
    calls: list[int] = []

    def interrupted(self: CausalLMGenerator, *arguments: Any) -> list[str]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    small = "rag_system.generator.batch_tokens=80"
    monkeypatch.setattr(CausalLMGenerator, "generate_batch", interrupted)
    assert main(["evaluate", str(config), small, "--json"]) == 130
    hint = document(capsys)["error"]["hint"]
    stopped = Path(hint.removeprefix("Go on with: fedrag resume "))
    assert main(["query", str(stopped), "q"]) == 2
    monkeypatch.setattr(CausalLMGenerator, "generate_batch", original)
    capsys.readouterr()
    assert main(["resume", str(stopped), "--json"]) == 0
    resumed = document(capsys)
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["groups"] == whole["groups"]
    # An evaluation has no models, so nothing can be asked of it.
    assert main(["query", str(stopped), "q"]) == 2
    assert "is an evaluation" in capsys.readouterr().err


def test_a_window_without_room_for_passages_is_told(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(evaluation={"resamples": 50, "metrics": ["f1"], "limit": 1}))
    question, setting = data_rows()["test"][0]["query"], "rag_system.generator.context_window="
    assert main(["query", config, question, f"{setting}20"]) == 3
    needed = re.search(r"needs (\d+) tokens with its prompt and 4", " ".join(capsys.readouterr().err.split()))
    assert needed is not None
    bare = int(needed[1]) + 4
    assert main(["query", config, question, f"{setting}{bare}", "--json"]) == 0
    assert document(capsys)["without_context"] is True
    no_room = "The context window has no room for any of the passages"
    for command in (["query", config, question], ["evaluate", config]):
        assert main([*command, f"{setting}{bare}"]) == 0
        shown = " ".join(capsys.readouterr().err.split())
        assert no_room in shown
        assert ("Truncated: 1 prompts, 1 contexts cut to nothing" in shown) is (command[0] == "evaluate")
    assert main(["query", config, question, f"{setting}{bare + 10}", "--json"]) == 0
    assert document(capsys)["without_context"] is False


@pytest.mark.parametrize("loading", ["load_corpus", "build_rag_system"])
@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_an_interruption_while_loading_says_that_nothing_was_computed(
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    loading: str,
) -> None:
    config, runs = write_config(), []

    def terminated(*arguments: Any, **options: Any) -> None:
        runs.extend((config.parent / "runs").glob("*/*"))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    for module in ("evaluate", "run_data"):
        monkeypatch.setattr(f"fedrag_cli.commands.{module}.{loading}", terminated)
    assert main([command, str(config)]) == 130
    shown = capsys.readouterr().err
    [run] = runs
    assert f"Interrupted while data and models were loaded. Nothing was computed yet; '{run}' was removed." in shown
    assert (f"Run directory: {run}" in shown) is (loading == "build_rag_system")
    assert not (config.parent / "runs").exists()


@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_a_resume_that_is_interrupted_while_loading_can_be_given_again(
    write_config: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    def terminated(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    config = write_config()
    with monkeypatch.context() as patched:
        patched.setattr("fedrag_cli.commands.job.Job.evaluate", terminated)
        assert main([command, str(config)]) == 130
    (run,) = (config.parent / "runs").glob("*/*")
    assert f"fedrag resume {run}\n" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        for module in ("evaluate", "run_data"):
            patched.setattr(f"fedrag_cli.commands.{module}.build_rag_system", terminated)
        assert main(["resume", str(run)]) == 130
    shown = capsys.readouterr().err
    assert "Interrupted before the run went on; it is as it was." in shown
    assert f"What to do: Go on with: fedrag resume {run}\n" in shown
    assert main(["resume", str(run)]) == 0


def test_questions_without_a_corpus_are_evaluated_without_context(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(dataset={"corpus": None})
    arguments = ["evaluation.context=none", "trainer.mode=generator", "--json"]
    assert main(["evaluate", str(config), *arguments]) == 0
    found = document(capsys)
    assert found["context"] == "none"
    assert set(found["metrics"]) == {"exact_match", "f1"}
    assert main(["evaluate", str(config), "evaluation.context=none", "evaluation.metrics=[mrr]"]) == 2
    assert "mrr needs evaluation.context: retrieved" in capsys.readouterr().err


def test_cutoffs_beyond_the_depth_are_honoured(write_config: Callable[..., Path], capsys: Any) -> None:
    config = str(write_config())

    def measure(depth: int) -> dict[str, float]:
        arguments = [f"evaluation.depth={depth}", "evaluation.metrics=[mrr,recall@24]"]
        assert main(["evaluate", config, "--json", *arguments]) == 0
        metrics = json.loads(capsys.readouterr().out)["metrics"]
        return {name: value["mean"] for name, value in metrics.items()}

    shallow, deep = measure(1), measure(24)
    assert shallow["recall@24"] == deep["recall@24"] == 1.0
    assert shallow["mrr"] < deep["mrr"]
