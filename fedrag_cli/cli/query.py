"""`fedrag query`: an answer and its sources."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedrag_cli.cli.options import sort_arguments
from fedrag_cli.cli.session import Session, in_session
from fedrag_cli.errors import DataError

if TYPE_CHECKING:
    from fedrag_cli.rag.system import RAGSystem


@in_session()
def command(
    current: Session,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG_OR_RUN] [QUESTION] [KEY=VALUE]...",
            help="YAML file (fedrag.yaml by default) or run directory, the question, and settings that win.",
        ),
    ] = None,
) -> None:
    """Answer a question; without one, answer each line of the input."""
    path, question, overrides = _sort(arguments)
    from fedrag_cli.config.validation import require_generator
    from fedrag_cli.rag.from_run import load_config_or_run

    config, _ = load_config_or_run(path, overrides)
    require_generator(config, "answering")
    from fedrag_cli.rag.build import build_rag_system

    rag_system = build_rag_system(config, reporter=current.reporter())
    if question is not None:
        _show(current, _answer(rag_system, question))
        return
    answers = []
    for line in _lines(current):
        answers.append(_answer(rag_system, line))
        if not current.json_output:
            _show(current, answers[-1])
    if current.json_output:
        current.result({"answers": answers})


def _sort(arguments: list[str] | None) -> tuple[Path | None, str | None, list[str]]:
    """Tell config or run, question and overrides apart.

    A single text is the question where it is no YAML file, no folder, and no other file that could be the config.
    """
    from fedrag_cli.config.fields import is_folder, is_there
    from fedrag_cli.config.source import DEFAULT_CONFIG

    given = sort_arguments(arguments, most_rest=1)
    first = given.path
    if first is None or given.rest:
        return first, _readable(given.rest[0], "The question") if given.rest else None, given.overrides
    is_config = is_there(first) and not is_there(DEFAULT_CONFIG)
    is_named_like_one = first.suffix in (".yaml", ".yml") and (is_there(first) or " " not in first.name)
    if is_config or is_named_like_one or is_folder(first):
        return first, None, given.overrides
    # Not the path's text, which has lost what means nothing in a path.
    (question,) = (argument for argument in arguments or () if argument not in given.overrides)
    return None, _readable(question, "The question"), given.overrides


def _readable(question: str, name: str) -> str:
    """Return a question without the mark that some editors begin a text with; refuse what is not UTF-8."""
    try:
        # Where the locale knows ASCII alone, Python has kept the other bytes as lone surrogates.
        question = question.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 text: the byte 0x{error.object[error.start]:02x} cannot be decoded.",
            "Write it as UTF-8, for instance with: iconv -f latin1 -t utf-8",
        ) from error
    return question.removeprefix("\ufeff")


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


def _show(current: Session, answer: dict[str, Any]) -> None:
    """Give an answer; with --quiet without its sources, because the answer itself is what was asked for."""
    if current.json_output:
        current.result(answer)
    else:
        current.renderer.answer(answer, sources=not current.quiet)


def _lines(current: Session) -> Iterator[str]:
    """Yield the questions of the input, a line each: at a prompt on a terminal, and all of a pipe."""
    if sys.stdin is None:
        return
    interactive = sys.stdin.isatty()
    if interactive:
        current.renderer.line("Ask a question; an empty line ends.")
    for number in itertools.count(1):
        if interactive:
            current.renderer.console.print("[bold]>[/bold] ", end="")
        line = sys.stdin.readline()
        if not line or (interactive and not line.strip()):
            return
        if question := _readable(line, f"Line {number} of the input").strip():
            yield question
