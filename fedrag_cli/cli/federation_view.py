"""What people see of a federation: plain lines anywhere, and a live table of rounds and clients on a terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedrag_cli.cli.progress import progress_bars, task_bar
from fedrag_cli.runs.reporter import epsilon_text
from fedrag_cli.text import LONGEST_NOTE, printable, readable

if TYPE_CHECKING:
    from fedrag_cli.runs.reporter import Advance

STATUS_STYLES = {"training": "cyan", "done": "green", "refused": "bold red", "failed": "red", "offline": "yellow"}
MOST_ROUNDS_SHOWN = 8


def federation_line(name: str, fields: Mapping[str, Any]) -> str:
    """Return a plain line for an event of a federation; an empty text for one that is not worth a line."""
    if name == "listening":
        protection = [("TLS" if fields["tls"] else "no TLS"), ("allowed keys" if fields["keys"] else "any key")]
        done = f", {fields['done']} done" if fields["done"] else ""
        return (
            f"Listening on {fields['address']} ({', '.join(protection)}); {counted(fields['rounds'], 'round')}{done}, "
            f"at least {counted(fields['min_clients'], 'client')}"
        )
    if name == "waiting":
        seen = ", ".join(fields["ready"]) or "none"
        return f"Waiting for clients: {len(fields['ready'])} of {fields['wanted']} ready (seen: {seen})"
    if name == "client":
        reason = f": {fields['reason']}" if fields["reason"] else ""
        return f"Client {fields['client']} is {fields['status']}{reason}"
    if name == "round_started":
        return (
            f"Round {fields['round']} of {fields['rounds']}: sent {megabytes(fields['bytes'])} to each of "
            f"{', '.join(fields['clients'])}"
        )
    if name == "client_update":
        return _update_line(fields)
    if name == "client_outlier":
        return f"Round {fields['round']}: {fields['client']} is an outlier: {fields['reason']}"
    if name == "round":
        refused = f", {len(fields['refused'])} refused" if fields["refused"] else ""
        refused += f", {counted(len(fields['outliers']), 'outlier')} held down" if fields["outliers"] else ""
        loss = f", loss {fields['loss']:.4f}" if fields["loss"] is not None else ""
        return (
            f"Round {fields['round']} of {fields['rounds']} done: {counted(len(fields['clients']), 'client')}{refused}"
            f", {counted(fields['examples'], 'example')}{loss}{_epsilon(fields)}, {fields['seconds']:.1f} s"
        )
    if name == "federated_evaluation":
        who = "the clients' validation questions" if fields["by"] == "clients" else "the server's questions"
        values = ", ".join(f"{metric} {value:.4f}" for metric, value in fields["metrics"].items())
        return f"Global model after round {fields['round']}, on {fields['examples']} of {who}: {values}"
    if name == "client_final":
        what = "has the final model" if fields["received"] else f"did not get the final model: {fields['reason']}"
        return f"Client {fields['client']} {what}"
    return ""


def counted(count: int, what: str) -> str:
    """Return a number with its noun."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def megabytes(size: float) -> str:
    """Return a number of bytes in words."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _epsilon(fields: Mapping[str, Any]) -> str:
    spent = epsilon_text(fields, long=True)
    return f", {spent}" if spent else ""


def _update_line(fields: Mapping[str, Any]) -> str:
    if not fields["accepted"]:
        return f"Round {fields['round']}: update of {fields['client']} refused: {fields['reason']}"
    loss = fields["metrics"].get("loss")
    return (
        f"Round {fields['round']}: update of {fields['client']}: {counted(fields['examples'], 'example')}"
        + (f", loss {loss:.4f}" if loss is not None else "")
        + f", {fields['seconds']:.1f} s, {megabytes(fields['bytes_received'])}"
    )


@dataclass
class ClientRow:
    """One client's line in the table."""

    status: str = ""
    round: int = 0
    examples: int = 0
    loss: float | None = None
    seconds: float | None = None
    sent: int = 0
    received: int = 0
    refusals: int = 0
    outliers: int = 0
    reason: str = ""


@dataclass
class Board:
    """What is known of a federation, from its events."""

    headline: str = "Starting"
    rounds: int = 0
    clients: defaultdict[str, ClientRow] = field(default_factory=lambda: defaultdict(ClientRow))
    finished: dict[int, dict[str, Any]] = field(default_factory=dict)
    measured: dict[int, dict[str, float]] = field(default_factory=dict)

    def apply(self, name: str, fields: Mapping[str, Any]) -> None:
        """Take one event in."""
        getattr(self, f"_on_{name}", lambda fields: None)(fields)

    def render(self) -> RenderableType:
        """Return headline, rounds and clients."""
        parts: list[RenderableType] = [Text(printable(self.headline, 1000), style="bold")]
        if self.finished or self.measured:
            parts.append(self._rounds_table())
        if self.clients:
            parts.append(self._clients_table())
        return Group(*parts)

    def _on_listening(self, fields: Mapping[str, Any]) -> None:
        self.rounds, self.headline = fields["rounds"], federation_line("listening", fields)

    def _on_waiting(self, fields: Mapping[str, Any]) -> None:
        self.headline = federation_line("waiting", fields)

    def _on_client(self, fields: Mapping[str, Any]) -> None:
        row = self.clients[fields["client"]]
        row.status, row.reason = fields["status"], fields["reason"]

    def _on_round_started(self, fields: Mapping[str, Any]) -> None:
        self.rounds = fields["rounds"]
        self.headline = f"Round {fields['round']} of {fields['rounds']}"
        for name in fields["clients"]:
            row = self.clients[name]
            row.status, row.round, row.sent = "training", fields["round"], row.sent + fields["bytes"]

    def _on_client_update(self, fields: Mapping[str, Any]) -> None:
        row = self.clients[fields["client"]]
        if not fields["accepted"]:
            row.status, row.reason, row.refusals = "refused", fields["reason"], row.refusals + 1
            return
        row.status, row.reason = "done", ""
        row.examples, row.loss, row.seconds = fields["examples"], fields["metrics"].get("loss"), fields["seconds"]
        row.received += fields["bytes_received"]

    def _on_client_outlier(self, fields: Mapping[str, Any]) -> None:
        row = self.clients[fields["client"]]
        row.reason, row.outliers = fields["reason"], row.outliers + 1

    def _on_round(self, fields: Mapping[str, Any]) -> None:
        self.finished[fields["round"]] = dict(fields)
        self.headline = f"Round {fields['round']} of {fields['rounds']} done"

    def _on_federated_evaluation(self, fields: Mapping[str, Any]) -> None:
        known = self.measured.setdefault(fields["round"], {})
        known |= {f"{fields['by']}: {name}": value for name, value in fields["metrics"].items()}

    def _on_client_final(self, fields: Mapping[str, Any]) -> None:
        row = self.clients[fields["client"]]
        row.status, row.reason = ("final model" if fields["received"] else "failed"), fields["reason"]

    def _rounds_table(self) -> Table:
        metrics = list(dict.fromkeys(name for values in self.measured.values() for name in values))
        spends = any("epsilon" in done for done in self.finished.values())
        columns = ["after round", "clients", "refused", "examples", "loss", "seconds", *(["epsilon"] if spends else [])]
        table = Table(*columns, *(escape(printable(name)) for name in metrics), header_style="bold")
        numbers = sorted({*self.finished, *self.measured})
        for number in numbers[-MOST_ROUNDS_SHOWN:]:
            done, values = self.finished.get(number), self.measured.get(number, {})
            cells = [""] * (len(columns) - 1)
            if done is not None:
                cells = [
                    str(len(done["clients"])),
                    str(len(done["refused"])),
                    str(done["examples"]),
                    _number(done["loss"]),
                    f"{done['seconds']:.1f}",
                    *([epsilon_text(done)] if spends else []),
                ]
            table.add_row(f"{number}/{self.rounds}", *cells, *(_number(values.get(name)) for name in metrics))
        return table

    def _clients_table(self) -> Table:
        held_down = ["outliers"] if any(row.outliers for row in self.clients.values()) else []
        table = Table(
            "client", "state", "round", "examples", "loss", "seconds", "sent", "received", "refused", *held_down, "why",
            header_style="bold",
        )  # fmt: skip
        for name, row in sorted(self.clients.items()):
            table.add_row(
                Text(printable(name)),
                Text(row.status, style=STATUS_STYLES.get(row.status, "")),
                str(row.round or ""),
                str(row.examples or ""),
                _number(row.loss),
                f"{row.seconds:.1f}" if row.seconds is not None else "",
                megabytes(row.sent) if row.sent else "",
                megabytes(row.received) if row.received else "",
                str(row.refusals or ""),
                *([str(row.outliers or "")] if held_down else []),
                Text(printable(row.reason)),
            )
        return table


class LiveFederationReporter:
    """Keeps a table of rounds and clients up to date on a terminal, with bars for long work below it."""

    def __init__(self, console: Console) -> None:
        """Draw on the given console."""
        self._board = Board()
        self._progress = progress_bars(console)
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> LiveFederationReporter:
        """Start drawing."""
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Draw a last time and stop."""
        self._live.stop()

    def event(self, name: str, **fields: Any) -> None:
        """Take an event into the table; what goes from it with the next event is printed above it."""
        self._board.apply(name, fields)
        if name == "listening":
            self.note(federation_line(name, fields))

    def note(self, message: str) -> None:
        """Print a line above the table."""
        self._live.console.print(readable(message, LONGEST_NOTE), markup=False)

    def task(self, description: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """Show a bar below the table."""
        return task_bar(self._progress, description, total, unit)

    def _render(self) -> RenderableType:
        return Group(self._board.render(), self._progress) if self._progress.tasks else self._board.render()


def _number(value: float | None) -> str:
    return f"{value:.4f}" if value is not None else ""
