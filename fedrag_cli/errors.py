"""The errors that fedrag raises on purpose: a message, a hint that says what to do next, and an exit code."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_CONNECTION = 4
EXIT_FEDERATION = 5
EXIT_INTERRUPTED = 130


class FedRAGError(Exception):
    """Base of every error that fedrag raises on purpose.

    Args:
        message: What is wrong, in one sentence or a short list.
        hint: What to do next; empty where the message says it already.
    """

    exit_code: int = EXIT_FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        """Keep the message and the hint apart, so that each can be rendered in its own way."""
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class ConfigError(FedRAGError):
    """The config or the command line is wrong; nothing was loaded."""

    exit_code = EXIT_USAGE


class DataError(FedRAGError):
    """A data file, a corpus or a row of it is missing or bad."""

    exit_code = EXIT_DATA


class ModelError(FedRAGError):
    """A model, a tokenizer or a checkpoint is missing, bad or does not fit."""

    exit_code = EXIT_DATA


class KnowledgeStoreError(FedRAGError):
    """A knowledge store is missing, empty, damaged or was filled by another encoder."""

    exit_code = EXIT_DATA


class TrainingError(FedRAGError):
    """Training cannot work or did not work."""

    exit_code = EXIT_FAILED


class RunInterruptedError(FedRAGError):
    """The run was interrupted by a signal; the message says what is saved."""

    exit_code = EXIT_INTERRUPTED


class OtherProcessError(FedRAGError):
    """Another process of a training that runs in several has failed, and has said why."""

    def __init__(self, message: str, hint: str = "", exit_code: int = EXIT_FAILED) -> None:
        """End with the same code as the process that failed."""
        super().__init__(message, hint)
        self.exit_code = exit_code


class ConnectionFailedError(FedRAGError):
    """A server or a client cannot be reached, authenticated or agreed with."""

    exit_code = EXIT_CONNECTION


class FederationError(FedRAGError):
    """A federation failed as a whole: too few clients, or too few usable updates; its state is saved."""

    exit_code = EXIT_FEDERATION


class ServerRefusedError(FederationError):
    """A client does not do what the server asks, or does not take what it sends: the federation is over for it."""
