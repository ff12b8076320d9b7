"""What server, client and simulation of a federation share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedrag_cli.commands.job import Job
from fedrag_cli.commands.run_data import RunData
from fedrag_cli.config import Config
from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.config.validation import require_generator_for_training, tuned_sides
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
from fedrag_cli.runs.directory import RunDirectory


def settings_of(config: Config) -> FederatedConfig:
    """Return the federation's settings, or the defaults."""
    return config.federated or FederatedConfig()


def require_federation(config: Config) -> str:
    """Return the side that is tuned; raises ConfigError where there are two, or a generator is missing."""
    require_generator_for_training(config)
    sides = tuned_sides(config)
    if len(sides) > 1:
        raise ConfigError(
            "A federation tunes one side, but trainer.mode is alternating.",
            "Set trainer.mode to retriever or generator, and run a federation for each, one after the other.",
        )
    return sides[0]


def run_federation(
    job: Job,
    data: RunData | None,
    grid: FederationGrid,
    task: FLTask,
    rag_system: RAGSystem,
    settings: FederatedConfig,
    *,
    shares_model: bool,
) -> RoundState:
    """Run the rounds that are left, saving each, and return the state after that; its weights are in the model.

    Args:
        job: Its run's newest finished round is where the federation goes on.
        data: What the global model is measured on; None where there is nothing.
        grid: The transport.
        task: Gives the initial weights and what must agree, and takes the final weights.
        rag_system: The RAG system that is measured; it shares its models with the task.
        settings: The federation's settings.
        shares_model: Whether clients use the task's model too. Where they do not, the global weights are in memory
            once: in the model, or outside of it while a round runs.
    """
    checkpoints, rate = job.run.checkpoints, task.trainer.config.learning_rate
    federation = Federation(
        grid,
        task.agreement,
        settings,
        build("strategy", settings.strategy, min_clients=settings.min_clients, learning_rate=rate),
        seed=job.config.run.seed,
        reporter=job.reporter,
        save_round=lambda reached: save_round(checkpoints, reached),
        save_missing=lambda reached: save_missing(checkpoints, reached),
        evaluate_global=_global_evaluation(job, data, task, rag_system, settings, shares_model=shares_model),
    )
    state = load_newest_round(checkpoints)
    if state is None and not shares_model:
        # A model that was just loaded lies in its file, all of it or nothing; what is read back can go piece by piece.
        save_round(checkpoints, RoundState(0, task.lend()))
        state = load_newest_round(checkpoints)
    elif not shares_model:
        task.release()
    state = state or RoundState(0, task.weights())
    _forget_evaluations(job.run, settings, state.number)
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


def _global_evaluation(
    job: Job,
    data: RunData | None,
    task: FLTask,
    rag_system: RAGSystem,
    settings: FederatedConfig,
    *,
    shares_model: bool,
) -> EvaluateGlobal:
    """Return a function that measures global weights: the first, the last, and those of every so many rounds."""

    def measure(number: int, weights: Weights) -> Mapping[str, Any] | None:
        last = number == settings.rounds
        if data is None or data.split is None or (not last and number % settings.evaluate_every):
            return None
        task.load(weights)
        refresh_stale_store(rag_system)
        found = job.evaluate("before" if number == 0 else "after" if last else f"round-{number}", data, rag_system)
        if not shares_model:
            task.release()
        return {"examples": found.n, "metrics": found.means()} if found is not None else None

    return measure


def federation_summary(
    job: Job,
    data: RunData | None,
    before: Evaluation | None,
    after: Evaluation | None,
    *,
    rounds: list[dict[str, Any]],
    evaluations: dict[str, Any],
    **own: Any,
) -> dict[str, Any]:
    """Return the summary of one part of a federation, as `summary.json` has it."""
    stored = job.source.to_dict()
    settings = {side: stored["trainer"][side] for side in tuned_sides(job.config)}
    known: dict[str, Any] = {
        "role": job.run.role(),
        "loss": rounds[-1]["loss"] if rounds else None,
        "steps": None,
        "metrics": {},
        "rounds": rounds,
        "evaluations": evaluations,
        "settings": settings | {"federated": public_settings(stored.get("federated") or {})},
    }
    return job.tuning_summary(data, before, after, **known, **own)
