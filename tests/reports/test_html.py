"""`fedrag report`: one HTML file with the numbers of the runs, safe against what stands in the data."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import data_rows, write_rows

from fedrag_cli.cli.main import main
from fedrag_cli.config.fields import GENERATOR_METRICS
from fedrag_cli.reports.html import explain_metric

VOID = {"meta", "br", "img", "link", "input", "hr", "source"}
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" 'single' & {{ 7 * 7 }}"
METRICS = ["mrr", "recall@1", "f1", "negative_log_likelihood"]


class Page(HTMLParser):
    """Reads a page: its text, the attributes of its elements, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.pieces.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of all elements of a name."""
        return [attributes for name, attributes in self.elements if name == tag]


def read(path: Path) -> Page:
    """Read a report, and check what holds for every one: nothing is loaded, and nothing but its own script runs."""
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    for _, attributes in page.elements:
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
        assert (attributes.get("href") or "#").startswith("#")
        assert not {name for name in attributes if name.startswith("on") or name in ("style", "srcset", "action")}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {link["href"] for link in page.all("a")} <= {f"#{name}" for name in ids}
    for picture in page.all("img"):
        assert picture["alt"]
        assert b64decode((picture["src"] or "").partition(",")[2]).startswith(b"\x89PNG")
    assert not page.all("link")
    assert not re.search(r"url\(|@import|<base|<iframe", html)
    (script,) = page.scripts
    policy = next(meta["content"] or "" for meta in page.all("meta") if "http-equiv" in meta)
    assert "default-src 'none'" in policy
    assert b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    return page


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture
def made(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a command and returns its JSON document."""

    def run(*arguments: str, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*arguments, "--json", "--quiet"]) == code
        return document(capsys)

    return run


@pytest.fixture
def config(write_config: Callable[..., Path]) -> Path:
    """A config whose questions and groups hold HTML."""
    path = write_config(evaluation={"resamples": 200, "metrics": METRICS, "group_by": "site"})
    rows = data_rows()["test"]
    for row in rows:
        row["query"] = f"{EVIL} {row['query']}"
        row["site"] = f"<i>{row['site']}</i>"
    write_rows(path.parent / "test.jsonl", rows)
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the content of all files of a folder."""
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_runs_against_an_evaluation(config: Path, tmp_path: Path, made: Callable[..., dict[str, Any]]) -> None:
    untuned = made("evaluate", str(config))["run_dir"]
    trained = made("train", str(config))["run_dir"]
    before = snapshot(tmp_path / "runs")
    compared = made("compare", untuned, trained)
    output = tmp_path / "out" / "report.html"
    found = made("report", untuned, trained, "-o", str(output), "--examples", "2")
    assert snapshot(tmp_path / "runs") == before
    (item,) = compared["comparisons"]
    assert found["report"] == str(output)
    assert [entry["verdict"] for entry in found["verdicts"]] == [item["verdict"]]
    assert found["verdicts"][0]["differences"] == item["differences"]

    page = read(output)
    assert item["verdict"] in [meta.get("content") for meta in page.all("meta")]
    head = page.text.split("Comparisons")[0]
    for clause in item["verdict"].split(": ", 1)[1].removesuffix(".").split("; "):
        assert clause in head
    for row in item["differences"]:
        change = row["difference"]
        numbers = f"{row['before']:.4f} {row['after']:.4f} {change['mean']:+.4f} [{change['low']:+.4f}, "
        assert f"{numbers}{change['high']:+.4f}] {row['n']} {row['won']} {row['lost']}" in page.text
        assert f"{row['verdict']}" in page.text
    for table in compared["metrics"].values():
        for mean in table.values():
            assert f"{mean['mean']:.4f} [{mean['low']:.4f}, {mean['high']:.4f}], n = {mean['n']}" in page.text

    # Each metric's questions, only the first of them unfolded.
    shown = page.text.split("Questions won and lost")[1].split("Reproduce")[0]
    folded = [part for part in page.all("details") if part.get("class") == "metric"]
    assert ["open" in part for part in folded] == [True] + [False] * (len(METRICS) - 1)
    for metric in METRICS:
        won, lost = len(item["won"][metric]), len(item["lost"][metric])
        assert f"{metric} {won} won, {lost} lost" in shown
        for outcome, count in (("Won", won), ("Lost", lost)):
            assert count == 0 or f"{outcome}: {count}{', of which 2 are shown' if count > 2 else ''} <script>" in shown
    after = {row["id"]: row for row in records(Path(trained), "after")}
    name = max(item["won"]["negative_log_likelihood"] + item["lost"]["negative_log_likelihood"])
    assert f"{after[name]['passages'][0]['score']:.3f}" in page.text

    # What stands in the data is text and nothing else.
    assert " ".join(EVIL.split()) in page.text
    assert not page.all("i") + [picture for picture in page.all("img") if picture["src"] == "x"]
    metrics = page.text.split("Means over the questions")[1].split("What was done")[0]
    assert metrics.count("<i>0</i>") == metrics.count("<i>1</i>") == 2
    assert "by site" in metrics


def records(run: Path, stage: str) -> list[dict[str, Any]]:
    """Return a run's records of the questions."""
    lines = (run / "evaluation" / f"{stage}-predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_what_differs_is_shown_of_several_runs(
    config: Path, tmp_path: Path, made: Callable[..., dict[str, Any]]
) -> None:
    first = made("evaluate", str(config))["run_dir"]
    second = made("evaluate", str(config), "rag_system.top_k=3")["run_dir"]
    output = tmp_path / "report.html"
    found = made("report", first, second, f"{first}:evaluated", "-o", str(output))
    assert len(found["verdicts"]) == 2
    page = read(output)
    assert "What differs between the runs Setting " in page.text
    differing = page.text.split("What differs between the runs")[1].split("Kind")[0]
    assert "rag_system.top_k 2 3 tiny" in differing
    assert "run.seed" not in differing
    # Nobody's folders are told: absolute paths are cut.
    assert str(tmp_path) not in page.text
    assert f"fedrag report {Path(first).name} {Path(second).name} {Path(first).name}:evaluated" in page.text


def test_a_single_training_run_is_compared_with_itself_before(
    config: Path, tmp_path: Path, made: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = made("train", str(config))
    run = Path(summary["run_dir"])
    # Whatever a run has drawn is shown, known or not.
    (run / "plots" / "my_own.png").write_bytes((run / "plots" / "loss.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    found = made("report", f"{run}/", "--examples", "0")
    assert found["report"] == "report.html"
    assert " (after) against tiny " in found["verdicts"][0]["verdict"]
    page = read(tmp_path / "report.html")
    assert [picture["alt"] for picture in page.all("img")][1:] == [
        "Loss in training",
        "Learning rate",
        "Before and after training",
        "Diagnostics",
        "Movement",
        "My own",
    ]
    assert "Questions won and lost" not in page.text
    for fact in ("train 14", f"Steps {summary['steps']}", "Seed 42", f"torch {summary['versions']['torch']}"):
        assert fact in page.text
    assert summary["fingerprints"]["passages"] in page.text
    assert "learning_rate: 0.001" in page.text


def test_a_single_evaluation_has_nothing_to_compare(
    config: Path, tmp_path: Path, made: Callable[..., dict[str, Any]]
) -> None:
    summary = made("evaluate", str(config))
    output = tmp_path / "report.html"
    assert made("report", summary["run_dir"], "-o", str(output))["verdicts"] == []
    page = read(output)
    assert "Nothing is compared here: this is one evaluation." in page.text
    for group, metrics in summary["groups"].items():
        assert group in page.text
        assert f"{metrics['mrr']['mean']:.4f}" in page.text
    assert "#comparisons" not in {link["href"] for link in page.all("a")}
    made("report", f"{summary['run_dir']}:evaluated", "-o", str(output))


def test_a_simulated_federation_has_its_rounds(
    write_config: Callable[..., Path], tmp_path: Path, made: Callable[..., dict[str, Any]]
) -> None:
    trainer = {"mode": "retriever", "retriever": {"top_k": 4, "batch_size": 4, "max_steps": 1}}
    config = write_config(trainer=trainer, federated={"rounds": 2}, evaluation={"resamples": 50, "metrics": ["mrr"]})
    summary = made("simulate", str(config))
    output = tmp_path / "report.html"
    made("report", summary["run_dir"], "-o", str(output))
    page = read(output)
    rounds = page.text.split("Rounds of the federation")[1]
    for row in summary["rounds"]:
        measured = summary["evaluations"][str(row["round"])]["server"]["metrics"]["mrr"]
        assert re.search(rf"{row['round']} site-0, site-1 14 {row['loss']:.4f} \d+ (?:[\d.]+ )?{measured:.4f}", rounds)
    assert "mrr, server's questions" in rounds
    assert "Federation, simulated in one process" in page.text


@pytest.mark.parametrize("damage", [{"tuned": 5}, {"lengths": [3]}, {"settings": "x"}, {"overlaps": [{}]}])
def test_a_damaged_summary_is_told(
    config: Path, tmp_path: Path, made: Callable[..., dict[str, Any]], damage: dict[str, Any]
) -> None:
    run = Path(made("evaluate", str(config))["run_dir"])
    file = run / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | damage), encoding="utf-8")
    error = made("report", str(run), "-o", str(tmp_path / "report.html"), code=3)["error"]
    assert "has recorded of itself is damaged" in error["message"]


def test_a_run_that_has_not_finished(config: Path, tmp_path: Path, made: Callable[..., dict[str, Any]]) -> None:
    run = Path(made("evaluate", str(config))["run_dir"])
    (run / "summary.json").unlink()
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted"}), encoding="utf-8")
    output = tmp_path / "report.html"
    made("report", str(run), "-o", str(output))
    assert "Status interrupted" in read(output).text
    (run / "config.yaml").write_text("rag_system: [", encoding="utf-8")
    assert "config.yaml' cannot be read" in made("report", str(run), "-o", str(output), code=3)["error"]["message"]


def test_answers_and_passages_of_a_question(
    config: Path, tmp_path: Path, made: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [made("evaluate", str(config))["run_dir"] for _ in range(2)]
    passages = [{"id": "colour-cat", "score": 0.91234}, {"id": "home-<b>", "score": 0.5}]
    row = {"id": 7, "query": "a\n\udc80", "accepted": ["red", ""], "relevant_ids": ["colour-cat", "other"]}
    for run, value, answer in zip(runs, (0.25, 1.0), ("blue", "</p>red"), strict=True):
        record = {**row, "passages": passages, "answer": answer, "metrics": {"f1": value, "perplexity": 9 * value}}
        file = Path(run) / "evaluation" / "evaluated-predictions.jsonl"
        file.write_text(json.dumps(record) + "\n", encoding="utf-8")
        evaluation = file.with_name("evaluated.json")
        evaluation.write_text(
            json.dumps({**json.loads(evaluation.read_text(encoding="utf-8")), "n": 1}), encoding="utf-8"
        )
    output = tmp_path / "report.html"
    capsys.readouterr()
    assert main(["report", *runs, "-o", str(output)]) == 0
    shown = capsys.readouterr().err
    assert "no difference shown in f1, perplexity." in shown
    assert f"wrote {output}" in shown
    page = read(output)
    asked = page.text.split("Questions won and lost")[1]
    found = "“blue” colour-cat 0.912 ✓ relevant home-<b> 0.500 Relevant, but not among these: other"
    assert found in asked
    assert "Accepted: red | (no answer)" in asked
    assert "“</p>red”" in asked
    # More is better for the one, and worse for the other.
    assert "f1 1 won, 0 lost" in asked
    assert "perplexity 0 won, 1 lost" in asked


def test_what_is_no_report_is_not_overwritten(
    config: Path, tmp_path: Path, made: Callable[..., dict[str, Any]]
) -> None:
    run = made("evaluate", str(config))["run_dir"]
    output = tmp_path / "precious.html"
    output.write_text("<html>mine</html>", encoding="utf-8")
    error = made("report", run, "-o", str(output), code=2)["error"]
    assert "is no report of fedrag" in error["message"]
    assert "--force" in error["hint"]
    assert output.read_text(encoding="utf-8") == "<html>mine</html>"
    made("report", run, "-o", str(output), "--force")
    # A report takes the place of an older one.
    made("report", run, "-o", str(output))
    read(output)
    assert "is a folder" in made("report", run, "-o", str(tmp_path), "--force", code=2)["error"]["message"]


def test_bad_input(config: Path, tmp_path: Path, made: Callable[..., dict[str, Any]]) -> None:
    run = Path(made("evaluate", str(config))["run_dir"])
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("config.yaml", "manifest.json"):
        (empty / name).write_bytes((run / name).read_bytes())
    output = tmp_path / "report.html"
    for arguments, message in (
        (["nowhere"], "does not exist"),
        ([f"{run}:middle"], "no evaluation 'middle'"),
        ([str(run), f"{run}:middle"], "no evaluation 'middle'"),
        ([str(empty)], "has evaluated nothing yet"),
    ):
        assert message in made("report", *arguments, "-o", str(output), code=2)["error"]["message"]
    # An evaluation is a run of its own, so the same command with the same folder would fail again.
    for command in (["report", str(empty), "-o", str(output)], ["compare", str(empty), str(run)]):
        hint = f"Evaluate it with: fedrag evaluate {empty} and name the run directory that this prints."
        assert made(*command, code=2)["error"]["hint"] == hint
    records_file = run / "evaluation" / "evaluated-predictions.jsonl"
    records_file.write_text('{"id": 1}\n', encoding="utf-8")
    assert "cannot be read" in made("report", str(run), "-o", str(output), code=3)["error"]["message"]
    assert not output.exists()


@pytest.mark.parametrize("name", [*GENERATOR_METRICS, "mrr", "hit@3", "recall@10", "ndcg@10"])
def test_every_metric_is_explained(name: str) -> None:
    text = explain_metric(name)
    assert text.endswith(".")
    assert name.partition("@")[2] in text
