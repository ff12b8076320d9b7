"""The entry point: one command a file, registered here.

A start takes a fraction of a second, though torch and its like take many to import, because:

- Only the module of the command that is given is imported (`application`), and what a module needs for a part of its
  work alone, it imports there: no command imports a model library before its config is known to be right. The public
  names of `fedrag_cli` are loaded when they are used (PEP 562).
- The registry imports the config classes of a kind when somebody asks for the kind, never their builders, and a
  component's slot in the config makes a validator for the class that is chosen alone. `config_class` gives all classes
  the same methods rather than let `dataclasses` compile them for each, and help texts stay in the source until asked
  for.
- Help is plain: Rich's needs a Markdown parser, whose import takes as long as all the rest together.
- What a start makes lives on, so that looking for garbage in it is lost time (7 %): that is off until long work begins
  (`Session.reporter`) and at the end of the process.
- What the libraries read from the environment when they are imported is set before (`_quiet_environment`).

`tests/test_import_hygiene.py` holds what is imported to this, and `scripts/bench/startup.py` measures it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
import typer.core

from fedrag_cli.cli.session import NO_BARS, abandon_stdout, session
from fedrag_cli.errors import EXIT_FAILED, EXIT_INTERRUPTED, ConfigError
from fedrag_cli.runs.interrupt import terminable

# Each is a module of this package, with `command`, or with `app` where it has commands below it.
COMMANDS = (
    "init",
    "validate",
    "schema",
    "components",
    "doctor",
    "index",
    "train",
    "resume",
    "evaluate",
    "compare",
    "report",
    "query",
    "serve-fl",
    "join-fl",
    "simulate",
    "export-flower-app",
    "keys",
)
HELP = """Tune the retriever and the generator of a RAG system on your own data.

Exit codes: 0 done, 1 failed, 2 usage or config, 3 data or model missing or bad, 4 connection or authentication,
5 federation failed, 130 interrupted with a checkpoint saved. With --json a command prints one JSON document to stdout;
all else goes to stderr.
"""

# Typer escapes brackets for Rich wherever Rich is installed, also in plain help, which then shows the backslashes.
typer.core.HAS_RICH = False


def application(names: Sequence[str] = COMMANDS) -> typer.Typer:
    """Return the command line with some of `COMMANDS`."""
    app = typer.Typer(
        name="fedrag",
        help=HELP,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        # click suggests them already.
        suggest_commands=False,
    )
    app.callback(invoke_without_command=True, help=HELP)(_root)
    for name in names:
        module = importlib.import_module(f"fedrag_cli.cli.{name.replace('-', '_')}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            app.command(name=name)(module.command)
    return app


def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from importlib import metadata

        typer.echo(metadata.version("fedrag-cli"))
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with arguments, those of the process by default, and return its exit code."""
    _usable_streams()
    _quiet_environment()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        atexit.register(gc.freeze)
    gc.disable()
    try:
        with terminable():
            _require_texts(given)
            application(given[:1] if given and given[0] in COMMANDS else COMMANDS)(args=given, prog_name="fedrag")
    except typer.Exit as leave:
        return leave.exit_code
    except SystemExit as leave:
        return int(leave.code or 0) if isinstance(leave.code, int | None) else 1
    except OSError as error:
        # Help and versions are written outside of what surrounds the commands.
        abandon_stdout()
        typer.echo(f"Error: The output cannot be written: {error.strerror}.", err=True)
        return EXIT_FAILED
    except KeyboardInterrupt:
        # A command says so itself; here it was being imported.
        typer.echo("Error: Interrupted.", err=True)
        return EXIT_INTERRUPTED
    finally:
        gc.enable()
    return 0


def _require_texts(arguments: Sequence[str]) -> None:
    """End the command where an argument has what no path, setting or question can have."""
    for number, argument in enumerate(arguments, start=1):
        try:
            wrong = "has a NUL character" if b"\0" in os.fsencode(argument) else ""
        except UnicodeEncodeError as error:
            wrong = f"is no text ({error.reason})"
        if wrong:
            with session(json_output="--json" in arguments, quiet=False, verbose=False):
                raise ConfigError(f"Argument {number} {wrong}.", "Leave that character out.")


def _usable_streams() -> None:
    """Let no character and no closed stream end a command; JSON is written with escapes where it needs them."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  (for the whole process)
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        # Texts in pipes and files are UTF-8 wherever this runs; what is none is found and named by who reads it.
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")


def _quiet_environment() -> None:
    """Turn the libraries' telemetry off before they are imported, and their bars, which would stand between ours.

    Those of downloads from the hub stay on a terminal: the hub decides on them itself.
    """
    settings = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    if not sys.stderr.isatty():
        settings |= NO_BARS
    for name, value in settings.items():
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    sys.exit(main())
