"""What server, client and simulation of a federation share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fedrag_cli.commands.job import RunData, chosen_metrics, differences_of, evaluate_once, tuned_models
from fedrag_cli.config import Config, ConfigSource
from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.config.validation import require_generator_for_training, tuned_sides
from fedrag_cli.data.relevance import Overlap
from fedrag_cli.errors import ConfigError
from fedrag_cli.evaluation.result import Evaluation
from fedrag_cli.federated.checkpoint import RoundState, load_newest_round, save_missing, save_round
from fedrag_cli.federated.config import public_settings
from fedrag_cli.federated.grid import FederationGrid
from fedrag_cli.federated.rounds_loop import EvaluateGlobal, Federation
from fedrag_cli.federated.task import FLTask
from fedrag_cli.federated.weights import Weights
from fedrag_cli.rag.system import RAGSystem, refresh_stale_store
from fedrag_cli.registry import build
from fedrag_cli.runs.directory import SCHEMA_VERSION, RunDirectory
from fedrag_cli.runs.reporter import Reporter


def settings_of(config: Config) -> FederatedConfig:
    """Return the federation's settings, or the defaults."""
    return config.federated or FederatedConfig()


def require_federation(config: Config) -> str:
    """Return the side that is tuned.

    Raises:
        ConfigError: The mode tunes both sides, or there is no generator but the objective needs one.
    """
    require_generator_for_training(config)
    sides = tuned_sides(config)
    if len(sides) > 1:
        raise ConfigError(
            "A federation tunes one side, but trainer.mode is alternating.",
            "Set trainer.mode to retriever or generator, and run a federation for each, one after the other.",
        )
    return sides[0]


def create_run(source: ConfigSource, command: Sequence[str], **federation: Any) -> RunDirectory:
    """Make a run directory whose manifest says which part of a federation it is.

    Args:
        source: A loaded config.
        command: The command line.
        federation: `role`, and what `fedrag resume` needs to take it up again.
    """
    run_config = source.config.run
    return RunDirectory.create(
        run_config.output_dir,
        run_config.name,
        source.to_yaml(),
        command=command,
        seed=run_config.seed,
        outside=source.outside_values(),
        federation=federation,
    )


def run_federation(
    run: RunDirectory,
    config: Config,
    data: RunData | None,
    grid: FederationGrid,
    task: FLTask,
    rag_system: RAGSystem,
    settings: FederatedConfig,
    reporter: Reporter,
    *,
    shares_model: bool,
) -> RoundState:
    """Run the rounds that are left, saving each, and leave the final weights in the model.

    Args:
        run: The run directory; its newest finished round is where the federation goes on.
        config: The run's config.
        data: What the global model is measured on; None where there is nothing.
        grid: The transport.
        task: Gives the initial weights and what must agree, and takes the final weights.
        rag_system: The RAG system that is measured; it shares its models with the task.
        settings: The federation's settings.
        reporter: Shows what happens.
        shares_model: Whether clients use the task's model too. Where they do not, the global weights are in memory
            once: in the model, or outside of it while a round runs.

    Returns:
        The state after the last round; its weights are in the model.
    """
    strategy = build(
        "strategy",
        settings.strategy,
        min_clients=settings.min_clients,
        learning_rate=task.trainer.config.learning_rate,
    )
    federation = Federation(
        grid,
        task.agreement,
        settings,
        strategy,
        seed=config.run.seed,
        reporter=reporter,
        save_round=lambda reached: save_round(run.checkpoints, reached),
        save_missing=lambda reached: save_missing(run.checkpoints, reached),
        evaluate_global=_evaluation_of(run, config, data, task, rag_system, settings, reporter, shares_model),
    )
    state = load_newest_round(run.checkpoints)
    if state is None and not shares_model:
        # A model that was just loaded lies in its file, all of it or nothing; what is read back can go piece by piece.
        save_round(run.checkpoints, RoundState(0, task.lend()))
        state = load_newest_round(run.checkpoints)
    elif not shares_model:
        task.release()
    state = state or RoundState(0, task.weights())
    _forget_evaluations(run, settings, state.number)
    state = federation.run(state)
    task.load(state.weights)
    state.weights = {}
    refresh_stale_store(rag_system)
    return state


def _forget_evaluations(run: RunDirectory, settings: FederatedConfig, done: int) -> None:
    """Remove evaluations of rounds that were not saved any more, because those rounds are run again."""
    for number in range(done + 1, settings.rounds + 1):
        stage = "after" if number == settings.rounds else f"round-{number}"
        for name in (f"{stage}.json", f"{stage}-so-far.jsonl"):
            (run.path / "evaluation" / name).unlink(missing_ok=True)


def stored_evaluation(run: RunDirectory, stage: str) -> Evaluation | None:
    """Return an evaluation of the run, or None where there was none."""
    known = run.read_json_if_there(f"evaluation/{stage}.json")
    return Evaluation.from_dict(known) if known is not None else None


def _evaluation_of(
    run: RunDirectory,
    config: Config,
    data: RunData | None,
    task: FLTask,
    rag_system: RAGSystem,
    settings: FederatedConfig,
    reporter: Reporter,
    shares_model: bool,
) -> EvaluateGlobal:
    """Return a function that measures global weights: the first, the last, and those of every so many rounds."""

    def measure(number: int, weights: Weights) -> Mapping[str, Any] | None:
        last = number == settings.rounds
        if data is None or data.split is None or (not last and number % settings.evaluate_every):
            return None
        task.load(weights)
        refresh_stale_store(rag_system)
        stage = "before" if number == 0 else "after" if last else f"round-{number}"
        found = evaluate_once(run, stage, config, data, rag_system, chosen_metrics(config, data), reporter)
        if not shares_model:
            task.release()
        return {"examples": found.n, "metrics": found.means()} if found is not None else None

    return measure


def federation_summary(
    run: RunDirectory,
    config: Config,
    *,
    role: str,
    counts: dict[str, int],
    split: str | None,
    before: Evaluation | None,
    after: Evaluation | None,
    rounds: list[dict[str, Any]],
    evaluations: dict[str, Any],
    seconds: float,
    overlaps: Sequence[Overlap] = (),
) -> dict[str, Any]:
    """Return the summary of one part of a federation, as `summary.json` has it."""
    manifest = run.manifest()
    stored = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    sides = tuned_sides(config)
    settings = {side: stored["trainer"][side] for side in sides}
    federated = stored.get("federated") or {}
    return {
        "schema_version": SCHEMA_VERSION,
        "run_name": config.run.name,
        "run_dir": str(run.path),
        "status": "done",
        "role": role,
        "mode": config.trainer.mode,
        "seed": config.run.seed,
        "command": manifest["command"],
        "tuned": tuned_models(sides, stored),
        "data": counts,
        "fingerprints": manifest.get("fingerprints") or {},
        "split": split,
        "differences": differences_of(config, before, after),
        "overlaps": [overlap.to_dict() for overlap in overlaps],
        "loss": rounds[-1]["loss"] if rounds else None,
        "steps": None,
        "metrics": {},
        "rounds": rounds,
        "evaluations": evaluations,
        "seconds": seconds,
        "settings": settings | {"federated": public_settings(federated)},
        "truncated": {f"evaluation {name}": count for name, count in (after.truncated if after else {}).items()},
        "lengths": [item.to_dict() for item in (after.lengths if after else ())],
        "versions": manifest["versions"],
    }
