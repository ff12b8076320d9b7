"""`fedrag query`: an answer and its sources."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedrag_cli.cli.options import JsonOption, QuietOption, VerboseOption, sort_arguments
from fedrag_cli.cli.session import Session, session

if TYPE_CHECKING:
    from fedrag_cli.rag.system import RAGSystem


def command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG_OR_RUN] [QUESTION] [KEY=VALUE]...",
            help="YAML file (fedrag.yaml by default) or run directory, the question, and settings that win.",
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Answer a question; without one, answer each line of the input."""
    with session(json_output=json, quiet=quiet, verbose=verbose) as current:
        path, question, overrides = _sort(arguments)
        from fedrag_cli.config.checks import require_generator
        from fedrag_cli.rag.from_run import load_config_or_run

        config, _ = load_config_or_run(path, overrides)
        require_generator(config, "answering")
        from fedrag_cli.rag.build import build_rag_system

        rag_system = build_rag_system(config, reporter=current.reporter())
        if question is not None:
            answer = _answer(rag_system, question)
            _show(current, answer)
        else:
            _answer_lines(current, rag_system)


def _sort(arguments: list[str] | None) -> tuple[Path | None, str | None, list[str]]:
    """Tell config or run, question and overrides apart; a single text that is no file is the question."""
    given = sort_arguments(arguments, most_rest=1)
    first = given.path
    if first is None or given.rest:
        return first, given.rest[0] if given.rest else None, given.overrides
    looks_like_a_path = first.exists() or first.suffix in (".yaml", ".yml")
    return (first, None, given.overrides) if looks_like_a_path else (None, str(first), given.overrides)


def _answer(rag_system: RAGSystem, question: str) -> dict[str, Any]:
    answer = rag_system.query(question)
    return {
        "query": answer.query,
        "answer": answer.text,
        "sources": [
            {"id": source.node.id, "score": source.score, "text": source.node.text, "metadata": source.node.metadata}
            for source in answer.sources
        ],
        "dropped_tokens": answer.dropped_tokens,
        "without_context": answer.is_bare,
    }


def _answer_lines(current: Session, rag_system: RAGSystem) -> None:
    """Answer line after line: at a prompt on a terminal, and all lines of a pipe."""
    answers = []
    for question in _questions(current):
        answer = _answer(rag_system, question)
        answers.append(answer)
        if not current.json_output:
            _show(current, answer)
    if current.json_output:
        current.result({"answers": answers})


def _show(current: Session, answer: dict[str, Any]) -> None:
    """Give an answer; with --quiet without its sources, because the answer itself is what was asked for."""
    if current.json_output:
        current.result(answer)
    else:
        current.renderer.answer(answer, sources=not current.quiet)


def _questions(current: Session) -> Iterator[str]:
    interactive = sys.stdin.isatty()
    if interactive:
        current.renderer.line("Ask a question; an empty line ends.")
    while True:
        if interactive:
            current.renderer.console.print("[bold]>[/bold] ", end="")
        line = sys.stdin.readline()
        if not line or (interactive and not line.strip()):
            return
        if line.strip():
            yield line.strip()
