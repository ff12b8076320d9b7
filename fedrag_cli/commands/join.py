"""`fedrag join-fl`: one client of a federation; its data and its index stay with it."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedrag_cli.commands.federation import federation_summary, require_federation, settings_of
from fedrag_cli.commands.job import Job, open_job, save_models
from fedrag_cli.commands.run_data import chosen_metrics, load_rag_system, load_run_data
from fedrag_cli.config import Config, ConfigSource
from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.config.validation import require_training
from fedrag_cli.errors import ConnectionFailedError
from fedrag_cli.federated.checkpoint import ClientRounds
from fedrag_cli.federated.client import ClientHandler
from fedrag_cli.federated.endpoint import ServerAddress, client_authority, parse_address
from fedrag_cli.federated.fleet.client import FleetNode
from fedrag_cli.federated.fleet.state import limits_of
from fedrag_cli.federated.keys import load_or_make_key, load_private_key
from fedrag_cli.federated.task import FLTask
from fedrag_cli.federated.weights import load_weights, save_weights
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.processes import resume_command
from fedrag_cli.runs.reporter import Reporter
from fedrag_cli.trainer_managers.build import build_manager

CLIENT = "client"
FINAL_FILE = "final.json"
KEY_FILE = "node.key"
WORK = "federation"
FINAL_WEIGHTS = "final.safetensors"


def join(
    source: ConfigSource,
    reporter: Reporter,
    *,
    command: Sequence[str] = (),
    address: str = "",
    insecure: bool = False,
    run: RunDirectory | None = None,
) -> dict[str, Any]:
    """Join a federation, or join again with the likelihoods and checkpoints that a run has, and stay until its end.

    Args:
        source: A loaded config.
        reporter: Shows what happens.
        command: The command line of a new run, for the manifest.
        address: `HOST:PORT` of the server; a run that goes on has its own.
        insecure: Whether to do without TLS also where the server is on another machine.
        run: The client's run that goes on.

    Returns:
        The summary, as `summary.json` has it.

    Raises:
        FedRAGError: The config, data or a model is wrong, the server refuses this client or does not answer, or the
            federation failed.
    """
    config = source.config
    own: dict[str, Any] = {"role": CLIENT, "side": require_federation(config), "address": address, "insecure": insecure}
    own = own if run is None else run.manifest()["federation"]
    require_training(config)
    server = _server_address(config, own["address"], insecure=own["insecure"])
    if (own_key := settings_of(config).key) is not None:
        load_private_key(Path(own_key))
    with open_job(source, reporter, run, command=command, federation=own) as job:
        return _join(job, server)


def _join(job: Job, server: ServerAddress) -> dict[str, Any]:
    run, config, settings = job.run, job.config, settings_of(job.config)
    data = load_run_data(config)
    chosen_metrics(config, data)
    key = load_private_key(Path(settings.key)) if settings.key is not None else load_or_make_key(run.path / KEY_FILE)
    node = FleetNode(server, key, job.reporter, connect_timeout=settings.connect_timeout, directory=run.path)
    done = run.read_json_if_there(FINAL_FILE) is not None

    def load() -> RAGSystem:
        if not done and not node.check():
            job.reporter.note(f"The server at {server.address} does not answer yet; loading meanwhile")
        return load_rag_system(config, data, job.reporter)

    rag_system = job.load(load, None)
    reporter = job.reporter
    manager = build_manager(config, rag_system, train=data.train, validation=data.validation, reporter=reporter)
    reporter.event("started", mode=config.trainer.mode, role=CLIENT)
    before = job.evaluate("before", data, rag_system)
    task = manager.get_federated_task(settings, run.path / WORK)
    _note_earlier_noise(run, settings, reporter)
    if done:
        task.load(load_weights(run.path / WORK / FINAL_WEIGHTS))
    else:
        _take_part(run, config, task, node, reporter)
    after = job.evaluate("after", data, rag_system)
    if after is None:
        reporter.note("Nothing was measured here: the config has neither dataset.test nor dataset.validation")
    rounds, evaluations = _rounds(run), _evaluations(run)
    summary = federation_summary(job, data, before, after, rounds=rounds, evaluations=evaluations)
    job.finish_tuning(summary)
    return summary


def _take_part(run: RunDirectory, config: Config, task: FLTask, node: FleetNode, reporter: Reporter) -> None:
    """Answer the server's messages until the final model is saved; raises FederationError where none comes."""

    def keep(measured: dict[str, float]) -> None:
        # On disk before the server is told that it arrived.
        save_weights(task.weights(), run.path / WORK / FINAL_WEIGHTS)
        save_models(run, task.trainer.rag_system, config)
        run.write_json(FINAL_FILE, {"metrics": measured})

    handler = ClientHandler(task, _name(config), reporter, on_final=keep)
    reporter.note("Ready; waiting for the server")
    try:
        # The server may send float32 whatever clients send.
        node.run(handler, limits_of([4 * math.prod(shape) for shape in task.agreement.manifest.values()]))
    except ConnectionFailedError as error:
        error.hint = f"{error.hint} Then go on with: {resume_command(run.path)}".strip()
        raise
    if handler.failure is not None:
        raise handler.failure


def _note_earlier_noise(run: RunDirectory, settings: FederatedConfig, reporter: Reporter) -> None:
    """Say that other runs of this name have sent noisy updates too, which the account of this one leaves out."""
    others = [path.parent for path in run.path.parent.glob(f"*/{WORK}") if path.parent != run.path]
    given = sum(len(ClientRounds(other / WORK, settings).noises) for other in others)
    if given:
        reporter.note(
            f"{given} noisy updates were sent by other runs in '{run.path.parent}'; where they are of the same data, "
            "they spend its privacy beside those of this run"
        )


def _rounds(run: RunDirectory) -> list[dict[str, Any]]:
    """Return what this client did in each round, once where a round was repeated."""
    events = [event for event in run.events() if event["event"] == "client_round"]
    spent = ("own_epsilon", "own_epsilon_replaced", "delta")
    by_round = {
        event["round"]: {"examples": event["examples"], **event["metrics"]}
        | {key: event[key] for key in spent if key in event}
        for event in events
    }
    return [{"round": number, **by_round[number]} for number in sorted(by_round)]


def _evaluations(run: RunDirectory) -> dict[str, Any]:
    """Return how good the global model was on this client's validation questions, by round."""
    events = [event for event in run.events() if event["event"] == "client_evaluation"]
    return {
        str(event["round"]): {"client": {"examples": event["examples"], "metrics": event["metrics"]}}
        for event in events
    }


def _server_address(config: Config, address: str, *, insecure: bool) -> ServerAddress:
    where = parse_address(address)
    tls, authority = client_authority(settings_of(config), where, insecure=insecure)
    return ServerAddress(str(where), tls, authority)


def _name(config: Config) -> str:
    """Return the client's name; the machine's where the config has none."""
    return settings_of(config).name or re.sub(r"[^A-Za-z0-9._-]", "-", platform.node())[:64]
