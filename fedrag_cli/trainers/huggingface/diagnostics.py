"""What a step tells beside its loss: means over the batches of one optimizer step."""

from __future__ import annotations

from fedrag_cli.runs.processes import Processes


class StepDiagnostics:
    """Collects values of batches until the optimizer step is recorded.

    Args:
        processes: Those that compute the step; this one alone by default.
    """

    def __init__(self, processes: Processes | None = None) -> None:
        """Start empty."""
        self._processes = processes or Processes()
        self.is_counting = True
        """Whether `add` adds; not where a batch has only what fills it up."""
        self._totals: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(self, count: float, **means: float) -> None:
        """Add the means of one batch.

        Args:
            count: What they are means over, such as the examples of the batch.
            **means: A mean by name.
        """
        for name, mean in means.items() if self.is_counting else ():
            self._totals[name] = self._totals.get(name, 0.0) + count * mean
            self._counts[name] = self._counts.get(name, 0.0) + count

    def take(self) -> dict[str, float]:
        """Return the mean of each value over the batches of all processes since the last call, and start anew."""
        totals: dict[str, float] = {}
        counts: dict[str, float] = {}
        for of_one, counts_of_one in self._processes.gather((self._totals, self._counts)):
            for name, total in of_one.items():
                totals[name] = totals.get(name, 0.0) + total
                counts[name] = counts.get(name, 0.0) + counts_of_one[name]
        self._totals, self._counts = {}, {}
        return {name: total / counts[name] for name, total in totals.items()}
