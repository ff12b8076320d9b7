"""What surrounds every command: where output goes, and how errors become messages and exit codes."""

from __future__ import annotations

import errno
import gc
import inspect
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from fedrag_cli.cli.options import JsonOption, QuietOption, VerboseOption
from fedrag_cli.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    ConfigError,
    DataError,
    FedRAGError,
    OtherProcessError,
    RunInterruptedError,
)
from fedrag_cli.runs.processes import local_rank, process_count, rank
from fedrag_cli.text import json_text

if TYPE_CHECKING:
    from fedrag_cli.cli.render import Renderer
    from fedrag_cli.runs.reporter import Reporter

SCHEMA_VERSION = 1
_OF_PATHS = (
    errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM, errno.EROFS
)  # fmt: skip
# Read by the libraries when they are imported, which is after this.
NO_BARS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}


@dataclass(frozen=True)
class Session:
    """One run of a command: its result goes to stdout as JSON, or for people to stderr unless it is quiet."""

    json_output: bool
    quiet: bool
    renderer: Renderer

    @property
    def command_line(self) -> list[str]:
        """What runs record as their command."""
        return ["fedrag", *sys.argv[1:]]

    def result(self, document: Mapping[str, Any], show: Callable[[Renderer], None] | None = None) -> None:
        """Give the command's result: as JSON on stdout, or for people."""
        if self.json_output:
            print_json(document)
        elif show is not None and not self.quiet:
            show(self.renderer)

    def run_result(self, summary: Mapping[str, Any]) -> None:
        """Give what a run of any kind ended with."""
        self.result(summary, lambda renderer: renderer.run_summary(summary))

    def reporter(self) -> Reporter:
        """Return what long work reports to, which begins now."""
        gc.enable()
        from fedrag_cli.runs.reporter import SilentReporter

        return SilentReporter() if self.quiet else self.renderer.reporter()

    @contextmanager
    def federation_reporter(self, *, live: bool = True) -> Iterator[Reporter]:
        """Yield what a federation reports to: a live table on a terminal, plain lines elsewhere."""
        if self.quiet or not live or not self.renderer.console.is_terminal:
            yield self.reporter()
            return
        gc.enable()
        from fedrag_cli.cli.federation_view import LiveFederationReporter

        # The libraries' own bars would break the table; they read this when they are imported.
        os.environ.update(NO_BARS)
        with LiveFederationReporter(self.renderer.console) as reporter:
            yield reporter


def in_session(*, in_processes: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a session as its first argument, and the options that choose it: --json, --quiet, --verbose."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(*, json: bool, quiet: bool, verbose: bool, **arguments: Any) -> None:
            with session(json_output=json, quiet=quiet, verbose=verbose, in_processes=in_processes) as current:
                command(current, **arguments)

        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        options = {"json": JsonOption, "quiet": QuietOption, "verbose": VerboseOption}
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
            for name, option in options.items()
        ]
        run.__doc__ = command.__doc__
        # Typer makes the command's options of it.
        vars(run)["__signature__"] = inspect.Signature([*own, *shared])
        return run

    return decorate


@contextmanager
def session(*, json_output: bool, quiet: bool, verbose: bool, in_processes: bool = False) -> Iterator[Session]:
    """Run a command's body: errors become a message (or JSON) and the documented exit code.

    Of several processes that a launcher has started, the main one alone prints.
    """
    from fedrag_cli.cli.render import Renderer

    if rank() > 0:
        json_output, quiet = False, True
    renderer = Renderer()
    if quiet:
        os.environ.update(NO_BARS)
    logging.getLogger("fedrag_cli").setLevel(logging.ERROR if quiet else logging.WARNING)
    if not verbose:
        _quiet_libraries()
    try:
        if process_count() > 1 and not in_processes:
            raise ConfigError(
                f"This command runs in one process, but {process_count()} were started.",
                "Start it without accelerate launch or torchrun; 'fedrag train' is for several.",
            )
        yield Session(json_output, quiet, renderer)
    except (typer.Exit, SystemExit):
        raise
    except KeyboardInterrupt:
        _fail(renderer, RunInterruptedError("Interrupted."), EXIT_INTERRUPTED, json_output)
    except FedRAGError as error:
        if verbose:
            traceback.print_exc()
        _fail(renderer, error, error.exit_code, json_output)
    except BrokenPipeError:
        raise typer.Exit(EXIT_FAILED) from None
    except Exception as error:  # noqa: BLE001  (the last resort of the command line: no traceback unless asked for)
        if verbose:
            traceback.print_exc()
        _fail(renderer, _unexpected(error), EXIT_FAILED, json_output)


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document to stdout, with a schema version in front."""
    write_json({"schema_version": SCHEMA_VERSION, **document})


def write_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document to stdout as it is, with escapes where the output's encoding lacks a character."""
    text = json_text(document)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(document, indent=2)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def abandon_stdout() -> None:
    """Send what is left for stdout nowhere: Python would try it again at its end, and fail with words of its own."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(renderer: Renderer, error: FedRAGError, code: int, json_output: bool) -> None:
    if rank() > 0:
        if not _is_own(error):
            raise typer.Exit(code)
        error.message = f"Process {rank()}: {error.message}"
    if json_output:
        details: dict[str, Any] = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
        problems = getattr(error, "problems", None)
        if problems:
            details["problems"] = [problem.to_dict() for problem in problems]
        try:
            print_json({"error": {**details, "exit_code": code}})
        except OSError:
            # The output itself may be what is wrong, as on a full disk; the error is told below all the same.
            abandon_stdout()
    renderer.error(error)
    raise typer.Exit(code)


def _is_own(error: FedRAGError) -> bool:
    """Return whether an error of a process beside the main one is its alone, so that the main one does not tell it."""
    from fedrag_cli.runs.processes import have_joined

    if isinstance(error, ConfigError | DataError) and not have_joined():
        # All processes of a machine read the same files, and the main one tells what is wrong with them.
        return local_rank() == 0
    return not isinstance(error, OtherProcessError | RunInterruptedError)


def _unexpected(error: Exception) -> FedRAGError:
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        return FedRAGError("The disk is full.", "Free some space; what was saved before is intact.")
    if isinstance(error, OSError) and error.errno in _OF_PATHS and error.filename is not None:
        return FedRAGError(
            f"'{error.filename}' cannot be used: {error.strerror}.", "Check the path, and who may read and write there."
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return FedRAGError(
            f"The memory is full ({reason}).",
            "Lower trainer.*.batch_size or rag_system.generator.batch_tokens, or set gradient_checkpointing: true.",
        )
    return FedRAGError(
        reason, "This should not happen. Run the command again with --verbose and report what it prints."
    )


def _quiet_libraries() -> None:
    warnings.simplefilter("ignore")
    names = "transformers sentence_transformers datasets peft accelerate torch flwr bitsandbytes"
    for name in names.split():
        logging.getLogger(name).setLevel(logging.ERROR)
