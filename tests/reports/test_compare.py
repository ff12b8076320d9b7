"""Comparing runs: paired differences on the same questions, won and lost, verdicts, and gates for CI."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedrag_cli.cli.main import main
from fedrag_cli.config import EvaluationConfig
from fedrag_cli.errors import DataError
from fedrag_cli.evaluation.bootstrap import metric_difference, metric_interval
from fedrag_cli.evaluation.comparison import Evaluated, compare

SETTINGS = EvaluationConfig(resamples=1000)


def rows(values: dict[str, list[float]], start: int = 0) -> list[dict[str, Any]]:
    count = len(next(iter(values.values())))
    return [
        {
            "id": f"q{start + n}",
            "query": f"question {start + n}",
            "metrics": {name: row[n] for name, row in values.items()},
        }
        for n in range(count)
    ]


def test_questions_are_paired_by_id_whatever_their_order() -> None:
    first = rows({"f1": [0.0, 0.5, 1.0, 0.2]})
    second = rows({"f1": [1.0, 0.5, 0.0, 0.3]})
    found = compare(Evaluated("a", first), Evaluated("b", second[::-1]), SETTINGS)
    assert found.won == {"f1": ["q3", "q0"]}
    assert found.lost == {"f1": ["q2"]}
    assert found.differences[0].difference.mean == pytest.approx(0.025)
    assert (found.questions, found.left_out) == (4, 0)


def test_only_common_questions_and_metrics_count() -> None:
    first = rows({"f1": [0.0] * 6, "mrr": [1.0] * 6})
    second = rows({"f1": [1.0] * 6, "rougeL": [1.0] * 6}, start=2)
    found = compare(Evaluated("a", first), Evaluated("b", second), SETTINGS)
    assert (found.questions, found.left_out, found.skipped_metrics) == (4, 4, ["mrr", "rougeL"])
    assert [(item.metric, item.n, item.verdict) for item in found.differences] == [("f1", 4, "better")]
    with pytest.raises(DataError, match="no question in common"):
        compare(Evaluated("a", first), Evaluated("b", rows({"f1": [1.0]}, start=9)), SETTINGS)
    with pytest.raises(DataError, match="no metric in common"):
        compare(Evaluated("a", first), Evaluated("b", rows({"rouge1": [1.0]})), SETTINGS)


def test_losses_are_won_where_they_are_lower() -> None:
    first = rows({"perplexity": [4.0, 8.0, 16.0, 8.0]})
    second = rows({"perplexity": [2.0, 4.0, 8.0, 8.0]})
    found = compare(Evaluated("a", first), Evaluated("b", second), SETTINGS)
    assert found.won["perplexity"] == ["q0", "q1", "q2"]
    assert found.differences[0].before == pytest.approx(8.0)
    assert found.differences[0].after == pytest.approx(2 ** (9 / 4))
    assert found.differences[0].verdict == "better"
    assert "better in perplexity (-3.24" in found.verdict()


def test_perplexity_is_a_geometric_mean_with_paired_draws() -> None:
    generator = random.Random(3)
    before = [generator.uniform(1, 50) for _ in range(200)]
    after = [value * 0.9 for value in before]
    found = metric_difference("perplexity", before, after, resamples=2000)
    interval = metric_interval("perplexity", before, resamples=2000)
    assert found.mean == pytest.approx(-0.1 * interval.mean)
    assert found.low == pytest.approx(-0.1 * interval.high, rel=1e-6)
    assert found.high == pytest.approx(-0.1 * interval.low, rel=1e-6)


def test_resamples_of_a_run_against_each_other_cover_zero_in_95_of_100() -> None:
    generator = random.Random(0)
    values = [float(generator.random() < 0.4) for _ in range(150)]
    covered = 0
    for trial in range(200):
        first, second = (generator.choices(values, k=len(values)) for _ in range(2))
        found = metric_difference("f1", first, second, resamples=1000, seed=trial)
        covered += found.low <= 0 <= found.high
    assert 181 <= covered <= 198


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_command(write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"resamples": 300, "metrics": ["mrr", "recall@1", "f1"], "confidence": 0.8}
    config = str(write_config(run={"seed": 7}, evaluation=settings))
    assert main(["train", config, "--json"]) == 0
    trained = document(capsys)
    run = trained["run_dir"]
    assert main(["evaluate", config, "--json"]) == 0
    untuned = document(capsys)["run_dir"]

    # Before against after, and an evaluation of the same models: the same numbers.
    assert main(["compare", run, "--json"]) == 0
    own = document(capsys)
    for known, found in zip(trained["differences"], own["comparisons"][0]["differences"], strict=True):
        assert {name: found[name] for name in known} == known
    assert main(["evaluate", run, "--json"]) == 0
    tuned = document(capsys)
    assert main(["compare", untuned, tuned["run_dir"], "--json"]) == 0
    assert document(capsys)["metrics"][tuned["run_dir"]] == tuned["metrics"]
    assert main(["compare", untuned, run, "--json", "--plot", str(tmp_path / "difference.png")]) == 0
    other = document(capsys)
    assert (tmp_path / "difference.png").read_bytes().startswith(b"\x89PNG")
    assert other["plot"] == str(tmp_path / "difference.png")
    for found in (own, other):
        item = found["comparisons"][0]
        assert [d["metric"] for d in item["differences"]] == ["mrr", "recall@1", "f1"]
        for difference, known in zip(item["differences"], trained["differences"], strict=True):
            assert difference["before"] == pytest.approx(known["before"])
            assert difference["difference"]["mean"] == pytest.approx(known["difference"]["mean"])
            assert difference["won"] == len(item["won"][difference["metric"]])

    # The same models again: nothing to see.
    assert main(["compare", untuned, f"{run}:before", "--json"]) == 0
    same = document(capsys)["comparisons"][0]
    assert {item["verdict"] for item in same["differences"]} == {"no difference shown"}
    assert all(item["difference"]["low"] == item["difference"]["high"] == 0 for item in same["differences"])

    assert main(["compare", untuned, run, f"{run}:before", "--examples", "2"]) == 0
    shown = capsys.readouterr().err
    assert f"tiny {run[-6:]} (after) against tiny-evaluation {untuned[-6:]} (evaluated):" in shown
    assert "no difference shown in mrr, recall@1, f1." in shown


def test_plots_overwrite_nothing_but_plots(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(evaluation={"resamples": 50, "metrics": ["mrr"]})
    assert main(["evaluate", str(config), "--json"]) == 0
    run = document(capsys)["run_dir"]
    for name in ("config.yaml", "plot", "plot.jpg"):
        target = tmp_path / name
        before = target.read_bytes() if target.exists() else None
        assert main(["compare", run, run, "--plot", str(target), "--force"]) == 2
        assert "does not end in a format that plots are written in." in capsys.readouterr().err
        assert (target.read_bytes() if target.exists() else None) == before
    assert main(["compare", run, run, "--plot", str(tmp_path / "runs")]) == 2
    for suffix, start in ((".png", b"\x89PNG"), (".PDF", b"%PDF"), (".svg", b"<?xml")):
        target = tmp_path / f"difference{suffix}"
        # A picture too may be somebody's own.
        target.write_bytes((Path(run) / "plots" / "metrics.png").read_bytes())
        own = target.read_bytes()
        assert main(["compare", run, run, "--plot", str(target)]) == 2
        assert "is there already and is no plot of fedrag compare." in capsys.readouterr().err
        assert target.read_bytes() == own
        assert main(["compare", run, run, "--plot", str(target), "--force"]) == 0
        assert target.read_bytes().startswith(start)
        assert main(["compare", run, run, "--plot", str(target)]) == 0
        assert f"Wrote {target}\n" in capsys.readouterr().err
        assert main(["compare", run, run, "--plot", str(target), "--quiet"]) == 0
        assert capsys.readouterr().err == ""


def test_gates_for_ci(write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(evaluation={"resamples": 200, "metrics": ["mrr", "negative_log_likelihood"]})
    config, questions = str(path), path.with_name("test.jsonl")
    # Ends of lines for str.splitlines, but not for JSON lines.
    text = (
        questions.read_text(encoding="utf-8").replace("colour of", "colour\u2028of").replace("where", "where\x85\u2029")
    )
    questions.write_text(text, encoding="utf-8")
    runs = []
    for _ in range(2):
        assert main(["evaluate", config, "--json"]) == 0
        runs.append(document(capsys)["run_dir"])
    assert main(["compare", *runs, "--fail-if-worse", "--fail-under", "mrr=0.01"]) == 0
    capsys.readouterr()
    assert main(["compare", *runs, "--fail-under", "mrr=1.01", "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["failures"][0].startswith("mrr of ")
    assert "under 1.01" in shown.err
    assert main(["compare", *runs, "--fail-under", "negative_log_likelihood=0.01"]) == 1
    assert "above 0.01" in capsys.readouterr().err

    records = Path(runs[1]) / "evaluation" / "evaluated-predictions.jsonl"
    worse = [json.loads(line) for line in records.read_text(encoding="utf-8").split("\n") if line]
    assert any("\u2028" in row["query"] for row in worse)
    assert any("\x85\u2029" in row["query"] for row in worse)
    for row in worse:
        row["metrics"]["mrr"] = 0.0
    records.write_text("".join(json.dumps(row) + "\n" for row in worse), encoding="utf-8")
    assert main(["compare", *runs, "--fail-if-worse"]) == 1
    shown = capsys.readouterr().err
    assert "worse in mrr" in shown
    assert "no difference shown in negative_log_likelihood" in shown
    assert "Failed:" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 2, "'nowhere' does not exist."),
        (["RUN"], 2, "no evaluation 'before'"),
        (["RUN:evaluated"], 2, "nothing to compare"),
        (["RUN", "RUN:middle"], 2, "It has: evaluated"),
        (["RUN", "RUN", "--fail-under", "mrr"], 2, "--fail-under takes METRIC=VALUE"),
        (["RUN", "RUN", "--fail-under", "f1=0.5"], 2, "no metric 'f1'"),
        (["BROKEN", "RUN"], 3, "cannot be read"),
    ],
)
def test_bad_input(
    write_config: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    config = str(write_config(evaluation={"resamples": 50, "metrics": ["mrr"]}))
    assert main(["evaluate", config, "--json"]) == 0
    run = document(capsys)["run_dir"]
    broken = tmp_path / "broken"
    (broken / "evaluation").mkdir(parents=True)
    for name in ("config.yaml", "manifest.json"):
        (broken / name).write_bytes((Path(run) / name).read_bytes())
    (broken / "evaluation" / "after-predictions.jsonl").write_text('{"id": 1}\n', encoding="utf-8")
    named = [text.replace("RUN", run).replace("BROKEN", str(broken)) for text in arguments]
    assert main(["compare", *named]) == code
    assert message in " ".join(capsys.readouterr().err.split())


def test_records_that_are_cut_off_are_compared_with_nothing(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(write_config(evaluation={"resamples": 50, "metrics": ["mrr"]})), "--json"]) == 0
    run = Path(document(capsys)["run_dir"])
    records = run / "evaluation" / "evaluated-predictions.jsonl"
    lines = records.read_bytes().splitlines(keepends=True)
    records.with_name("after-predictions.jsonl").write_bytes(b"".join(lines[:2]))
    records.with_name("after.json").write_text(json.dumps({"n": len(lines)}))
    assert main(["compare", f"{run}:evaluated", f"{run}:after"]) == 3
    assert f"is not whole: it has 2 questions of {len(lines)}" in capsys.readouterr().err


@pytest.mark.parametrize("status", ["running", "interrupted", "failed", None])
def test_a_run_that_is_not_finished_is_compared_with_nothing(
    write_config: Callable[..., Path], capsys: pytest.CaptureFixture[str], status: str | None
) -> None:
    config = str(write_config(evaluation={"resamples": 50, "metrics": ["mrr"]}))
    assert main(["evaluate", config, "--json"]) == 0
    run = Path(document(capsys)["run_dir"])
    records = run / "evaluation" / "evaluated-predictions.jsonl"
    records.rename(records.with_name("before-predictions.jsonl"))
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": status or "done"}), encoding="utf-8")
    for names in ([str(run)], [f"{run}:before", str(run)], [str(run), str(run)]):
        commands = [["compare", "--fail-if-worse"], ["compare", "--fail-under", "mrr=0"], ["report"]]
        # The report of a single run has no differences, and may be made while it runs.
        for command in commands[: 3 if len(names) > 1 else 2]:
            assert main([*command, *names]) == (2 if status else 3)
            shown = " ".join(capsys.readouterr().err.split())
            if status:
                assert f"The run in '{run}' is not finished (status: {status})" in shown
                assert f"fedrag resume {run}" in shown
            else:
                assert f"The run in '{run}' is finished, but what it has recorded after training is gone" in shown
