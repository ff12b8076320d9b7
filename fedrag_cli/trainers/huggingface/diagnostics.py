"""What a step tells beside its loss: means over the batches of one optimizer step."""

from __future__ import annotations


class StepDiagnostics:
    """Collects values of batches until the optimizer step is recorded."""

    def __init__(self) -> None:
        """Start empty."""
        self._totals: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(self, count: float, **means: float) -> None:
        """Add the means of one batch.

        Args:
            count: What they are means over, such as the examples of the batch.
            **means: A mean by name.
        """
        for name, mean in means.items():
            self._totals[name] = self._totals.get(name, 0.0) + count * mean
            self._counts[name] = self._counts.get(name, 0.0) + count

    def take(self) -> dict[str, float]:
        """Return the mean of each value over the batches since the last call, and start anew."""
        means = {name: total / self._counts[name] for name, total in self._totals.items()}
        self._totals, self._counts = {}, {}
        return means
