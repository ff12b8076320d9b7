"""What a report says of a run: what was done, with which settings, on which data, and its pictures."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fedrag_cli.errors import DataError
from fedrag_cli.federated.config import public_settings
from fedrag_cli.reports.compare import short_name
from fedrag_cli.reports.model_card import portable, portable_argument, round_cells, tuning_details
from fedrag_cli.runs.directory import RunDirectory

KINDS = {
    None: "Training on one machine",
    "evaluation": "Evaluation",
    "server": "Server of a federation",
    "client": "Client of a federation",
    "simulation": "Federation, simulated in one process",
}
CAPTIONS = {
    "loss": "Loss in training",
    "validation": "Metrics on the validation split during training",
    "learning_rate": "Learning rate",
    "federation": "Rounds of the federation",
    "difference": "Before and after training",
    "metrics": "Metrics with intervals",
}
UNSET = json.dumps(None)
# A run's name and folder say nothing about what it did.
NAMING = ("run.name", "run.output_dir")
WHOSE = {
    "server": "server's questions",
    "clients": "clients' validation questions",
    "client": "this client's questions",
}


def describe_run(path: Path) -> dict[str, Any]:
    """Read what a report says of a run, also of one that has not finished.

    Raises:
        ConfigError: The folder is no run.
        DataError: A file of the run is damaged.
    """
    run = RunDirectory.open(path)
    known = run.manifest() | (run.read_json_if_there("summary.json") or {})
    role = run.role()
    config = _config(run)
    try:
        return {
            "name": short_name(run),
            "facts": _facts(known, role, config),
            "settings": {part: _flat(portable(values)) for part, values in (known.get("settings") or {}).items()},
            "rounds": _rounds(known.get("rounds") or (), known.get("evaluations") or {}),
            "group_by": (config.get("evaluation") or {}).get("group_by"),
            "plots": _plots(run),
            "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
            "compared": {"kind": KINDS.get(role, str(role)), "models": _measured(known, role) or "tuned"}
            | _flat(config),
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"What the run in '{run.path}' has recorded of itself is damaged ({type(error).__name__}: {error}).",
            "Restore its manifest.json and summary.json, or evaluate the run again.",
        ) from error


def what_differs(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the settings whose values are not the same in all runs; nothing for a single run."""
    names = dict.fromkeys(name for run in runs for name in run["compared"] if name not in NAMING)
    values = {name: [run["compared"].get(name, UNSET) for run in runs] for name in names}
    return {
        name: ["" if value == UNSET else value for value in row] for name, row in values.items() if len(set(row)) > 1
    }


def _facts(known: Mapping[str, Any], role: str | None, config: Mapping[str, Any]) -> dict[str, str]:
    tuned = known.get("tuned") or {}
    facts = {
        "Kind": KINDS.get(role, str(role)),
        "Status": known.get("status"),
        "Mode": known.get("mode"),
        "Measured": _measured(known, role),
        "Retriever": _model(config["rag_system"].get("retriever"), tuned.get("retriever")),
        "Generator": _model(config["rag_system"].get("generator"), tuned.get("generator")),
        "Context": known.get("context"),
        "Inference": known.get("inference"),
        "Data": _listed(known.get("data")),
        "Measured on": f"the {known['split']} split" if known.get("split") else None,
        "Shared questions": "; ".join(overlap["message"] for overlap in known.get("overlaps") or ()),
        "Cut to fit": _listed({name: count for name, count in (known.get("truncated") or {}).items() if count}),
        "Cut off": " ".join(item["message"] for item in known.get("lengths") or ()).strip(),
        "Seed": known.get("seed"),
        "Steps": known.get("steps"),
        "Last loss" if known.get("rounds") else "Mean loss": _number(known.get("loss")),
        "Loss by phase": _listed({n: _number(part["loss"]) for n, part in (known.get("phases") or {}).items()}),
        "Time": f"{known['seconds']:.0f} s" if known.get("seconds") is not None else None,
        "Started": known.get("created"),
        "Commit": _commit(known.get("git")),
        "Versions": _listed(known.get("versions")),
        "Fingerprints": _listed(known.get("fingerprints")),
        "Command": shlex.join(portable_argument(argument) for argument in known.get("command") or ()),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "") or name == "Command"}


def _measured(known: Mapping[str, Any], role: str | None) -> str | None:
    """Return which models an evaluation has measured; None for runs that tune models themselves."""
    if role != "evaluation":
        return None
    of = known["evaluation"].get("of")
    return f"the models tuned by {Path(of).parent.name}/{Path(of).name}" if of else "the config's models, not tuned"


def _model(component: Mapping[str, Any] | None, tuned: Mapping[str, Any] | None) -> str | None:
    if component is None:
        return None
    name = portable(component.get("model") or component.get("query_model") or component.get("type"))
    if tuned is None:
        return f"{name}"
    return ", ".join([f"{name}, tuned: trainer {tuned['trainer']}", *tuning_details(tuned)])


def _rounds(rounds: Sequence[Mapping[str, Any]], evaluations: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a table of a federation's rounds, with the metrics of the global model after each; None without any."""
    if not rounds:
        return None
    measured = list(
        dict.fromkeys((name, who) for by in evaluations.values() for who in by for name in by[who]["metrics"])
    )
    first = [{"round": 0, "clients": [], "before": True}] if "0" in evaluations else []
    rows = []
    for row in [*first, *rounds]:
        found = evaluations.get(str(row["round"]), {})
        cells = round_cells(row) | ({"Round": "before"} if row.get("before") else {})
        for name, who in measured:
            value = found.get(who, {}).get("metrics", {}).get(name)
            cells[f"{name}, {WHOSE.get(who, who)}"] = _number(value) or ""
        rows.append(cells)
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    return {
        "columns": columns,
        "numbers": [name for name in columns if name not in ("Clients", "Refused", "Outliers")],
        "rows": [[row[name] for name in columns] for row in rows],
    }


def _plots(run: RunDirectory) -> list[dict[str, Any]]:
    order = {name: place for place, name in enumerate(CAPTIONS)}
    files = sorted(run.plots.glob("*.png"), key=lambda file: (order.get(file.stem, len(order)), file.stem))
    return [
        {"caption": CAPTIONS.get(file.stem, file.stem.replace("_", " ").capitalize()), "picture": file.read_bytes()}
        for file in files
    ]


def _config(run: RunDirectory) -> dict[str, Any]:
    """Return a run's config without absolute paths and without where keys are."""
    try:
        config = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not isinstance(config.get("rag_system"), dict):
            raise ValueError("it has no rag_system")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"'{run.config_file}' cannot be read: {error}", "Restore the file.") from error
    if config.get("federated") is not None:
        config["federated"] = public_settings(config["federated"])
    cut: dict[str, Any] = portable(config)
    return cut


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Return nested settings by their whole names, such as validation.every."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{above}{name}.")
        else:
            # As JSON, numbers, empty texts and what is not set can be told apart.
            plain = isinstance(value, str) and value.strip()
            flat[f"{above}{name}"] = value if plain else json.dumps(value, ensure_ascii=False)
    return flat


def _listed(values: Mapping[str, Any] | None) -> str | None:
    return ", ".join(f"{name} {value}" for name, value in (values or {}).items()) or None


def _commit(git: Mapping[str, Any] | None) -> str | None:
    if not git:
        return None
    return f"{git.get('commit')}" + ("" if git.get("clean") else ", with changes that were not committed")


def _number(value: float | None) -> str | None:
    return f"{value:.4f}" if value is not None else None


Questions = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Records of the questions by the names of the runs and the ids of the questions."""


def won_and_lost(comparison: Mapping[str, Any], questions: Questions, most: int) -> list[dict[str, Any]]:
    """Return the questions that a run has won and lost by each metric, the largest `most` differences first."""
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
