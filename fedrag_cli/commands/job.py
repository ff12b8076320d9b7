"""What training runs and federations share: their data, their evaluations, and what is written at the end."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedrag_cli.config import Config, ConfigSource
from fedrag_cli.config.fields import generator_metrics_of
from fedrag_cli.config.validation import (
    evaluation_split,
    require_generator,
    trains_on_relevant_ids,
    trains_on_responses,
    trains_with_generator,
    tuned_sides,
)
from fedrag_cli.data.corpora import load_corpus
from fedrag_cli.data.examples import Example, load_examples
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.relevance import (
    Overlap,
    find_overlaps,
    judged_examples,
    question_key,
    resolve_relevant_ids,
)
from fedrag_cli.data.row_problems import Problems
from fedrag_cli.errors import EXIT_INTERRUPTED, DataError, FederationError, FedRAGError, RunInterruptedError
from fedrag_cli.evaluation.comparison import compare_metrics
from fedrag_cli.evaluation.evaluator import choose_metrics, evaluate, require_questions
from fedrag_cli.evaluation.generator_metrics import answer_candidate, require_prompts
from fedrag_cli.evaluation.result import Evaluation
from fedrag_cli.rag.build import build_rag_system, corpus_fingerprint
from fedrag_cli.rag.lengths import Lengths
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.reports.diagnostics import summarise
from fedrag_cli.reports.interval_plots import plot_difference
from fedrag_cli.reports.model_card import model_card
from fedrag_cli.reports.plots import plot_log
from fedrag_cli.runs.directory import SCHEMA_VERSION, RunDirectory
from fedrag_cli.runs.files import replace_directory_atomically, write_text_atomically
from fedrag_cli.runs.interrupt import deferred_interrupts, terminable
from fedrag_cli.runs.launch import process_count, resume_command
from fedrag_cli.runs.metrics_log import MetricsLog, seconds_spent
from fedrag_cli.runs.reporter import Reporter

MOST_MEASURED = 10_000
"""Passages whose length is looked at before training; `fedrag index` looks at all."""


@dataclass(frozen=True)
class RunData:
    """All data of a run, read and checked before any weight is loaded."""

    nodes: list[KnowledgeNode]
    train: list[Example]
    validation: list[Example]
    evaluation: list[Example]
    split: str | None

    @cached_property
    def corpus_fingerprint(self) -> str:
        """A hash over the passages."""
        return corpus_fingerprint(self.nodes)

    def counts(self) -> dict[str, int]:
        """Return the number of rows of each part."""
        counts = {"passages": len(self.nodes), "train": len(self.train), "validation": len(self.validation)}
        return {**counts, self.split: len(self.evaluation)} if self.split else counts

    def overlaps(self) -> list[Overlap]:
        """Return which splits share questions, so that what is measured flatters."""
        splits = {"train": self.train, "validation": self.validation}
        return find_overlaps(splits | ({self.split: self.evaluation} if self.split else {}), self.split)


class RunReporter:
    """Writes events into the run's log and hands everything on to another reporter."""

    def __init__(self, log: MetricsLog, inner: Reporter) -> None:
        """Keep both."""
        self._log = log
        self._inner = inner

    def event(self, name: str, **fields: Any) -> None:
        """Record an event in `metrics.jsonl`."""
        self._log.append(name, **fields)
        self._inner.event(name, **fields)

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Any:
        """Hand a task on."""
        with self._inner.task(description, total, unit) as advance:
            yield advance

    def note(self, message: str) -> None:
        """Hand a note on."""
        self._inner.note(message)


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
            _require_same("data", data_fingerprints(data), known)
        if self.is_new:
            self.reporter.note(f"Run directory: {self.run.path}")
        rag_system = build()
        of_models = model_fingerprints(rag_system)
        if known is not None:
            _require_same("base models", of_models, known)
        else:
            of_data = data_fingerprints(data) if data is not None else {}
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
                "tuned": tuned_models(sides, stored),
                "differences": differences_of(self.config, before, after),
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
        write_results(self.run, summary)


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
        with life_cycle(run, is_new=is_new):
            yield Job(run, source, reporter, is_new=is_new)


def load_run_data(config: Config) -> RunData:
    """Read corpus and examples and check that they fit each other.

    Raises:
        DataError: Anything in them is missing or bad.
    """
    nodes = load_corpus(config.dataset.corpus)
    dataset, split = config.dataset, evaluation_split(config)
    on_answers = trains_on_responses(config)
    questions = resolve_relevant_ids(load_questions(config, split), nodes) if split is not None else []
    validation: list[Example] = []
    if dataset.validation is not None:
        # What clients report of a federation is measured on their validation split.
        reported = generator_metrics_of(config.federated.metrics) if config.federated is not None else []
        validation = load_examples(dataset.validation, needs_responses=on_answers or bool(reported))
        validation = resolve_relevant_ids(validation, nodes)
    train = load_examples(dataset.train, needs_responses=on_answers) if dataset.train is not None else []
    if trains_on_relevant_ids(config):
        for name, examples in (("dataset.train", train), ("dataset.validation", validation)):
            judged_examples(examples, nodes, name)
    return RunData(nodes, train, validation, questions[: config.evaluation.limit], split)


def load_questions(config: Config, split: str) -> list[Example]:
    """Read the examples to evaluate on; each must have an answer where a metric looks at answers.

    Args:
        config: The config.
        split: The split to evaluate on.

    Raises:
        DataError: The data is missing or bad.
    """
    source, settings = getattr(config.dataset, split), config.evaluation
    examples = load_examples(source, needs_responses=False)
    if all(example.responses for example in examples):
        return examples
    asked = examples[: settings.limit]
    chosen = choose_metrics(None, tuned_sides(config), asked, settings.context)
    wanted = chosen if settings.metrics is None else settings.metrics
    return load_examples(source) if generator_metrics_of(wanted) else examples


def load_rag_system(config: Config, data: RunData, reporter: Reporter) -> RAGSystem:
    """Build the RAG system of a run, with the generator where training or evaluation uses it, and check the data by it.

    Raises:
        DataError: A question and its answer do not fit into the generator's context window even without passages, an
            answer has no tokens, or a passage does not fit the prompt's template.
        FedRAGError: As `build_rag_system`.
    """
    with_generator = uses_generator(config, data)
    rag_system = build_rag_system(
        config,
        nodes=data.nodes,
        fingerprint=data.corpus_fingerprint,
        with_generator=with_generator,
        reporter=reporter,
    )
    if with_generator and rag_system.generator is not None:
        _require_prompts(config, data, rag_system)
    # Every training collects garbage, every round and client of a simulation anew, and the libraries' objects, which
    # all live on, are most of what it would look through.
    gc.collect()
    gc.freeze()
    return rag_system


def measured_lengths(rag_system: RAGSystem, data: RunData) -> list[Lengths]:
    """Return how long passages and questions are beside the retriever's limit; of very many passages some are read."""
    passages = [node.text for node in data.nodes[:: -(-len(data.nodes) // MOST_MEASURED) or 1]]
    some = len(passages) < len(data.nodes)
    queries = [example.query for example in (*data.train, *data.validation, *data.evaluation)]
    return [
        rag_system.retriever.measure(passages, "passages" + " that were looked at" * some, queries=False),
        rag_system.retriever.measure(queries, "questions", queries=True),
    ]


def uses_generator(config: Config, data: RunData) -> bool:
    """Return whether training or evaluation uses the generator; raises as `chosen_metrics`."""
    return trains_with_generator(config) or bool(generator_metrics_of(chosen_metrics(config, data)))


def _require_prompts(config: Config, data: RunData, rag_system: RAGSystem) -> None:
    """Raise DataError with every row that cannot be asked, answered or learnt from, whatever is retrieved for it."""
    generator = rag_system.require_generator()
    for node in data.nodes:
        generator.context([node])
    validated = [getattr(config.trainer, side).validation.metric for side in tuned_sides(config)]
    validated += list(config.federated.metrics) if config.federated is not None else []
    checked = [
        ("train", data.train, trains_with_generator(config), []),
        ("validation", data.validation, trains_with_generator(config), [name for name in validated if name]),
    ]
    if data.split is not None:
        checked.append((data.split, data.evaluation, False, chosen_metrics(config, data)))
    problems = Problems("the data")
    hints: dict[str, None] = {}
    for split, examples, learns, metrics in checked:
        for example in examples:
            try:
                if learns:
                    answer_candidate(rag_system, example, [])
                require_prompts(rag_system, example, metrics)
            except DataError as error:
                where = example.place or f"example '{example.id}'"
                problems.add(where, f"dataset.{split}: {error.message}")
                hints[error.hint] = None
    problems.raise_if_any(" ".join(hints))


def chosen_metrics(config: Config, data: RunData) -> list[str]:
    """Return the metrics of the evaluation before and after; none where there is nothing to evaluate on.

    Raises:
        ConfigError: A metric needs a generator that is not there.
        DataError: A metric, the context or the groups need what the questions do not have.
    """
    if data.split is None:
        return []
    settings = config.evaluation
    metrics = choose_metrics(settings.metrics, tuned_sides(config), data.evaluation, settings.context)
    require_questions(data.evaluation, metrics, settings)
    answering = generator_metrics_of(metrics)
    if answering:
        require_generator(config, f"computing {' and '.join(answering)}")
    return metrics


def evaluate_once(
    run: RunDirectory,
    stage: str,
    config: Config,
    data: RunData,
    rag_system: RAGSystem,
    metrics: Sequence[str],
    reporter: Reporter,
) -> Evaluation | None:
    """Evaluate, or return what an earlier part of the same run has evaluated already."""
    if data.split is None:
        return None
    done = run.read_json_if_there(f"evaluation/{stage}.json")
    if done is not None:
        return Evaluation.from_dict(done)
    when = {"before": " before training", "after": " after training", "evaluated": ""}
    reporter.note(
        f"Evaluating{when.get(stage, f' after {stage}')} on the {data.split} split ({len(data.evaluation)} questions)"
    )
    memory = run.path / "evaluation" / f"{stage}-so-far.jsonl"
    evaluation = evaluate(rag_system, data.evaluation, metrics, config.evaluation, reporter=reporter, memory=memory)
    trained_on = {question_key(example) for example in data.train}
    for example, row in zip(data.evaluation, evaluation.predictions, strict=True):
        if question_key(example) in trained_on:
            row["in_train"] = True
    evaluation.write_predictions(run.path / "evaluation" / f"{stage}-predictions.jsonl")
    run.write_json(f"evaluation/{stage}.json", evaluation.to_dict())
    memory.unlink(missing_ok=True)
    reporter.event("evaluation", stage=stage, split=data.split, metrics=evaluation.means())
    return evaluation


def save_models(run: RunDirectory, rag_system: RAGSystem, config: Config) -> None:
    """Save the tuned models, and the knowledge store that fits them where there are passages."""
    for side in tuned_sides(config):
        with replace_directory_atomically(run.path / side) as target:
            rag_system.require_trainable(side).save(target)
    store = rag_system.knowledge_store
    can_be_saved = config.rag_system.knowledge_store.in_folder(run.knowledge_store) is not None
    if len(store) and can_be_saved and not store.is_kept_elsewhere:
        store.save(run.knowledge_store)


def tuned_models(sides: Sequence[str], stored: dict[str, Any]) -> dict[str, Any]:
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


def data_fingerprints(data: RunData) -> dict[str, str]:
    """Return a hash of each part of the data; that of the passages where it is known is not computed again."""
    rows = {"train": data.train, "validation": data.validation}
    if data.split is not None:
        rows[data.split] = data.evaluation
    examples = {name: corpus_fingerprint([_as_node(example) for example in split]) for name, split in rows.items()}
    return {"passages": data.corpus_fingerprint, **examples}


def _as_node(example: Example) -> KnowledgeNode:
    """Put all of an example that training or evaluation looks at into what can be hashed."""
    known = {"relevant_ids": list(example.relevant_ids), "choices": list(example.choices)}
    return KnowledgeNode(example.query, "|".join(example.responses), known)


def model_fingerprints(rag_system: RAGSystem) -> dict[str, str]:
    """Return a hash of each model as it is now."""
    generator = rag_system.generator
    models = {"retriever": rag_system.retriever.fingerprint()}
    return models | ({"generator": generator.fingerprint()} if generator is not None else {})


def record_fingerprints(run: RunDirectory, rag_system: RAGSystem, data: RunData | None = None) -> None:
    """Write into the manifest what a run started with, once; a run that goes on keeps what is there.

    Args:
        run: The run.
        rag_system: Its models, before any step.
        data: Its data; None where it has none, or none that may be told.
    """
    if run.manifest().get("fingerprints") is None:
        of_data = data_fingerprints(data) if data is not None else {}
        run.update_manifest(fingerprints=of_data | model_fingerprints(rag_system))


def require_unchanged(run: RunDirectory, what: str, fingerprints: dict[str, str]) -> None:
    """Raise FedRAGError where data or models of a run are others than when it started.

    Args:
        run: The run that goes on.
        what: `data` or `base models`, for the message.
        fingerprints: Those of now.
    """
    _require_same(what, fingerprints, run.manifest().get("fingerprints") or {})


def _require_same(what: str, fingerprints: dict[str, str], known: dict[str, str]) -> None:
    changed = [name for name, value in fingerprints.items() if known.get(name, value) != value]
    if changed:
        verb = "has" if what == "data" else "have"
        raise FedRAGError(
            f"The {what} of this run {verb} changed since it started: {', '.join(changed)}.",
            f"Put the old {what} back, or start a new run.",
        )


def write_results(run: RunDirectory, summary: dict[str, Any]) -> None:
    """Draw the plots, write model card and summary, and mark the run as done."""
    events = run.events()
    plots = plot_log(events, run.plots)
    if summary.get("comparison"):
        plots.append(run.plots / "comparison.png")
    if summary["differences"]:
        plot_difference(summary["differences"], run.plots / "difference.png")
        plots.append(run.plots / "difference.png")
    summary["diagnostics"] = summarise(events)
    summary["plots"] = [path.name for path in plots]
    write_text_atomically(run.path / "README.md", model_card(summary))
    run.write_json("summary.json", summary)
    run.update_manifest(status="done", error=None)


def differences_of(config: Config, before: Evaluation | None, after: Evaluation | None) -> list[dict[str, Any]]:
    """Return what changed between two evaluations of the same questions; nothing where there are none."""
    if before is None or after is None:
        return []
    compared = compare_metrics(before.values, after.values, config.evaluation, config.run.seed)
    return [difference.to_dict() for difference in compared]


@contextmanager
def life_cycle(run: RunDirectory, *, is_new: bool = False) -> Iterator[None]:
    """Hold a run while the enclosed code loads and works, and write into the manifest how it ended.

    Until it writes its first event it loads: where it ends before, a new run is removed, and one that goes on is as it
    was. Errors after which a run can go on say how.

    Args:
        run: The run directory.
        is_new: Whether it was just made.

    Raises:
        FedRAGError: Another process works in it.
        RunInterruptedError: The user or a signal interrupted the enclosed code.
    """
    former, logged, is_held = {"status": "running"}, 0, is_new
    with ExitStack() as lock:
        try:
            lock.enter_context(run.locked())
            former, logged, is_held = run.manifest(), run.log_size(), True
            run.update_manifest(status="running", error=None)
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt) or getattr(error, "exit_code", None) == EXIT_INTERRUPTED
            with deferred_interrupts() as guard:
                # An impatient second signal does not keep the end from being written down.
                guard.ignores_repeats = True
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
                    f"Interrupted while the models were loaded. Nothing was computed yet; '{run.path}' was removed.",
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
