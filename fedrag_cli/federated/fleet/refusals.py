"""Telling whom a server has turned away, without that strangers can flood the screen or the memory."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

SECONDS_OF_A_COUNT = 60.0
MOST_LINES = 10
MOST_REMEMBERED = 1000


@dataclass
class _Count:
    since: float
    lines: int = 0


class Refusals:
    """Says once who was turned away and why; several threads may use it.

    Of each reason at most `MOST_LINES` lines a minute are told, so that a port scan does not hide another reason.

    Args:
        note: Shows a line.
        now: The time in seconds.
    """

    def __init__(self, note: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        """Start with nothing told."""
        self._note = note
        self._now = now
        self._told: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._counts: dict[str, _Count] = {}
        self._lock = threading.Lock()

    def tell(self, who: str, reason: str, line: str) -> None:
        """Show a line, unless the same was told of the same one already, or there are too many.

        Args:
            who: The address or the key.
            reason: One of a few fixed words.
            line: What to show.
        """
        with self._lock:
            if (who, reason) in self._told:
                self._told.move_to_end((who, reason))
                return
            now = self._now()
            count = self._counts.setdefault(reason, _Count(now))
            if now - count.since >= SECONDS_OF_A_COUNT:
                count.since, count.lines = now, 0
            count.lines += 1
            if count.lines > MOST_LINES + 1:
                return
            if count.lines > MOST_LINES:
                line = "More of the same were turned away; those of this minute are not listed"
            else:
                self._told[who, reason] = None
                if len(self._told) > MOST_REMEMBERED:
                    self._told.popitem(last=False)
        self._note(line)
