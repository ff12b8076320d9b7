"""The one life cycle of runs: create, lock, load, record, time, evaluate, summarise, and write down how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from fedrag_cli.commands.run_data import RunData, chosen_metrics
from fedrag_cli.config import Config, ConfigSource
from fedrag_cli.config.validation import (
    tuned_sides,
)
from fedrag_cli.data.relevance import (
    question_key,
)
from fedrag_cli.errors import EXIT_INTERRUPTED, FederationError, FedRAGError, RunInterruptedError
from fedrag_cli.evaluation.baselines import evaluate_baselines
from fedrag_cli.evaluation.comparison import compare_metrics
from fedrag_cli.evaluation.evaluator import evaluate
from fedrag_cli.evaluation.result import Evaluation
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.reports.diagnostics import summarise
from fedrag_cli.reports.interval_plots import plot_difference
from fedrag_cli.reports.model_card import model_card
from fedrag_cli.reports.plots import plot_log
from fedrag_cli.runs.directory import SCHEMA_VERSION, RunDirectory
from fedrag_cli.runs.files import replace_directory_atomically, write_text_atomically
from fedrag_cli.runs.interrupt import deferred_interrupts, terminable
from fedrag_cli.runs.metrics_log import MetricsLog, seconds_spent
from fedrag_cli.runs.processes import process_count, resume_command
from fedrag_cli.runs.reporter import Reporter


class RunReporter:
    """Writes events into the run's log and hands everything on to another reporter."""

    def __init__(self, log: MetricsLog, inner: Reporter) -> None:
        self._log = log
        self._inner = inner
        self.task = inner.task
        self.note = inner.note

    def event(self, name: str, **fields: Any) -> None:
        """Record an event in `metrics.jsonl`, and hand it on."""
        self._log.append(name, **fields)
        self._inner.event(name, **fields)


class Job:
    """What a command does in its run directory, from loading to the summary; `open_job` makes one.

    Args:
        run: The run directory, which this process holds.
        source: The run's config.
        reporter: Shows what happens; what `load` puts in its place records events in the run's log too.
        is_new: Whether the run has just been made.
    """

    def __init__(self, run: RunDirectory, source: ConfigSource, reporter: Reporter, *, is_new: bool) -> None:
        self.run = run
        self.source = source
        self.config = source.config
        self.reporter = reporter
        self.is_new = is_new
        self._began = time.monotonic()

    def load(self, build: Callable[[], RAGSystem], data: RunData | None) -> RAGSystem:
        """Load the models and begin to record, where data and models are those that the run has started with.

        Args:
            build: Loads the models.
            data: The data whose fingerprints the run keeps; None where it has none, or none that may be told.

        Raises:
            FedRAGError: Data or models are others than when the run started.
        """
        known = self.run.manifest().get("fingerprints")
        if known is not None and data is not None:
            _require_same("data", data.fingerprints(), known)
        if self.is_new:
            self.reporter.note(f"Run directory: {self.run.path}")
        rag_system = build()
        of_models = _model_fingerprints(rag_system)
        if known is not None:
            _require_same("base models", of_models, known)
        else:
            of_data = data.fingerprints() if data is not None else {}
            self.run.update_manifest(fingerprints=of_data | of_models)
        self.reporter = RunReporter(self.run.open_log(), self.reporter)
        self._began = time.monotonic() - seconds_spent(self.run.events())
        return rag_system

    def seconds(self) -> float:
        """Return how long the run has worked, in all its parts, without the pauses between them."""
        return time.monotonic() - self._began

    def evaluate(self, stage: str, data: RunData, rag_system: RAGSystem) -> Evaluation | None:
        """Evaluate, or return what an earlier part of the run has evaluated already; None where there is no split."""
        if data.split is None:
            return None
        done = self.run.read_json_if_there(f"evaluation/{stage}.json")
        if done is not None:
            return Evaluation.from_dict(done)
        when = {"before": " before training", "after": " after training", "evaluated": ""}
        self.reporter.note(
            f"Evaluating{when.get(stage, f' after {stage}')} on the {data.split} split "
            f"({len(data.evaluation)} questions)"
        )
        folder = self.run.path / "evaluation"
        memory = folder / f"{stage}-so-far.jsonl"
        evaluation = evaluate(
            rag_system,
            data.evaluation,
            chosen_metrics(self.config, data),
            self.config.evaluation,
            reporter=self.reporter,
            memory=memory,
        )
        trained_on = {question_key(example) for example in data.train}
        for example, row in zip(data.evaluation, evaluation.predictions, strict=True):
            if question_key(example) in trained_on:
                row["in_train"] = True
        evaluation.write_predictions(folder / f"{stage}-predictions.jsonl")
        self.run.write_json(f"evaluation/{stage}.json", evaluation.to_dict())
        memory.unlink(missing_ok=True)
        self.reporter.event("evaluation", stage=stage, split=data.split, metrics=evaluation.means())
        return evaluation

    def evaluate_baselines(self, data: RunData, rag_system: RAGSystem) -> dict[str, Evaluation]:
        """Measure untuned retrieval on the same questions, or return what an earlier part of the run has measured."""
        if data.split is None:
            return {}
        done = self.run.read_json_if_there("evaluation/baselines.json")
        if done is not None:
            return {name: Evaluation.from_dict(found) for name, found in done.items()}
        metrics = chosen_metrics(self.config, data)
        baselines = evaluate_baselines(rag_system, data.evaluation, metrics, self.config.evaluation)
        self.run.write_json("evaluation/baselines.json", {name: found.to_dict() for name, found in baselines.items()})
        for name, found in baselines.items():
            self.reporter.event("evaluation", stage=f"untuned {name}", split=data.split, metrics=found.means())
        return baselines

    def summary(self, data: RunData | None, **own: Any) -> dict[str, Any]:
        """Return what the summaries of all runs have, and what is the command's own."""
        manifest = self.run.manifest()
        return {
            "schema_version": SCHEMA_VERSION,
            "run_name": manifest["run"],
            "run_dir": str(self.run.path),
            "status": "done",
            "seed": self.config.run.seed,
            "command": manifest["command"],
            "data": data.counts() if data is not None else {},
            "fingerprints": manifest["fingerprints"],
            "split": data.split if data is not None else None,
            "seconds": self.seconds(),
            "versions": manifest["versions"],
            **own,
        }

    def tuning_summary(
        self, data: RunData | None, before: Evaluation | None, after: Evaluation | None, **own: Any
    ) -> dict[str, Any]:
        """Return what the summaries of all runs that tune models have, and what is the command's own."""
        sides, stored = tuned_sides(self.config), self.source.to_dict()
        truncated = after.truncated if after is not None else {}
        return self.summary(
            data,
            **{
                "mode": self.config.trainer.mode,
                "tuned": _tuned_models(sides, stored),
                "differences": _differences(self.config, before, after),
                "overlaps": [overlap.to_dict() for overlap in data.overlaps()] if data is not None else [],
                "settings": {side: stored["trainer"][side] for side in sides},
                "truncated": {f"evaluation {name}": count for name, count in truncated.items()},
                "lengths": [item.to_dict() for item in (after.lengths if after else ())],
                **own,
            },
        )

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, and mark the run as done."""
        self.run.write_json("summary.json", summary)
        self.run.update_manifest(status="done", error=None)

    def finish_tuning(self, summary: dict[str, Any]) -> None:
        """Draw the plots, write model card and summary, and mark the run as done."""
        run, events = self.run, self.run.events()
        plots = plot_log(events, run.plots)
        if summary.get("comparison"):
            plots.append(run.plots / "comparison.png")
        if summary["differences"]:
            plots.append(run.plots / "difference.png")
            plot_difference(summary["differences"], plots[-1])
        summary["diagnostics"] = summarise(events)
        summary["plots"] = [path.name for path in plots]
        write_text_atomically(run.path / "README.md", model_card(summary))
        self.finish(summary)


@contextmanager
def open_job(
    source: ConfigSource,
    reporter: Reporter,
    run: RunDirectory | None,
    *,
    command: Sequence[str] = (),
    name: str | None = None,
    **manifest: Any,
) -> Iterator[Job]:
    """Hold a run while the enclosed code loads and works in it, and write into its manifest how it ended.

    Until the run's log has a new event it loads: where it ends before, a new run is removed, and one that goes on is
    as it was. Errors after which a run can go on say how.

    Args:
        source: The run's config.
        reporter: Shows what happens.
        run: The run that goes on; None makes a new one.
        command: The command line of a new run.
        name: The name of a new run; that in the config by default.
        manifest: What else the manifest of a new run says.

    Raises:
        FedRAGError: Another process works in it.
        RunInterruptedError: The user or a signal interrupted the enclosed code.
    """
    is_new = run is None
    # A launcher hands a signal on that the terminal has sent to its processes too.
    with terminable(once=process_count() > 1):
        if run is None:
            settings = source.config.run
            run = RunDirectory.create(
                settings.output_dir,
                name or settings.name,
                source.to_yaml(),
                command=command,
                seed=settings.seed,
                outside=source.outside_values(),
                **manifest,
            )
        with _held(run, is_new=is_new):
            yield Job(run, source, reporter, is_new=is_new)


def save_models(run: RunDirectory, rag_system: RAGSystem, config: Config) -> None:
    """Save the tuned models, and the knowledge store that fits them where there are passages."""
    for side in tuned_sides(config):
        with replace_directory_atomically(run.path / side) as target:
            rag_system.require_trainable(side).save(target)
    store = rag_system.knowledge_store
    can_be_saved = config.rag_system.knowledge_store.in_folder(run.knowledge_store) is not None
    if len(store) and can_be_saved and not store.is_kept_elsewhere:
        store.save(run.knowledge_store)
        if rag_system.hybrid is not None:
            rag_system.hybrid.save_beside(run.knowledge_store)


def _tuned_models(sides: Sequence[str], stored: dict[str, Any]) -> dict[str, Any]:
    """Return what was tuned, from the config as it is stored: with references where values came from elsewhere."""
    tuned: dict[str, Any] = {"retriever": None, "generator": None}
    for side in sides:
        component, trainer = stored["rag_system"][side], stored["trainer"][side]
        model = component.get("model") or component.get("query_model") or component["type"]
        tuned[side] = {"model": model, "trainer": trainer["type"]}
    if tuned["retriever"] is not None:
        tuned["retriever"]["train"] = stored["trainer"]["retriever"].get("train", "both")
    if tuned["generator"] is not None:
        tuned["generator"]["adapter"] = stored["trainer"]["generator"].get("lora") is not None
    return tuned


def _model_fingerprints(rag_system: RAGSystem) -> dict[str, str]:
    """Return a hash of each model as it is now."""
    generator = rag_system.generator
    models = {"retriever": rag_system.retriever.fingerprint()}
    return models | ({"generator": generator.fingerprint()} if generator is not None else {})


def _require_same(what: str, fingerprints: dict[str, str], known: dict[str, str]) -> None:
    changed = [name for name, value in fingerprints.items() if known.get(name, value) != value]
    if changed:
        verb = "has" if what == "data" else "have"
        raise FedRAGError(
            f"The {what} of this run {verb} changed since it started: {', '.join(changed)}.",
            f"Put the old {what} back, or start a new run.",
        )


def _differences(config: Config, before: Evaluation | None, after: Evaluation | None) -> list[dict[str, Any]]:
    """Return what changed between two evaluations of the same questions; nothing where there are none."""
    if before is None or after is None:
        return []
    compared = compare_metrics(before.values, after.values, config.evaluation, config.run.seed)
    return [difference.to_dict() for difference in compared]


@contextmanager
def _held(run: RunDirectory, *, is_new: bool = False) -> Iterator[None]:
    """Lock a run for the enclosed code, and write into its manifest how that ended; see `open_job`."""
    former, logged, is_held = {"status": "running"}, 0, is_new
    with ExitStack() as lock:
        try:
            lock.enter_context(run.locked())
            former, logged, is_held = run.manifest(), run.log_size(), True
            run.update_manifest(status="running", error=None)
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt) or getattr(error, "exit_code", None) == EXIT_INTERRUPTED
            with deferred_interrupts() as interrupt:
                # An impatient second signal does not keep the end from being written down.
                interrupt.ignores_repeats = True
                worked = is_held and run.log_size() > logged
                is_left = is_new and not worked and (interrupted or isinstance(error, FedRAGError))
                if is_left:
                    run.remove()
                elif is_held:
                    end = {"status": "interrupted" if interrupted else "failed", "error": str(error)}
                    is_as_before = not worked and not is_new and former["status"] != "running"
                    run.update_manifest(**({key: former.get(key) for key in end} if is_as_before else end))
                    if worked:
                        run.open_log().append("stopped")
            if is_left and interrupted:
                raise RunInterruptedError(
                    "Interrupted while data and models were loaded. Nothing was computed yet; "
                    f"'{run.path}' was removed.",
                    "Give the command again.",
                ) from error
            hint = f"Go on with: {resume_command(run.path)}"
            if interrupted:
                own = error.message if isinstance(error, RunInterruptedError) else ""
                done = "what was computed is saved" if worked else "before the run went on; it is as it was"
                raise RunInterruptedError(own or f"Interrupted{';' if worked else ''} {done}.", hint) from error
            if isinstance(error, FederationError):
                error.hint = f"{error.hint} Then {hint[0].lower()}{hint[1:]}".strip()
            raise
