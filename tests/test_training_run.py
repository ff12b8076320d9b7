from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fedrag_cli.cli.main import main


def test_train_writes_a_whole_run_directory(write_config: Callable[..., Path], capsys) -> None:
    config = write_config()
    assert main(["train", str(config), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    run = Path(summary["run_dir"])
    assert summary["status"] == "done"
    assert {item["metric"] for item in summary["differences"]} == {"mrr", "recall@1", "recall@5", "ndcg@10"}
    for name in ("config.yaml", "manifest.json", "metrics.jsonl", "summary.json", "README.md", "plots/loss.png"):
        assert (run / name).is_file(), name
    assert json.loads((run / "manifest.json").read_text())["status"] == "done"
