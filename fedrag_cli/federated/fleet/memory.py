"""Giving memory back to the system while tensors pass through a server."""

from __future__ import annotations

import ctypes
import gc
import sys

BYTES_BETWEEN = 32 * 2**20


class PassingMemory:
    """Frees what requests have left behind, every so many bytes.

    The web framework's requests are reference cycles that hold their bodies of up to 5 MiB until Python looks for
    garbage, which it does by the number of objects and not by their size; and the C library keeps what is freed for
    the thread that had it. Together that was several times the model.
    """

    def __init__(self) -> None:
        """Start with nothing passed."""
        self._passed = 0
        self._trim = ctypes.CDLL(None).malloc_trim if _has_glibc() else None

    def start(self) -> None:
        """Leave what is there already out of the search for garbage, which makes it short."""
        gc.collect()
        gc.freeze()

    def stop(self) -> None:
        """Search everything again."""
        gc.unfreeze()

    def note(self, count: int) -> None:
        """Count bytes that have passed."""
        self._passed += count
        if self._passed >= BYTES_BETWEEN:
            self._passed = 0
            gc.collect()
            if self._trim is not None:
                self._trim(0)


def _has_glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")
