"""What the rounds need of a transport: who is there, sending a message, taking what came back; and one in memory."""

from __future__ import annotations

import logging
import time
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedrag_cli.errors import FedRAGError, RunInterruptedError
from fedrag_cli.federated.fleet import _flower as flower
from fedrag_cli.runs.reporter import Reporter, SilentReporter
from fedrag_cli.text import printable, readable

POLL_SECONDS = 0.05
# The reason of a reply whose client could not do the work; other reasons are the transport's.
CLIENT_FAILED = "the client failed"


def quiet_flower() -> None:
    """Keep Flower's own log, and that of its HTTP client, off the screen; what matters is told by events."""
    # Flower sets its level when it is imported, so this comes after.
    for name in ("flwr", "httpx", "uvicorn", "uvicorn.error"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Member:
    """A client that is connected now."""

    node_id: int
    """Where messages to it go; another one after the server was restarted."""
    name: str
    """Its name where the transport knows it for certain, from an allowed key; empty otherwise."""
    key: str
    """A short fingerprint of its public key."""
    activation: int
    """How often it has connected; it changes where a client was restarted and has lost its messages."""


class FederationGrid(Grid):
    """A Flower grid that also tells who is connected. Subclasses move the messages."""

    @abstractmethod
    def members(self) -> list[Member]:
        """Return the clients that are connected now."""

    @abstractmethod
    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages and return their ids, in the same order."""

    @abstractmethod
    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the complete replies to the given messages that have come since the last call."""

    @abstractmethod
    def forget(self, message_ids: Iterable[str]) -> None:
        """Drop messages whose replies are not wanted any more."""

    def wait(self, seconds: float) -> None:
        """Wait until there may be something new, but not longer than so many seconds."""
        time.sleep(seconds)

    def set_run(self, run: flower.Run) -> None:
        """Take a run; there is only one here."""

    @property
    def run(self) -> flower.Run:
        """The one run of this process."""
        return flower.Run.create_empty(1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message, for strategies that still call this."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Sequence[int]:
        """Return where messages to the connected clients go."""
        return [member.node_id for member in self.members()]

    def get_nodes(self) -> Sequence[flower.NodeInfo]:
        """Return the connected clients as Flower describes them."""
        return [flower.NodeInfo(node_id=member.node_id, name=member.name) for member in self.members()]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and wait for the replies, at most `timeout` seconds."""
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        end = time.monotonic() + timeout if timeout is not None else None
        while waiting:
            came = self.pull_messages(waiting)
            replies += came
            waiting -= {reply.metadata.reply_to_message_id for reply in came}
            if end is not None and time.monotonic() >= end:
                break
            if waiting:
                self.wait(POLL_SECONDS)
        self.forget(waiting)
        return replies


class ChosenNodes(FederationGrid):
    """A view of a grid that shows a fixed choice of clients, in a fixed order.

    Flower's strategies draw from what the grid shows and wait without end where it is too little; with a fixed choice
    of enough clients they never wait, and the same seed draws the same clients.
    """

    def __init__(self, grid: FederationGrid, node_ids: Sequence[int]) -> None:
        """Keep the grid and the choice."""
        self._grid = grid
        self._node_ids = list(node_ids)

    def members(self) -> list[Member]:
        """Return the connected clients of the choice."""
        return [member for member in self._grid.members() if member.node_id in self._node_ids]

    def get_node_ids(self) -> Sequence[int]:
        """Return the choice, in its order."""
        return list(self._node_ids)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand the call on."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Hand the call on."""
        return self._grid.pull_messages(message_ids)

    def forget(self, message_ids: Iterable[str]) -> None:
        """Hand the call on."""
        self._grid.forget(message_ids)


class InProcessGrid(FederationGrid):
    """Calls clients in this process, one at a time, whenever the server looks for replies."""

    def __init__(self, clients: Mapping[str, Callable[[Message], Message]], reporter: Reporter | None = None) -> None:
        """Give every client a node id, in the order of the names; the reporter is told what goes wrong in one."""
        self._clients = dict(enumerate(sorted(clients), start=2))
        self._handlers = {number: clients[name] for number, name in self._clients.items()}
        self._reporter: Reporter = reporter or SilentReporter()
        self._waiting: dict[str, Message] = {}
        self._sent = 0
        flower.identify()

    def members(self) -> list[Member]:
        """Return all clients."""
        return [Member(number, name, name, 1) for number, name in self._clients.items()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep the messages until the server looks for replies."""
        ids = []
        for message in messages:
            self._sent += 1
            message_id = f"message-{self._sent}"
            flower.set_message_id(message, message_id)
            self._waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Let one client answer, and return its reply."""
        wanted = set(message_ids)
        for message_id, message in self._waiting.items():
            if message_id in wanted:
                del self._waiting[message_id]
                return [self._answer(message)]
        return []

    def forget(self, message_ids: Iterable[str]) -> None:
        """Drop messages that need no answer any more."""
        for message_id in message_ids:
            self._waiting.pop(message_id, None)

    def _answer(self, message: Message) -> Message:
        number = message.metadata.dst_node_id
        try:
            return self._handlers[number](message)
        except RunInterruptedError:
            raise
        except FedRAGError as error:
            self._reporter.note(f"{printable(self._clients[number])} failed: {readable(str(error))}")
        except Exception as error:  # noqa: BLE001  (a client may fail in any way; the federation goes on without it)
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.name}, line {last.lineno}"
            reason = f"{type(error).__name__}: {printable(str(error))} ({where})"
            self._reporter.note(f"{printable(self._clients[number])} failed: {reason}")
        return flower.failed(message, CLIENT_FAILED)
