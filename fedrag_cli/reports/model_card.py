"""The model card of a run: its README.md, which says what was tuned, on what, and what it changed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from fedrag_cli.reports.diagnostics import diagnostics_section
from fedrag_cli.runs.reporter import epsilon_text
from fedrag_cli.text import LONGEST_CELL, fenced, markdown_code, markdown_text, table

ENCODERS = {"query": "query encoder only", "both": "query and passage encoder"}


def model_card(summary: Mapping[str, Any]) -> str:
    """Return the model card of a run in Markdown, with YAML front matter.

    The same summary gives the same card. Absolute paths are cut to their last part, because they say nothing on another
    machine and may name people.

    Args:
        summary: What is known of the run, as `summary.json` has it; what a run does not have is left out or empty.
    """
    sections = [
        _head(summary),
        _tuned(summary["tuned"]),
        _results(summary),
        _untuned(summary.get("untuned") or {}),
        _federation(summary),
        _comparison(summary),
        diagnostics_section(summary.get("diagnostics") or {}),
        _plots(summary.get("plots") or ()),
        _loading(summary["tuned"]),
        _data(summary["data"], summary.get("fingerprints") or {}),
        _training(summary),
        _truncation(summary.get("truncated") or {}, summary.get("lengths") or ()),
        _versions(summary.get("versions") or {}),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(summary: Mapping[str, Any]) -> str:
    front_matter = yaml.safe_dump({"tags": ["fedrag", "rag"]}, sort_keys=False)
    title = f"---\n{front_matter}---\n\n# {markdown_text(summary['run_name'])}"
    if summary["status"] == "done":
        return title
    return f"{title}\n\n**This run did not finish: its status is {markdown_code(summary['status'])}.**"


def _tuned(tuned: Mapping[str, Any]) -> str:
    lines = ["## What was tuned", ""]
    for side in ("retriever", "generator"):
        part = tuned[side]
        if part is None:
            lines.append(f"- **{side.capitalize()}**: not tuned.")
            continue
        details = ", ".join([f"trainer {markdown_code(part['trainer'])}", *tuning_details(part)])
        lines.append(f"- **{side.capitalize()}**: {markdown_code(portable(part['model']))}, {details}.")
    return "\n".join(lines)


def tuning_details(part: Mapping[str, Any]) -> list[str]:
    """Return what of a model was tuned, in words."""
    encoders = [ENCODERS.get(part["train"], part["train"])] if part.get("train") else []
    adapter = ["LoRA adapter" if part["adapter"] else "all weights"] if "adapter" in part else []
    return encoders + adapter


def _difference_row(item: Mapping[str, Any]) -> list[str]:
    change = item["difference"]
    interval = f"{100 * item['confidence']:g} %: {change['low']:+.4f} to {change['high']:+.4f}"
    means = [f"{item['before']:.4f}", f"{item['after']:.4f}", f"{change['mean']:+.4f}"]
    return [item["metric"], str(item["n"]), *means, interval, item["verdict"]]


def _untuned(comparison: Mapping[str, Any]) -> str:
    if not comparison:
        return ""
    rows = [[row["name"], *_difference_row(item)] for row in comparison["rows"] for item in row["differences"]]
    columns = ["Retrieval", "Metric", "n", "Untuned", "Tuned", "Difference", "Interval", "Verdict"]
    return (
        f"## Against retrieval without tuning\n\n{table(columns, rows, numbers=range(2, 6))}\n\n"
        f"{comparison['verdict']} BM25 ranks by words, dense by the untuned encoder, hybrid by both."
    )


def _results(summary: Mapping[str, Any]) -> str:
    differences = summary.get("differences") or ()
    if not differences:
        return ""
    rows = [_difference_row(item) for item in differences]
    split = f" on the {summary['split']} split" if summary.get("split") else ""
    compared = table(["Metric", "n", "Before", "After", "Difference", "Interval", "Verdict"], rows, numbers=range(1, 5))
    warnings = "".join(f"**{overlap['message']}.**\n\n" for overlap in summary.get("overlaps") or ())
    return (
        f"## Before and after{split}\n\n{compared}\n\n{warnings}"
        "Both were measured on the same n questions; the interval is that of a paired bootstrap over them. "
        "A verdict needs an interval without 0. It speaks for questions like these, and for this one run."
    )


def _federation(summary: Mapping[str, Any]) -> str:
    rounds = summary.get("rounds") or ()
    if not rounds:
        return ""
    cells = [round_cells(row) for row in rounds]
    outliers = ["Outliers"] if any(row["Outliers"] for row in cells) else []
    columns = ["Round", "Clients", "Refused", *outliers, "Examples", "Loss"]
    rows = [[row[name] for name in columns] for row in cells]
    listed = table(columns, rows, numbers=(0, len(columns) - 2, len(columns) - 1))
    if spent := epsilon_text(rounds[-1], long=True):
        listed += (
            f"\n\nDifferential privacy of each client's part in these weights: {spent}, over all rounds. The noise on "
            "the mean of a round was its noise multiplier times the clipping norm over the number of its updates. "
            "What clients reported beside them has none."
        )
    if own := epsilon_text(rounds[-1], prefix="own_", long=True):
        listed += f"\n\nThis client's own noise on the updates that it sent, by its own account: {own}."
    parts = {
        "server": "This is the global model, as the server of a federation keeps it.",
        "client": "This is the global model, as a client of a federation keeps it; the loss is its own.",
        "simulation": "This is the global model of a federation that was simulated in one process.",
    }
    return f"## Federation\n\n{parts.get(summary.get('role', ''), '')}\n\n{listed}"


def round_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Return what tables of rounds show of one, by the names of their columns."""
    loss, seconds = row.get("loss"), row.get("seconds")

    def listed(name: str) -> str:
        return "; ".join(f"{client}: {reason}" for client, reason in (row.get(name) or {}).items())

    return {
        "Round": str(row["round"]),
        "Clients": ", ".join(row["clients"]) if "clients" in row else "this one",
        "Refused": listed("refused"),
        "Examples": str(row.get("examples", "")),
        "Loss": f"{loss:.4f}" if loss is not None else "",
        "Seconds": f"{seconds:.0f}" if seconds is not None else "",
        "Epsilon": epsilon_text(row),
        "Outliers": listed("outliers"),
    }


def _comparison(summary: Mapping[str, Any]) -> str:
    comparison = summary.get("comparison")
    if not comparison:
        return ""
    rows = []
    for row in comparison["rows"]:
        for metric, found in row["metrics"].items():
            change = row.get("to_untuned", {}).get(metric, {}).get("difference")
            cell = f"{change['mean']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]" if change else ""
            rows.append([row["name"], metric, str(found["n"]), f"{found['mean']:.4f}", cell])
    level = f"{100 * comparison['confidence']:g} %"
    listed = table(["Model", "Metric", "n", "Mean", f"Difference to untuned, {level}"], rows, numbers=(2, 3))
    verdicts = "\n".join(f"- {markdown_text(verdict, LONGEST_CELL)}" for verdict in comparison["verdicts"])
    return (
        "## What federating is worth\n\nPooled and alone: the same settings and as many passes over the examples. All "
        f"answered the same questions over the whole corpus.\n\n{listed}\n\n{verdicts}"
    )


def _plots(names: Sequence[str]) -> str:
    if not names:
        return ""
    images = [f"![{name.rsplit('.', 1)[0].replace('_', ' ')}](plots/{name})" for name in names]
    return "## Plots\n\n" + "\n\n".join(images)


def _loading(tuned: Mapping[str, Any]) -> str:
    blocks = []
    if tuned["retriever"] is not None:
        blocks.append(
            "from sentence_transformers import SentenceTransformer\n\n"
            'retriever = SentenceTransformer("retriever")\n'
            'query_embeddings = retriever.encode_query(["a question"])\n'
            'passage_embeddings = retriever.encode_document(["a passage"])'
        )
    generator = tuned["generator"]
    if generator is not None and generator["adapter"]:
        blocks.append(
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"{_base_model(generator['model'])}\n"
            'generator = PeftModel.from_pretrained(base_model, "generator")\n'
            'tokenizer = AutoTokenizer.from_pretrained("generator")'
        )
    elif generator is not None:
        blocks.append(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'generator = AutoModelForCausalLM.from_pretrained("generator")\n'
            'tokenizer = AutoTokenizer.from_pretrained("generator")'
        )
    if not blocks:
        return ""
    code = "\n\n".join(fenced(block, "python") for block in blocks)
    return f"## How to load\n\nIn this folder:\n\n{code}"


def _data(counts: Mapping[str, int], fingerprints: Mapping[str, str]) -> str:
    names = dict.fromkeys([*counts, *fingerprints])
    rows = [[name, str(counts.get(name, "")), fingerprints.get(name, "")] for name in names]
    return "## Data\n\n" + table(["Part", "Count", "Fingerprint"], rows, numbers=[1], code=[2])


def _base_model(reference: str) -> str:
    """Return the lines of Python that load the model an adapter belongs to."""
    path = PurePosixPath(reference.removeprefix("package://"))
    arguments = [repr(portable(reference))]
    lines = []
    if reference.startswith("package://"):
        inner = path.parent if path.suffix == ".gguf" else path
        lines.append("from importlib.util import find_spec\n")
        lines.append(f"package = find_spec({path.parts[0]!r}).submodule_search_locations[0]")
        below = "/".join(inner.parts[1:])
        arguments = [f'f"{{package}}/{below}"' if below else "package"]
    elif path.suffix == ".gguf":
        arguments = [repr(str(portable(str(path.parent))))]
    if path.suffix == ".gguf":
        arguments.append(f"gguf_file={path.name!r}")
    lines.append(f"base_model = AutoModelForCausalLM.from_pretrained({', '.join(arguments)})")
    return "\n".join(lines)


def _training(summary: Mapping[str, Any]) -> str:
    command = shlex.join(portable_argument(argument) for argument in summary["command"])
    lines = [f"- Mode: {summary['mode']}", f"- Seed: {summary['seed']}"]
    if summary.get("steps") is not None:
        lines.append(f"- Steps: {summary['steps']}")
    if summary.get("loss") is not None:
        lines.append(f"- Mean training loss: {summary['loss']:.4g}")
    for name, part in (summary.get("phases") or {}).items():
        lines.append(f"  - {name}: {part['loss']:.4g} over {part['steps']} steps")
    for kept in summary.get("kept") or ():
        untuned = f"the untuned ones, which none of {kept['phase']} beat"
        which = f"those of step {kept['step']} of {kept['phase']}" if kept["step"] else untuned
        lines.append(
            f"- Weights that were kept: {which} ({kept['metric']} {kept['value']:.4f} on the validation split)"
        )
    if summary.get("seconds") is not None:
        lines.append(f"- Time of the training: {summary['seconds']:.0f} s")
    text = "## Training\n\n" + "\n".join(lines) + "\n\n" + fenced(command, "sh")
    settings = summary.get("settings")
    if settings:
        dumped = yaml.safe_dump(portable(settings), sort_keys=False, allow_unicode=True)
        text += "\n\nSettings of the trainer:\n\n" + fenced(dumped, "yaml")
    return text


def _truncation(truncated: Mapping[str, int], lengths: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    if truncated:
        rows = [[kind, str(count)] for kind, count in truncated.items()]
        parts.append("Texts that were cut to a model's length:\n\n" + table(["Kind", "Cut"], rows, numbers=[1]))
    parts += [item["message"] for item in lengths if item["message"]]
    return "\n\n".join(["## Truncation", *parts]) if parts else ""


def _versions(versions: Mapping[str, str]) -> str:
    if not versions:
        return ""
    rows = [[name, version] for name, version in versions.items()]
    return "## Versions\n\n" + table(["Package", "Version"], rows)


def portable_argument(argument: str) -> str:
    """Cut the absolute path in an argument of a command line, such as `key=/path`, to its last part."""
    key, separator, value = argument.partition("=")
    return f"{key}={portable(value)}" if separator else str(portable(argument))


def portable(value: Any) -> Any:
    """Cut absolute paths to their last part, in texts and in whatever holds them."""
    if isinstance(value, str):
        for flavour in (PurePosixPath, PureWindowsPath):
            if flavour(value).is_absolute():
                return flavour(value).name
        return value
    if isinstance(value, Mapping):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    return value
