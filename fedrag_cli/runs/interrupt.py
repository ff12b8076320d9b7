"""Ctrl-C, SIGTERM and SIGHUP: finish the step, save, then stop."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Windows has no SIGHUP.
SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__)

Handler = Callable[[int, FrameType | None], None]


class InterruptFlag:
    """Notes the first signal for whoever asks; a second one interrupts at once."""

    def __init__(self) -> None:
        """Start without a signal."""
        self.requested = False
        self.ignores_repeats = False
        """Whether a second signal means no more than the first: a launcher hands on what the terminal sends too."""

    def _note(self, number: int, frame: FrameType | None) -> None:
        _drop_lost_terminal(number)
        if self.requested and not self.ignores_repeats:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def deferred_interrupts() -> Iterator[InterruptFlag]:
    """Hold signals back while the enclosed code runs, so that it can stop at a point where its state is whole.

    Yields:
        A flag whose `requested` tells whether a signal has come.
    """
    flag = InterruptFlag()
    with _handling(SIGNALS, flag._note) as handled:
        try:
            yield flag
        finally:
            if flag.requested and flag.ignores_repeats:
                for number in handled:
                    handled[number] = signal.SIG_IGN


@contextmanager
def terminable(*, once: bool = False) -> Iterator[None]:
    """Let SIGTERM and SIGHUP interrupt the enclosed code as Ctrl-C does, so that it can leave its state whole.

    Args:
        once: Whether signals after the first mean no more than that: a launcher hands on what the terminal sends too.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        _drop_lost_terminal(number)
        if once:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    with _handling(SIGNALS if once else SIGNALS[1:], interrupt):
        yield


@contextmanager
def _handling(numbers: Sequence[signal.Signals], handler: Handler) -> Iterator[dict[signal.Signals, Any]]:
    """Handle signals while the enclosed code runs; what runs under `nohup` goes on ignoring SIGHUP.

    Yields:
        The handlers that are put back afterwards, by signal.
    """
    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    try:
        yield previous
    finally:
        for number, former in previous.items():
            signal.signal(number, former)


def _drop_lost_terminal(number: int) -> None:
    """Let output go nowhere where SIGHUP says that the terminal is gone; else the message of the end would fail."""
    if sys.platform == "win32" or number != signal.SIGHUP:
        return
    import termios

    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
