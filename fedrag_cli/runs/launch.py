"""What a launcher such as `torchrun` or `accelerate launch` tells each process that it starts; torch is not needed."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def process_count() -> int:
    """Return how many processes the launcher has started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Return which of them this one is, from 0; the first one is the main process."""
    return int(os.environ["RANK"]) if process_count() > 1 else 0


def local_rank() -> int:
    """Return which of the processes on this machine this one is, from 0; each takes the GPU of its number."""
    return int(os.environ.get("LOCAL_RANK", "0")) if process_count() > 1 else 0


def resume_command(run_dir: Path) -> str:
    """Return the command that goes on with a run, started by the launcher that has started this process."""
    arguments = f"resume {shlex.quote(str(run_dir))}"
    if process_count() == 1:
        return f"fedrag {arguments}"
    if "ACCELERATE_DYNAMO_BACKEND" in os.environ:
        launcher = f"accelerate launch --multi_gpu --num_processes {process_count()}"
    else:
        launcher = f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', process_count())}"
    on_several_machines = process_count() != int(os.environ.get("LOCAL_WORLD_SIZE", process_count()))
    addition = " (with the launcher's options for several machines, on each of them)" if on_several_machines else ""
    return f"{launcher} -m fedrag_cli {arguments}{addition}"
