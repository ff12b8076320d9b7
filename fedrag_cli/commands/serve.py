"""`fedrag serve-fl`: the server of a federation, from its config to the tuned model in its run directory."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrag_cli.commands.federation import (
    create_run,
    federation_summary,
    require_federation,
    run_federation,
    settings_of,
    stored_evaluation,
)
from fedrag_cli.commands.job import (
    RunData,
    RunReporter,
    life_cycle,
    load_run_data,
    model_fingerprints,
    record_fingerprints,
    require_unchanged,
    save_models,
    uses_generator,
    write_results,
)
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
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.interrupt import terminable
from fedrag_cli.runs.metrics_log import seconds_spent
from fedrag_cli.runs.processes import resume_command
from fedrag_cli.runs.reporter import Reporter
from fedrag_cli.trainer_managers.build import build_trainers

SERVER = "server"
PIECES = "pieces"


@dataclass(frozen=True)
class Protection:
    """What protects a server; None for what it does without.

    Args:
        certificate: Its certificate.
        folder: Where the public keys are that may join.
        allowed: These keys, by client name.
    """

    certificate: ServerCertificate | None
    folder: Path | None
    allowed: dict[str, bytes] | None

    def read_allowed(self) -> dict[str, bytes]:
        """Return the keys that are in the folder now.

        Raises:
            ConfigError: One of them is damaged.
        """
        return load_allowed_keys(self.folder) if self.folder is not None else {}


def start_serving(
    source: ConfigSource, address: str, *, insecure: bool, command: Sequence[str], reporter: Reporter
) -> dict[str, Any]:
    """Serve a new federation and see it through.

    Args:
        source: A loaded config. Where its file has an `evaluation` section, the server measures the global model on
            its own data; otherwise it needs no data.
        address: `HOST:PORT` to listen on.
        insecure: Whether to do without TLS and keys also where other machines can reach the address.
        command: The command line, for the manifest.
        reporter: Shows what happens.

    Returns:
        The summary, as `summary.json` has it.

    Raises:
        FedRAGError: The config, a model or the address is wrong, or the federation failed.
    """
    config = source.config
    side = require_federation(config)
    where = parse_address(address)
    protection = _protection(settings_of(config), where, insecure=insecure)
    _check_free(where)
    _note_weak_points(protection, settings_of(config), reporter)
    evaluates = ("evaluation",) in source.tree.positions
    if evaluates and config.dataset.corpus is None:
        raise ConfigError(
            "The config has an evaluation section, so the server measures the global model, but no dataset.corpus.",
            "Add corpus and test data, or remove the evaluation section.",
        )
    with terminable():
        data = load_run_data(config) if evaluates else None
        settings = {"address": address, "insecure": insecure, "evaluates": evaluates}
        run = create_run(source, command, role=SERVER, side=side, **settings)
        with life_cycle(run, is_new=True):
            reporter.note(f"Run directory: {run.path}")
            task = _build_task(config, side, data, reporter)
            return _see_through(run, config, data, task, where, protection, reporter)


def resume_serving(run: RunDirectory, source: ConfigSource, reporter: Reporter) -> dict[str, Any]:
    """Go on with a federation after its newest finished round, at the same address.

    Args:
        run: The server's run directory.
        source: Its config.
        reporter: Shows what happens.
    """
    federation, config = run.manifest()["federation"], source.config
    where = parse_address(federation["address"])
    protection = _protection(settings_of(config), where, insecure=federation["insecure"])
    _check_free(where)
    _note_weak_points(protection, settings_of(config), reporter)
    with life_cycle(run):
        data = load_run_data(config) if federation["evaluates"] else None
        task = _build_task(config, federation["side"], data, reporter)
        return _see_through(run, config, data, task, where, protection, reporter)


def _build_task(config: Config, side: str, data: RunData | None, reporter: Reporter) -> FLTask:
    rag_system = (
        build_rag_system(config, nodes=data.nodes, with_generator=uses_generator(config, data), reporter=reporter)
        if data is not None
        else build_rag_system_without_passages(config, with_generator=trains_with_generator(config), reporter=reporter)
    )
    return FLTask(build_trainers(config, rag_system, train=[], validation=[])[side], settings_of(config))


def _see_through(
    run: RunDirectory,
    config: Config,
    data: RunData | None,
    task: FLTask,
    where: Address,
    protection: Protection,
    reporter: Reporter,
) -> dict[str, Any]:
    settings = task.settings
    reporter = RunReporter(run.open_log(), reporter)
    # A run that goes on counts what its earlier parts have taken.
    started = time.monotonic() - seconds_spent(run.events())
    rag_system = task.trainer.rag_system
    record_fingerprints(run, rag_system)
    require_unchanged(run, "base models", model_fingerprints(rag_system))
    done = load_newest_round(run.checkpoints)
    with _server(where, protection, task, run.path / PIECES, reporter) as server:
        assert server.grid is not None
        port = server.address[1]
        run.update_manifest(listening=str(Address(where.host, port)))
        reporter.event("started", mode=config.trainer.mode, role=SERVER)
        reporter.event(
            "listening",
            address=str(Address(where.host, port)),
            tls=protection.certificate is not None,
            keys=protection.allowed is not None,
            rounds=settings.rounds,
            done=done.number if done is not None else 0,
            min_clients=settings.min_clients,
        )
        state = run_federation(run, config, data, server.grid, task, rag_system, settings, reporter, shares_model=False)
    save_models(run, rag_system, config)
    summary = federation_summary(
        run,
        config,
        role=SERVER,
        counts=data.counts() if data is not None else {},
        split=data.split if data is not None else None,
        before=stored_evaluation(run, "before"),
        after=stored_evaluation(run, "after"),
        rounds=state.history,
        evaluations=state.evaluations,
        seconds=time.monotonic() - started,
    )
    summary["missing"] = state.missing or []
    write_results(run, summary)
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


def _check_free(where: Address) -> None:
    """Raise ConnectionFailedError where the address is taken, which is better known before models are loaded."""
    listen(where.host, where.port).close()


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


def _server(where: Address, protection: Protection, task: FLTask, pieces: Path, reporter: Reporter) -> FleetServer:
    width = BYTES_OF[task.settings.transport_dtype]
    most_bytes = limits_of([width * math.prod(shape) for shape in task.agreement.manifest.values()])
    return FleetServer(
        where.host,
        where.port,
        certificate=protection.certificate,
        allowed=protection.allowed,
        read_allowed=protection.read_allowed if protection.folder is not None else None,
        reporter=reporter,
        max_message_bytes=most_bytes,
        pieces=pieces,
    )
