"""Several processes at one training, as a launcher starts them: rank 0 decides and writes, all of them compute.

What rank 0 alone does may take hours, so the others wait for its results at the launcher's key-value store,
where waiting has no time limit and notices failures, and not in a collective operation of torch. Every command asks
for its rank when it starts, so torch is imported only where there are others.
"""

from __future__ import annotations

import os
import pickle
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedrag_cli.errors import EXIT_FAILED, EXIT_INTERRUPTED, ConnectionFailedError, OtherProcessError, TrainingError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
# Of one step: the slowest process may have passages to score that the others have not.
COLLECTIVE_TIMEOUT = timedelta(hours=2)
LONGEST_PAUSE = 0.25
# The store is shared with torch, whose keys begin otherwise.
_FAILURE = "fedrag-failure"
_joined: list[Processes] = []


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


class Processes:
    """The processes of a training; without a launcher it is this one alone.

    All of them must make the same calls of `run_on_rank_0`, `any`, `all_gather` and `barrier` in the same order.

    Args:
        rank: Which one this is, from 0.
        count: How many there are.
        store: Key-value store of torch that all of them see; None where there is one process.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank = rank
        self.count = count
        self._store = store
        self._results = 0

    @property
    def is_rank_0(self) -> bool:
        """Whether this is the process that decides and writes."""
        return self.rank == 0

    def run_on_rank_0(self, work: Callable[[], T]) -> T:
        """Let rank 0 alone do some work, however long it takes, and return its result in all of them.

        Raises:
            OtherProcessError: Another process failed while this one waited.
        """
        if not self.is_rank_0:
            result: T = self.receive()
            return result
        result = work()
        if self.count > 1:
            self._results += 1
            self._store.set(f"fedrag-result-{self._results}", pickle.dumps(result))
        return result

    def receive(self) -> Any:
        """Return what the next `run_on_rank_0` of rank 0 returns there; the other half of that call."""
        self._results += 1
        key, pause = f"fedrag-result-{self._results}", 0.01
        while not self._store.check([key]):
            self._raise_if_failed_elsewhere()
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        result = pickle.loads(self._store.get(key))
        if self._store.add(f"{key}-read", 1) == self.count - 1:
            self._store.delete_key(key)
        return result

    def wait_for_all(self) -> None:
        """Wait until all processes are here; raise OtherProcessError at once where one of them fails instead."""
        here = self._store.add("fedrag-here", 1)
        while here < self.count:
            self._raise_if_failed_elsewhere()
            time.sleep(0.05)
            here = self._store.add("fedrag-here", 0)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any of the processes."""
        if self.count == 1:
            return flag
        import torch
        from torch import distributed

        flags = torch.tensor([int(flag)])
        distributed.all_reduce(flags, op=distributed.ReduceOp.MAX)
        return bool(flags.item())

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, in their order."""
        if self.count == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.any(False)

    def shard(self, rows: Sequence[T]) -> Sequence[T]:
        """Return those of the rows that this process computes; none where there are fewer rows than processes."""
        return rows[self.rank :: self.count]

    @contextmanager
    def failures_shared(self) -> Iterator[None]:
        """Let the other processes know how the enclosed code fails, so that they stop waiting.

        Raises:
            OtherProcessError: It fails because another process has failed.
            TrainingError: It fails because another process is gone.
        """
        try:
            yield
        except OtherProcessError:
            raise
        except KeyboardInterrupt as error:
            # A launcher ends the other processes where one has failed, and that one's failure is what has happened.
            self._raise_if_failed_elsewhere(but_interruptions=True)
            self._share(error)
            raise
        except RuntimeError as error:
            self._raise_if_failed_elsewhere()
            if self.count > 1 and _is_lost_connection(error):
                raise TrainingError(
                    f"The connection to another process of this training is lost: {error}",
                    "Its own output says why. 'fedrag resume RUN_DIR', launched as before, goes on.",
                ) from error
            self._share(error)
            raise
        except BaseException as error:
            self._share(error)
            raise

    def _share(self, error: BaseException) -> None:
        if self.count == 1 or self._store.check([_FAILURE]):
            return
        code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", EXIT_FAILED)
        message = str(getattr(error, "message", "") or error or type(error).__name__)
        self._store.set(_FAILURE, pickle.dumps((self.rank, message, getattr(error, "hint", ""), code)))

    def _raise_if_failed_elsewhere(self, *, but_interruptions: bool = False) -> None:
        if self.count == 1 or not self._store.check([_FAILURE]):
            return
        number, message, hint, code = pickle.loads(self._store.get(_FAILURE))
        if number != self.rank and not (but_interruptions and code == EXIT_INTERRUPTED):
            raise OtherProcessError(f"Process {number} of this training failed: {message}", hint, code)


def join_processes(choose_device: Callable[[], torch.device]) -> Processes:
    """Return the processes of this launch, after connecting them when it is called for the first time.

    Args:
        choose_device: Returns where this process computes. Rank 0 asks first, so that what is wrong for all of them is
            told once.

    Raises:
        ConnectionFailedError: They cannot reach each other.
        OtherProcessError: Another process has failed before it has joined.
    """
    if process_count() == 1:
        return Processes()
    if not _joined:
        import torch
        from torch.distributed.rendezvous import rendezvous

        with _connection_errors():
            store, rank, count = next(iter(rendezvous("env://")))
        processes = Processes(rank, count, store)
        with processes.failures_shared():
            of_rank_0 = processes.run_on_rank_0(lambda: str(choose_device()))
            device = torch.device(of_rank_0) if processes.is_rank_0 else choose_device()
            processes.wait_for_all()
            with _connection_errors():
                _connect(processes, store, device)
        _joined.append(processes)
    return _joined[0]


def _connect(processes: Processes, store: Any, device: torch.device) -> None:
    import torch
    from torch import distributed

    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo",
        store=store,
        rank=processes.rank,
        world_size=processes.count,
        timeout=COLLECTIVE_TIMEOUT,
    )


@contextmanager
def _connection_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise ConnectionFailedError(
            f"The processes of this launch cannot reach each other: {error}",
            "Start them with 'torchrun --nproc_per_node N -m fedrag_cli train CONFIG' or with accelerate launch.",
        ) from error


def have_joined() -> bool:
    """Return whether this process is connected to others."""
    return bool(_joined)


def _is_lost_connection(error: RuntimeError) -> bool:
    from torch import distributed

    text = str(error).lower()
    return isinstance(error, distributed.DistError) or any(name in text for name in ("gloo", "nccl", "by peer"))
