"""What a launcher such as `torchrun` or `accelerate launch` tells each process that it starts; torch is not needed."""

from __future__ import annotations

import os


def process_count() -> int:
    """Return how many processes the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def process_number() -> int:
    """Return which of them this one is, from 0; the first one is the main process."""
    return int(os.environ["RANK"]) if process_count() > 1 else 0


def local_process_number() -> int:
    """Return which of the processes on this machine this one is, from 0; each takes the GPU of its number."""
    return int(os.environ.get("LOCAL_RANK", "0")) if process_count() > 1 else 0
