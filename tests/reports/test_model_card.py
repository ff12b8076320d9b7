"""The model card says what was tuned, on what, and what it changed."""

from __future__ import annotations

from typing import Any

import yaml

from fedrag_cli.reports.model_card import model_card


def full_summary() -> dict[str, Any]:
    return {
        "run_name": "quickstart",
        "status": "done",
        "mode": "alternating",
        "seed": 42,
        "command": ["fedrag", "train", "/home/ada/my work/fedrag.yaml", "dataset.train.path=/srv/data/train.jsonl"],
        "tuned": {
            "retriever": {"model": "package://some_package/model", "trainer": "lsr", "train": "query"},
            "generator": {"model": "/home/ada/models/SmolLM2-135M", "trainer": "ralt", "adapter": True},
        },
        "data": {"train": 120, "validation": 20, "test": 40, "passages": 300},
        "fingerprints": {"train": "0a1b2c", "generator": "ffee00"},
        "split": "test",
        "differences": [
            {
                "metric": "mrr",
                "n": 40,
                "before": 0.5,
                "after": 0.625,
                "difference": {"mean": 0.125, "low": 0.01, "high": 0.24, "n": 40},
                "verdict": "better",
                "confidence": 0.95,
            }
        ],
        "loss": 0.123456,
        "steps": 30,
        "seconds": 61.4,
        "settings": {"mode": "alternating", "retriever": {"type": "lsr", "folders": ("/srv/cache", "kept")}},
        "truncated": {"passages": 3, "queries": 0},
        "versions": {"python": "3.11.4", "torch": "2.10.0"},
        "plots": ["loss.png", "learning_rate.png"],
    }


def minimal_summary() -> dict[str, Any]:
    return {
        "run_name": "r",
        "status": "interrupted",
        "mode": "generator",
        "seed": 1,
        "command": ["fedrag", "train"],
        "tuned": {"retriever": None, "generator": {"model": "org/name", "trainer": "ralt", "adapter": False}},
        "data": {"train": 1, "passages": 2},
    }


def test_front_matter_and_title() -> None:
    _, front_matter, body = model_card(full_summary()).split("---\n", 2)
    assert yaml.safe_load(front_matter) == {"tags": ["fedrag", "rag"]}
    assert body.startswith("\n# quickstart\n\n## What was tuned\n")


def test_the_results() -> None:
    card = model_card(full_summary())
    assert "## Before and after on the test split" in card
    assert "| mrr | 40 | 0.5000 | 0.6250 | +0.1250 | 95 %: +0.0100 to +0.2400 | better |" in card
    table = [line for line in card.splitlines() if line.startswith("| ")]
    assert all(line.count("|") == table[0].count("|") for line in table[:3])


def test_everything_else_is_there() -> None:
    card = model_card(full_summary())
    for text in (
        "- **Retriever**: `package://some_package/model`, trainer `lsr`, query encoder only.",
        "- **Generator**: `SmolLM2-135M`, trainer `ralt`, LoRA adapter.",
        "| train | 120 | `0a1b2c` |",
        "| passages | 300 |  |",
        "| generator |  | `ffee00` |",
        "- Seed: 42",
        "- Steps: 30",
        "- Mean training loss: 0.1235",
        "- Time of the training: 61 s",
        "| passages | 3 |",
        "| torch | 2.10.0 |",
        "![learning rate](plots/learning_rate.png)",
        'SentenceTransformer("retriever")',
        "retriever.encode_query(",
        "retriever.encode_document(",
        "AutoModelForCausalLM.from_pretrained('SmolLM2-135M')",
        'PeftModel.from_pretrained(base_model, "generator")',
    ):
        assert text in card


def test_the_settings_are_yaml() -> None:
    block = model_card(full_summary()).split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == {
        "mode": "alternating",
        "retriever": {"type": "lsr", "folders": ["cache", "kept"]},
    }


def test_no_absolute_paths() -> None:
    card = model_card(full_summary())
    assert "/home" not in card
    assert "/srv" not in card
    assert "my work" not in card
    assert "fedrag train fedrag.yaml dataset.train.path=train.jsonl" in card


def test_paths_of_windows_are_cut_too() -> None:
    summary = minimal_summary()
    summary["tuned"]["generator"]["model"] = "C:\\Users\\ada\\model"
    assert "`model`, trainer" in model_card(summary)


def test_a_run_with_little_to_tell() -> None:
    card = model_card(minimal_summary())
    assert "did not finish: its status is `interrupted`" in card
    assert "- **Retriever**: not tuned." in card
    assert "- **Generator**: `org/name`, trainer `ralt`, all weights." in card
    assert 'AutoModelForCausalLM.from_pretrained("generator")' in card
    for absent in ("SentenceTransformer", "PeftModel", "## Before", "## Plots", "## Truncation", "## Versions", "None"):
        assert absent not in card


def test_the_code_is_python() -> None:
    for summary in (full_summary(), minimal_summary()):
        for part in model_card(summary).split("```python\n")[1:]:
            compile(part.split("```")[0], "card", "exec")


def test_the_same_summary_gives_the_same_card() -> None:
    assert model_card(full_summary()) == model_card(full_summary())
    assert model_card(full_summary()).endswith("|\n")


def test_a_bar_does_not_break_a_table() -> None:
    summary = minimal_summary() | {"versions": {"odd|name": "1"}}
    assert "| odd\\|name | 1 |" in model_card(summary)
