"""One exchange with several clients: send each its message, wait for the replies, and know who fell out and why."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Message, RecordDict

from fedrag_cli.federated.grid import CLIENT_FAILED, POLL_SECONDS, FederationGrid
from fedrag_cli.federated.roster import Participant, Roster
from fedrag_cli.text import printable

# Beyond the time that clients have, so that time is up by our clock and not by Flower's.
SPARE_SECONDS = 600.0

OnReply = Callable[[str, Message, float], None]
OnFailure = Callable[[str, str], None]


@dataclass
class _Outstanding:
    content: RecordDict
    message_type: str
    message_id: str
    node_id: int
    activation: int
    sent: float
    ttl: float
    gone: float = 0.0
    gone_at: float | None = None


class Exchange:
    """Messages on their way to clients.

    A client that was restarted has lost its message and is sent it again. One that is gone for too long, or does not
    fit any more after a restart, falls out; so does one that has not answered when time is up.

    Args:
        grid: The transport.
        roster: Who is there.
        rejoin_timeout: Seconds to wait for a client that is gone.
    """

    def __init__(self, grid: FederationGrid, roster: Roster, rejoin_timeout: float) -> None:
        """Start with nothing outstanding."""
        self._grid = grid
        self._roster = roster
        self._rejoin_timeout = rejoin_timeout
        self._outstanding: dict[str, _Outstanding] = {}

    def run(self, messages: list[Message], timeout: float, on_reply: OnReply, on_failure: OnFailure) -> None:
        """Send messages and see to every client until it has answered or fallen out.

        Args:
            messages: One for each client.
            timeout: Seconds until those that have not answered fall out.
            on_reply: Called with a client's name, its reply, and the seconds it took.
            on_failure: Called with a client's name and the reason, in words.
        """
        end = time.monotonic() + timeout
        for message in messages:
            message.metadata.ttl = timeout + SPARE_SECONDS
            self._send(self._roster.participant_at(message.metadata.dst_node_id), message)
        while self._outstanding:
            if self._collect(on_reply, on_failure):
                continue
            if self._outstanding and time.monotonic() >= end:
                for name in list(self._outstanding):
                    self._roster.give_up(name)
                    self._give_up(name, f"it did not answer within {timeout:g} s", on_failure)
            if self._outstanding:
                self._roster.refresh()
                for name in list(self._outstanding):
                    self._look_after(name, on_failure)
                self._grid.wait(POLL_SECONDS)

    def _send(self, participant: Participant, message: Message, gone: float = 0.0) -> None:
        kind, content, ttl = message.metadata.message_type, message.content, message.metadata.ttl
        sent, participant.has_worked = time.monotonic(), True
        (message_id,) = self._grid.push_messages([message])
        self._outstanding[participant.name] = _Outstanding(
            content, kind, message_id, participant.node_id, participant.activation, sent, ttl, gone
        )

    def _collect(self, on_reply: OnReply, on_failure: OnFailure) -> bool:
        """Take the replies that have come, and return whether there was one."""
        names = {item.message_id: name for name, item in self._outstanding.items()}
        replies = self._grid.pull_messages(list(names))
        for reply in replies:
            name = names[reply.metadata.reply_to_message_id]
            item = self._outstanding.pop(name)
            if reply.has_error():
                is_own = reply.error.reason == CLIENT_FAILED
                why = "its work failed; its own messages say why"
                on_failure(name, why if is_own else f"its reply is not taken: {printable(reply.error.reason)}")
            else:
                on_reply(name, reply, time.monotonic() - item.sent)
        return bool(replies)

    def _look_after(self, name: str, on_failure: OnFailure) -> None:
        participant, item, now = self._roster.find(name), self._outstanding[name], time.monotonic()
        if participant is None:
            self._give_up(name, "it has joined again under another name", on_failure)
        elif participant.status == "refused":
            self._give_up(name, participant.reason, on_failure)
        elif participant.status in ("offline", "given up"):
            # One that comes back only to leave again has the time once.
            item.gone, item.gone_at = item.gone + now - (item.gone_at or now), now
            patience = self._roster.patience(name, self._rejoin_timeout)
            if item.gone > patience:
                self._roster.give_up(name)
                self._give_up(name, f"it went away and did not come back within {patience:g} s", on_failure)
        else:
            item.gone_at = None
            if self._was_restarted(participant, item):
                self._grid.forget([item.message_id])
                again = Message(item.content, participant.node_id, item.message_type, ttl=item.ttl)
                self._send(participant, again, item.gone)

    def _was_restarted(self, participant: Participant, item: _Outstanding) -> bool:
        return (participant.node_id, participant.activation) != (item.node_id, item.activation)

    def _give_up(self, name: str, reason: str, on_failure: OnFailure) -> None:
        self._grid.forget([self._outstanding.pop(name).message_id])
        on_failure(name, reason)
