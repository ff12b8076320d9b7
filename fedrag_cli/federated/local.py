"""A transport without a network: the clients of a simulation, called directly, one after another."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping

from flwr.app import Message
from flwr.app.error import Error
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from fedrag_cli.errors import FedRAGError, RunInterruptedError
from fedrag_cli.federated.client import ClientHandler
from fedrag_cli.federated.grid import CLIENT_FAILED, FederationGrid, Member
from fedrag_cli.runs.reporting import Reporter, SilentReporter
from fedrag_cli.text import printable, readable


class LocalGrid(FederationGrid):
    """Calls clients in this process, one at a time, whenever the server looks for replies.

    Args:
        clients: Handlers by name.
        reporter: Told what goes wrong in a client.
    """

    def __init__(self, clients: Mapping[str, ClientHandler], reporter: Reporter | None = None) -> None:
        """Give every client a node id, in the order of the names."""
        self._clients = dict(enumerate(sorted(clients), start=2))
        self._handlers = {number: clients[name] for number, name in self._clients.items()}
        self._reporter: Reporter = reporter or SilentReporter()
        self._waiting: dict[str, Message] = {}
        self._sent = 0
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def members(self) -> list[Member]:
        """Return all clients."""
        return [Member(number, name, name, 1) for number, name in self._clients.items()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep the messages until the server looks for replies."""
        ids = []
        for message in messages:
            self._sent += 1
            message_id = f"message-{self._sent}"
            message.metadata.__dict__["_message_id"] = message_id
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
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, CLIENT_FAILED), reply_to=message)
