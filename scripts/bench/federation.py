"""Measure federated, pooled and local-only tuning on the English part of XQuAD, and write the figures to RESULTS.md.

    python scripts/bench/federation.py DATA_FOLDER lsr|ralt [--work FOLDER] [--federated-only]

Four sites hold the articles of their `site` column. A server and four clients run as processes over loopback with TLS
and node keys. Pooled and local-only training follow with the same settings and as many passes over the examples; all
are measured on the same 490 questions of validation and test over the whole corpus, with paired intervals. The pooled
retriever is trained twice: in batches as large as those of all sites together, so that it takes as many steps as a
site, and in batches of a site's size, so that it takes as many steps as all sites together.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import machine, write_section

ROOT = Path(__file__).resolve().parents[2]
SITES = ("0", "1", "2", "3")
POOLED_BATCHES = (
    " Pooled: in batches as large as those of all sites together, and (small batches) as large as those of one site."
)
METRICS = {"lsr": ("mrr", "recall@1"), "ralt": ("exact_match", "f1")}
FEDRAG = [sys.executable, "-W", "ignore", "-m", "fedrag_cli"]


def main() -> None:
    """Parse the command line, run, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("name", choices=sorted(METRICS))
    parser.add_argument("--work", type=Path, default=Path("runs/bench-federation"))
    parser.add_argument("--federated-only", action="store_true", help="leave pooled and local-only training out")
    options = parser.parse_args()
    work = options.work.resolve() / options.name
    folders = split_data(options.data.resolve(), work / "data")
    server, clients, seconds = federate(options.name, folders, work)
    values = {"untuned": stored_values(server, "before"), "federated, 4 sites": stored_values(server, "after")}
    if not options.federated_only:
        values |= centralised(options.name, folders, clients, server, work)
    text = table(options.name, values, server, seconds)
    print(text)
    write_section(f"XQuAD, federated {options.name.upper()}", text)


def split_data(data: Path, target: Path) -> dict[str, Path]:
    """Write a folder for each site and one with everything; `relevant_ids` stay, so that all can be measured."""
    folders = {"all": target / "all"} | {site: target / f"site-{site}" for site in SITES}
    files = {name: read(data / f"{name}.jsonl") for name in ("corpus", "train", "validation", "test")}
    files["validation-and-test"] = files["validation"] + files["test"]
    for site, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in files.items():
            own = [row for row in rows if site in ("all", str(row["site"]))]
            lines = "".join(json.dumps(row) + "\n" for row in own)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folders


def read(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def federate(name: str, folders: dict[str, Path], work: Path) -> tuple[Path, dict[str, Path], float]:
    """Run the federation as five processes, and return the run directories and the seconds it took.

    What a former call has finished in the same folder is used again.
    """
    finished = work / "federation.json"
    if finished.exists():
        known = json.loads(finished.read_text(encoding="utf-8"))
        return Path(known["server"]), {site: Path(run) for site, run in known["clients"].items()}, known["seconds"]
    keys = work / "keys"
    if not keys.exists():
        for arguments in (["ca"], ["server", "localhost"], *(["node", f"site-{site}"] for site in SITES)):
            subprocess.run([*FEDRAG, "keys", *arguments, "--dir", str(keys), "--quiet"], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"localhost:{free.getsockname()[1]}"
    config = ROOT / "configs" / "benchmarks" / f"xquad-federated-{name}.yaml"
    protection = [f"federated.certificate={keys}/server.crt", f"federated.certificate_key={keys}/server.key"]
    metrics = f"evaluation.metrics=[{','.join(METRICS[name])}]"
    started = time.monotonic()
    server = start("serve-fl", config, address, folders["all"], work / "server", [
        *protection, f"federated.allowed_keys={keys}", metrics,
    ])  # fmt: skip
    clients = {
        site: start("join-fl", config, address, folders[site], work / f"site-{site}", [
            f"federated.key={keys}/site-{site}.key", f"federated.ca_certificate={keys}/ca.crt",
            "dataset.test=null", "dataset.validation=null",
        ])
        for site in SITES
    }  # fmt: skip
    outcomes = {site: finish(process) for site, process in {"server": server, **clients}.items()}
    runs = {site: Path(summary["run_dir"]) for site, summary in outcomes.items()}
    server_run, seconds = runs.pop("server"), time.monotonic() - started
    known = {"server": str(server_run), "clients": {site: str(run) for site, run in runs.items()}, "seconds": seconds}
    finished.write_text(json.dumps(known), encoding="utf-8")
    return server_run, runs, seconds


def start(
    command: str, config: Path, address: str, data: Path, output: Path, overrides: list[str]
) -> subprocess.Popen[str]:
    """Start a process of the federation."""
    output.mkdir(parents=True, exist_ok=True)
    # The server measures while the clients wait, and the clients train while it waits.
    threads = str(os.cpu_count()) if command == "serve-fl" else "1"
    environment = {**os.environ, "FEDRAG_XQUAD": str(data), "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    arguments = [*FEDRAG, command, str(config), "--address", address, "--json", f"run.output_dir={output}", *overrides]
    log = (output / "log.txt").open("w", encoding="utf-8")
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a process and return its summary."""
    output, _ = process.communicate()
    summary: dict[str, Any] = json.loads(output)
    if process.returncode != 0:
        raise SystemExit(f"{summary}")
    return summary


def stored_values(run: Path, stage: str) -> dict[str, list[float]]:
    """Return the metrics of each question, as a run has stored them."""
    values: dict[str, list[float]] = json.loads((run / "evaluation" / f"{stage}.json").read_text())["values"]
    return values


def centralised(
    name: str, folders: dict[str, Path], clients: dict[str, Path], server: Path, work: Path
) -> dict[str, Any]:
    """Train on everything, and on each site's data alone, and measure both over the whole corpus."""
    from fedrag_cli.commands.simulate import joined_caches

    caches = {site: run / "federation" / "cache" for site, run in clients.items()}
    pooled = joined_caches([server / "federation" / "cache", *caches.values()])
    whole = folders["all"]
    found = {"pooled": once(work / "pooled.json", name, whole, whole, pooled, len(SITES))}
    if name == "lsr":
        found["pooled, small batches"] = once(work / "pooled-small-batches.json", name, whole, whole, pooled, 1)
    alone = [once(work / f"alone-{site}.json", name, folders[site], folders["all"], caches[site], 1) for site in SITES]
    for site, values in zip(SITES, alone, strict=True):
        found[f"site {site} alone"] = values
    # Each question's mean over the four models.
    found["each site alone, mean"] = {
        metric: [sum(rows) / len(rows) for rows in zip(*(values[metric] for values in alone), strict=True)]
        for metric in METRICS[name]
    }
    return found


def once(finished: Path, name: str, data: Path, everything: Path, cache: Path, sites: int) -> dict[str, list[float]]:
    """Train and measure as `train` does, or return what a former call has found."""
    if not finished.exists():
        finished.write_text(json.dumps(train(name, data, everything, cache, sites)), encoding="utf-8")
    known: dict[str, list[float]] = json.loads(finished.read_text(encoding="utf-8"))
    return known


def train(name: str, data: Path, everything: Path, cache: Path, sites: int) -> dict[str, list[float]]:
    """Train with the federation's settings and as many passes over the examples, and measure on all questions.

    Args:
        name: lsr or ralt.
        data: Folder of the training data.
        everything: Folder of all data, to measure on.
        cache: Folder with likelihoods that are known already.
        sites: Number of sites whose batches (lsr) or steps (ralt) are taken together.
    """
    import dataclasses

    from fedrag_cli.commands.run_data import load_run_data
    from fedrag_cli.commands.simulate import with_all_passes
    from fedrag_cli.config import load_config
    from fedrag_cli.evaluation.evaluator import evaluate
    from fedrag_cli.rag.build import build_knowledge_store, build_rag_system
    from fedrag_cli.runs.reporter import SilentReporter
    from fedrag_cli.trainer_managers.build import build_trainers

    config_file = ROOT / "configs" / "benchmarks" / f"xquad-federated-{name}.yaml"
    os.environ["FEDRAG_XQUAD"] = str(data)
    side = "retriever" if name == "lsr" else "generator"
    config = with_all_passes(load_config(config_file), sites)
    if name == "lsr":
        joined = dataclasses.replace(config.trainer.retriever, batch_size=config.trainer.retriever.batch_size * sites)
        config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, retriever=joined))
    own = load_run_data(config)
    rag_system = build_rag_system(config, nodes=own.nodes)
    trainer = build_trainers(config, rag_system, train=own.train, validation=[])[side]
    cache.mkdir(parents=True, exist_ok=True)
    trainer.cache_directory = cache
    trainer.train()
    os.environ["FEDRAG_XQUAD"] = str(everything)
    whole = load_run_data(load_config(config_file))
    rag_system.knowledge_store = build_knowledge_store(rag_system.retriever, whole.nodes, SilentReporter())
    return evaluate(rag_system, whole.evaluation, METRICS[name], config.evaluation).values


def table(name: str, values: dict[str, dict[str, list[float]]], server: Path, seconds: float) -> str:
    """Write all models as a Markdown table, with paired differences to the untuned and to the pooled one."""
    from fedrag_cli.evaluation.bootstrap import paired_difference

    rows = [
        "| model | metric | n | mean | difference to untuned | difference to pooled |",
        "| --- | --- | ---: | ---: | --- | --- |",
    ]
    for model, by_metric in values.items():
        for metric in METRICS[name]:
            own = by_metric[metric]
            cells = []
            for other in ("untuned", "pooled"):
                if other == model or other not in values:
                    cells.append("")
                    continue
                difference = paired_difference(values[other][metric], own)
                cells.append(f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]")
            rows.append(f"| {model} | {metric} | {len(own)} | {sum(own) / len(own):.4f} | {cells[0]} | {cells[1]} |")
    summary = json.loads((server / "summary.json").read_text(encoding="utf-8"))
    done = ", ".join(f"{row['seconds']:.0f} s" for row in summary["rounds"])
    config = f"configs/benchmarks/xquad-federated-{name}.yaml"
    only = "" if "pooled" in values else " --federated-only"
    facts = (
        f"`python scripts/bench/federation.py DATA_FOLDER {name}{only}`, config `{config}`: a server and four clients "
        f"over loopback with TLS and node keys, {len(summary['rounds'])} rounds ({done}), {seconds:.0f} s in all. "
        + ("" if only else "Pooled and alone: the same settings and as many passes over the examples.")
        + (POOLED_BATCHES if name == "lsr" and not only else "")
    )
    return "\n".join([facts, "", *rows, "", machine()])


if __name__ == "__main__":
    main()
