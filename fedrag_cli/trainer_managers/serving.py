"""`fedrag serve-fl`: the server of a federation, from its config to the tuned model in its run directory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedrag_cli.config import Config, ConfigSource
from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.errors import ConfigError, FedRAGError
from fedrag_cli.federated.endpoint import Address, check_server_settings, parse_address
from fedrag_cli.federated.fleet.server import FleetServer, ServerCertificate
from fedrag_cli.federated.fleet.state import limits_of
from fedrag_cli.federated.keys import load_allowed_keys
from fedrag_cli.federated.rounds import load_newest_round
from fedrag_cli.federated.task import FLTask
from fedrag_cli.rag.build import build_rag_system, build_rag_system_without_passages
from fedrag_cli.runs.directory import RunDirectory
from fedrag_cli.runs.interrupt import terminable
from fedrag_cli.runs.reporting import Reporter
from fedrag_cli.trainer_managers.build import build_trainers
from fedrag_cli.trainer_managers.federated_parts import (
    create_run,
    federation_summary,
    require_federation,
    run_federation,
    settings_of,
    stored_evaluation,
)
from fedrag_cli.trainer_managers.run_parts import (
    RunData,
    RunReporter,
    load_run_data,
    model_fingerprints,
    recorded_end,
    save_models,
    write_results,
)

SERVER = "server"


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
    check_server_settings(settings_of(config), where, insecure=insecure)
    evaluates = "evaluation" in source.tree.tree
    if evaluates and config.dataset.corpus is None:
        raise ConfigError(
            "The config has an evaluation section, so the server measures the global model, but no dataset.corpus.",
            "Add corpus and test data, or remove the evaluation section.",
        )
    data = load_run_data(config) if evaluates else None
    run = create_run(source, command, role=SERVER, side=side, address=address, insecure=insecure, evaluates=evaluates)
    reporter.note(f"Run directory: {run.path}")
    with run.locked():
        try:
            task = _build_task(config, side, data, reporter)
        except (FedRAGError, KeyboardInterrupt):
            run.remove()
            raise
        return _see_through(run, config, data, task, where, insecure=insecure, reporter=reporter)


def resume_serving(run: RunDirectory, source: ConfigSource, reporter: Reporter) -> dict[str, Any]:
    """Go on with a federation after its newest finished round, at the same address.

    Args:
        run: The server's run directory.
        source: Its config.
        reporter: Shows what happens.
    """
    federation, config = run.manifest()["federation"], source.config
    where = parse_address(federation["address"])
    check_server_settings(settings_of(config), where, insecure=federation["insecure"])
    data = load_run_data(config) if federation["evaluates"] else None
    with run.locked():
        run.update_manifest(status="running", error=None)
        task = _build_task(config, federation["side"], data, reporter)
        return _see_through(run, config, data, task, where, insecure=federation["insecure"], reporter=reporter)


def _build_task(config: Config, side: str, data: RunData | None, reporter: Reporter) -> FLTask:
    rag_system = (
        build_rag_system(config, nodes=data.nodes, reporter=reporter)
        if data is not None
        else build_rag_system_without_passages(config, reporter)
    )
    return FLTask(build_trainers(config, rag_system, train=[], validation=[])[side], settings_of(config))


def _see_through(
    run: RunDirectory,
    config: Config,
    data: RunData | None,
    task: FLTask,
    where: Address,
    *,
    insecure: bool,
    reporter: Reporter,
) -> dict[str, Any]:
    started = time.monotonic()
    settings = task.settings
    reporter = RunReporter(run.open_log(), reporter)
    with recorded_end(run), terminable():
        rag_system = task.trainer.rag_system
        if run.manifest().get("fingerprints") is None:
            run.update_manifest(fingerprints=model_fingerprints(rag_system))
        done = load_newest_round(run.checkpoints)
        with _server(settings, where, task, insecure=insecure) as server:
            assert server.grid is not None
            port = server.address[1]
            run.update_manifest(listening=str(Address(where.host, port)))
            reporter.event(
                "listening",
                address=str(Address(where.host, port)),
                tls=settings.certificate is not None and not insecure,
                keys=settings.allowed_keys is not None,
                rounds=settings.rounds,
                done=done.number if done is not None else 0,
                min_clients=settings.min_clients,
            )
            state = run_federation(run, config, data, server.grid, task, rag_system, settings, reporter)
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
        write_results(run, summary)
    return summary


def _server(settings: FederatedConfig, where: Address, task: FLTask, *, insecure: bool) -> FleetServer:
    sizes = [tensor.numel() * 4 for tensor in task.weights().values()]
    max_bytes, max_objects = limits_of(sizes)
    certificate = None
    if settings.certificate is not None and settings.certificate_key is not None and not insecure:
        certificate = ServerCertificate(Path(settings.certificate), Path(settings.certificate_key))
    allowed = load_allowed_keys(Path(settings.allowed_keys)) if settings.allowed_keys is not None else None
    return FleetServer(
        where.host,
        where.port,
        certificate=certificate,
        allowed=allowed,
        max_message_bytes=max_bytes,
        max_message_objects=max_objects,
    )
