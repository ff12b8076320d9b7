"""`fedrag serve-fl`: the server of a federation, from its config to the tuned model in its run directory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrag_cli.commands.federation import (
    federation_summary,
    require_federation,
    run_federation,
    settings_of,
    stored_evaluation,
)
from fedrag_cli.commands.job import Job, open_job, save_models
from fedrag_cli.commands.run_data import RunData, load_run_data, uses_generator
from fedrag_cli.config import Config, ConfigSource
from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.config.validation import trains_with_generator
from fedrag_cli.errors import ConfigError
from fedrag_cli.federated.checkpoint import load_newest_round
from fedrag_cli.federated.endpoint import (
    Address,
    ServerCertificate,
    check_server_settings,
    expiry_note,
    parse_address,
)
from fedrag_cli.federated.fleet.server import FleetServer, listen
from fedrag_cli.federated.fleet.state import limits_of
from fedrag_cli.federated.keys import load_allowed_keys
from fedrag_cli.federated.task import FLTask
from fedrag_cli.federated.weights import BYTES_OF
from fedrag_cli.rag.build import build_rag_system, build_rag_system_without_passages
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.processes import resume_command
from fedrag_cli.runs.reporter import Reporter
from fedrag_cli.trainer_managers.build import build_trainers

SERVER = "server"
PIECES = "pieces"


@dataclass(frozen=True)
class Protection:
    """What protects a server; None for what it does without."""

    certificate: ServerCertificate | None
    folder: Path | None
    """Where the public keys are that may join."""
    allowed: dict[str, bytes] | None
    """These keys, by client name."""


def serve(
    source: ConfigSource,
    reporter: Reporter,
    *,
    command: Sequence[str] = (),
    address: str = "",
    insecure: bool = False,
    run: RunDirectory | None = None,
) -> dict[str, Any]:
    """Serve a new federation, or go on with one after its newest finished round, and see it through.

    Args:
        source: A loaded config. Where its file has an `evaluation` section, the server measures the global model on
            its own data; otherwise it needs no data.
        reporter: Shows what happens.
        command: The command line of a new run, for the manifest.
        address: `HOST:PORT` to listen on; a run that goes on has its own.
        insecure: Whether to do without TLS and keys also where other machines can reach the address.
        run: The server's run that goes on.

    Returns:
        The summary, as `summary.json` has it.

    Raises:
        FedRAGError: The config, a model or the address is wrong, or the federation failed.
    """
    config = source.config
    evaluates = ("evaluation",) in source.tree.positions
    own: dict[str, Any] = {"role": SERVER, "side": require_federation(config), "address": address, "insecure": insecure}
    own = {**own, "evaluates": evaluates} if run is None else run.manifest()["federation"]
    where = parse_address(own["address"])
    protection = _protection(settings_of(config), where, insecure=own["insecure"])
    # That the address is taken is better known before models are loaded.
    listen(where.host, where.port).close()
    _note_weak_points(protection, settings_of(config), reporter)
    if own["evaluates"] and config.dataset.corpus is None:
        raise ConfigError(
            "The config has an evaluation section, so the server measures the global model, but no dataset.corpus.",
            "Add corpus and test data, or remove the evaluation section.",
        )
    with open_job(source, reporter, run, command=command, federation=own) as job:
        data = load_run_data(config) if own["evaluates"] else None
        rag_system = job.load(lambda: _load_rag_system(config, data, reporter), None)
        return _serve(job, data, task_without_data(config, rag_system), where, protection)


def task_without_data(config: Config, rag_system: RAGSystem | None = None) -> FLTask:
    """Return the task of a server, around a RAG system that is loaded without passages where there is none."""
    side = require_federation(config)
    if rag_system is None:
        rag_system = build_rag_system_without_passages(config, with_generator=trains_with_generator(config))
    return FLTask(build_trainers(config, rag_system, train=[], validation=[])[side], settings_of(config))


def _load_rag_system(config: Config, data: RunData | None, reporter: Reporter) -> RAGSystem:
    if data is None:
        with_generator = trains_with_generator(config)
        return build_rag_system_without_passages(config, with_generator=with_generator, reporter=reporter)
    return build_rag_system(config, nodes=data.nodes, with_generator=uses_generator(config, data), reporter=reporter)


def _serve(job: Job, data: RunData | None, task: FLTask, where: Address, protection: Protection) -> dict[str, Any]:
    run, settings, reporter, rag_system = job.run, task.settings, job.reporter, task.trainer.rag_system
    done = load_newest_round(run.checkpoints)
    width = BYTES_OF[settings.transport_dtype]
    folder = protection.folder
    with FleetServer(
        where.host,
        where.port,
        certificate=protection.certificate,
        allowed=protection.allowed,
        read_allowed=(lambda: load_allowed_keys(folder)) if folder is not None else None,
        reporter=reporter,
        max_message_bytes=limits_of([width * math.prod(shape) for shape in task.agreement.manifest.values()]),
        pieces=run.path / PIECES,
    ) as server:
        assert server.grid is not None
        listening = str(Address(where.host, server.address[1]))
        run.update_manifest(listening=listening)
        reporter.event("started", mode=job.config.trainer.mode, role=SERVER)
        reporter.event(
            "listening",
            address=listening,
            tls=protection.certificate is not None,
            keys=protection.allowed is not None,
            rounds=settings.rounds,
            done=done.number if done is not None else 0,
            min_clients=settings.min_clients,
        )
        state = run_federation(job, data, server.grid, task, rag_system, settings, shares_model=False)
    save_models(run, rag_system, job.config)
    summary = federation_summary(
        job,
        data,
        stored_evaluation(run, "before"),
        stored_evaluation(run, "after"),
        rounds=state.history,
        evaluations=state.evaluations,
        overlaps=[],
        missing=state.missing or [],
    )
    job.finish_tuning(summary)
    if state.missing:
        reporter.note(
            f"Without the final model: {', '.join(state.missing)}. When they are back, hand it out with: "
            f"{resume_command(run.path)}"
        )
    return summary


def _protection(settings: FederatedConfig, where: Address, *, insecure: bool) -> Protection:
    """Read certificate and keys, before anything is loaded; see `check_server_settings`."""
    tls, keys = check_server_settings(settings, where, insecure=insecure)
    certificate = None
    if tls:
        certificate = ServerCertificate(Path(str(settings.certificate)), Path(str(settings.certificate_key)))
    folder = Path(str(settings.allowed_keys)) if keys else None
    return Protection(certificate, folder, load_allowed_keys(folder) if folder is not None else None)


def _note_weak_points(protection: Protection, settings: FederatedConfig, reporter: Reporter) -> None:
    """Say that the certificate expires soon, and that too few keys are there; more may be added while it runs."""
    if protection.certificate is not None and (expiry := expiry_note(protection.certificate.certificate)):
        reporter.note(expiry)
    if protection.allowed is None or len(protection.allowed) >= settings.min_clients:
        return
    count = len(protection.allowed)
    reporter.note(
        f"{count} {'key' if count == 1 else 'keys'} in federated.allowed_keys, but federated.min_clients is "
        f"{settings.min_clients}: put the other clients' public keys there"
    )
