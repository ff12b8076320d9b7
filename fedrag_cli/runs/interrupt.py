"""Ctrl-C and SIGTERM: finish the step, save, then stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptGuard:
    """Notes the first signal for whoever asks; a second one interrupts at once."""

    def __init__(self) -> None:
        """Start without a signal."""
        self.requested = False
        self.ignores_repeats = False
        """Whether a second signal means no more than the first: a launcher hands on what the terminal sends too."""

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and not self.ignores_repeats:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def deferred_interrupts() -> Iterator[InterruptGuard]:
    """Hold signals back while the enclosed code runs, so that it can stop at a point where its state is whole.

    Yields:
        A guard whose `requested` tells whether a signal has come.
    """
    guard = InterruptGuard()
    if threading.current_thread() is not threading.main_thread():
        yield guard
        return
    previous = {number: signal.signal(number, guard._note) for number in SIGNALS}
    try:
        yield guard
    finally:
        over = guard.requested and guard.ignores_repeats
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_IGN if over else handler)


@contextmanager
def terminable(*, once: bool = False) -> Iterator[None]:
    """Let SIGTERM interrupt the enclosed code as Ctrl-C does, so that it can leave its state whole.

    Args:
        once: Whether signals after the first mean no more than that: a launcher hands on what the terminal sends too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if once:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (SIGNALS if once else (signal.SIGTERM,))}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
