"""Who takes part in a federation, and one exchange with them: send each its message, wait for the replies."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedrag_cli.errors import ConnectionFailedError
from fedrag_cli.federated.grid import CLIENT_FAILED, POLL_SECONDS, FederationGrid, Member
from fedrag_cli.federated.handshake import Agreement, differences
from fedrag_cli.federated.messages import ACTION, AGREEMENT, HANDSHAKE, NAME, ROUNDS, config_of
from fedrag_cli.runs.reporter import Reporter
from fedrag_cli.text import printable

Status = Literal["ready", "refused", "offline", "given up", "dismissed"]
LONGEST_NAME = 64
MOST_STRANGERS = 100
# So many events a client that has worked makes, and all others together.
MOST_TOLD = 1000


@dataclass
class Participant:
    """A client that has shaken hands."""

    name: str
    node_id: int
    """Where messages to it go."""
    activation: int
    """Which of its connections the handshake was on."""
    status: Status
    """Refused where it does not fit, given up where it was offline for too long, dismissed with the final weights."""
    reason: str = ""
    """Why it was refused, in words."""
    claimed: str = ""
    """The name that it gives itself, where keys say nothing of names."""
    has_worked: bool = False
    """Whether it was sent a message beyond the handshake."""


class Roster:
    """Shakes hands with clients as they come, and knows who can be sent work."""

    def __init__(
        self, grid: FederationGrid, agreement: Agreement, reporter: Reporter, rounds: int | None = None
    ) -> None:
        """Start without clients, which will be asked to agree to so many rounds, or as their own settings say."""
        self._rounds = {} if rounds is None else {ROUNDS: rounds}
        self._grid = grid
        self._agreement = agreement
        self._reporter = reporter
        self._participants: dict[str, Participant] = {}
        self._pending: dict[str, Member] = {}
        self._greeted: dict[int, int] = {}
        self._given_up: Counter[int] = Counter()
        self._told: Counter[int | None] = Counter()

    def refresh(self) -> None:
        """Look who is there, greet the new ones, and take the handshakes that came back."""
        members = {member.node_id: member for member in self._grid.members()}
        for member in sorted(members.values(), key=lambda member: (member.name, member.key)):
            if self._greeted.get(member.node_id) != member.activation:
                self._greeted[member.node_id] = member.activation
                self._greet(member)
        while replies := self._grid.pull_messages(list(self._pending)):
            for reply in replies:
                self._conclude(self._pending.pop(reply.metadata.reply_to_message_id), reply)
        for participant in self._participants.values():
            if participant.status == "ready" and participant.node_id not in members:
                participant.status = "offline"
                self._tell(participant)
            elif participant.status in ("offline", "given up") and self._is_connected(participant, members):
                participant.status = "ready"
                self._tell(participant)
        for participant in self.with_status("offline"):
            self._take_over(participant)
        self._forget_strangers(members)

    def find(self, name: str) -> Participant | None:
        """Return the participant of a name; None where it has come back under another one."""
        return self._participants.get(name)

    def ready(self) -> list[Participant]:
        """Return the clients that can be sent work, by name."""
        return self.with_status("ready")

    def with_status(self, status: Status) -> list[Participant]:
        """Return the clients of a status, by name."""
        found = [participant for participant in self._participants.values() if participant.status == status]
        return sorted(found, key=lambda participant: participant.name)

    def give_up(self, name: str) -> None:
        """Note that a client was offline for too long to be waited for again."""
        participant = self._participants.get(name)
        if participant is not None and participant.status == "offline":
            participant.status = "given up"
            self._given_up[participant.node_id] += 1

    def patience(self, name: str, seconds: float) -> float:
        """Return how much of a time to wait for a client that is gone: half as much each time that it was given up.

        So one that comes and leaves in each round holds up all of them together no longer than two such times.
        """
        return seconds * float(0.5 ** self._given_up[self._participants[name].node_id])

    def dismiss(self, name: str) -> None:
        """Note that a client has all that it came for, so that its leaving is no news."""
        self._participants[name].status = "dismissed"

    def participant_at(self, node_id: int) -> Participant:
        """Return the client that messages to a node reach."""
        return next(p for p in self._participants.values() if p.node_id == node_id)

    def _take_over(self, gone: Participant) -> None:
        """Give the name of a client that went away to one that calls itself the same and came after it.

        A client that was killed and started again without keys is there before its former connection is found dead.
        """
        for other in self.ready():
            if other.claimed == gone.name and not other.has_worked:
                del self._participants[other.name]
                self._participants[gone.name] = other
                other.name = gone.name
                self._tell(other)
                return

    def _forget_strangers(self, members: dict[int, Member]) -> None:
        """Forget those that went away and never worked, once they are many: without allowed keys anybody can come."""
        gone = [p for p in self._participants.values() if p.node_id not in members and not p.has_worked]
        for participant in gone[: max(0, len(gone) - MOST_STRANGERS)]:
            del self._participants[participant.name]
        known = {participant.node_id for participant in self._participants.values()} | set(members)
        # Who comes back later is greeted again.
        self._greeted = {node_id: number for node_id, number in self._greeted.items() if node_id in known}
        self._given_up = Counter({node_id: times for node_id, times in self._given_up.items() if node_id in known})
        lost = [message_id for message_id, member in self._pending.items() if member.node_id not in known]
        self._grid.forget(lost)
        for message_id in lost:
            del self._pending[message_id]

    def _is_connected(self, participant: Participant, members: dict[int, Member]) -> bool:
        member = members.get(participant.node_id)
        return member is not None and member.activation == participant.activation

    def _greet(self, member: Member) -> None:
        for message_id in [key for key, other in self._pending.items() if other.node_id == member.node_id]:
            greeted = self._pending.pop(message_id)
            replies = self._grid.pull_messages([message_id])
            for reply in replies:
                # It came back and answered the greeting of its visit before; one that does not fit has left by now.
                self._conclude(greeted, reply)
            if not replies:
                self._grid.forget([message_id])
        greeting: dict[str, Any] = {ACTION: HANDSHAKE, AGREEMENT: self._agreement.to_json(), **self._rounds}
        content = RecordDict({"config": ConfigRecord(greeting)})
        (message_id,) = self._grid.push_messages([Message(content, member.node_id, MessageType.QUERY)])
        if message_id:
            self._pending[message_id] = member

    def _conclude(self, member: Member, reply: Message) -> None:
        claimed, reason = "", ""
        if reply.has_error():
            reason = "its handshake failed"
        else:
            claimed, reason = self._compare(reply)
        name = member.name or self._free_name(claimed or f"client-{member.key[:6]}", member)
        before = None
        for other in [other for other in self._participants.values() if other.node_id == member.node_id]:
            before = other
            # The same key under another name is still the same client.
            del self._participants[other.name]
        status: Status = "refused" if reason else "ready"
        claimed = "" if member.name else claimed
        has_worked = before is not None and before.has_worked
        self._participants[name] = Participant(
            name, member.node_id, member.activation, status, reason, claimed, has_worked
        )
        if before is None or (before.name, before.status, before.reason) != (name, status, reason):
            self._tell(self._participants[name])

    def _compare(self, reply: Message) -> tuple[str, str]:
        """Return the name that a client gives itself, and why it does not fit; an empty text where it does."""
        values = config_of(reply)
        try:
            theirs = Agreement.from_json(str(values.get(AGREEMENT, "")))
        except ConnectionFailedError as error:
            return "", error.message
        claimed = str(values.get(NAME, ""))[:LONGEST_NAME]
        # What `check_client_name` allows, so that no name steers a terminal, looks like another, or is a path.
        name = re.sub(r"[^A-Za-z0-9._-]", "", claimed).lstrip("._-")
        return name, "; ".join(differences(self._agreement, theirs))

    def _free_name(self, name: str, member: Member) -> str:
        """Return a name that no other connected client has; where keys are not checked, a name is only a claim."""
        for candidate in (name, f"{name}-{member.key[:6]}"):
            other = self._participants.get(candidate)
            if other is None or other.status != "ready" or other.node_id == member.node_id:
                return candidate
        return f"{name}-{member.key}"

    def _tell(self, participant: Participant) -> None:
        """Record how a client stands, but not for ever where it comes and goes: strangers must not fill the disk."""
        teller = participant.node_id if participant.has_worked else None
        self._told[teller] += 1
        if self._told[teller] <= MOST_TOLD:
            self._reporter.event(
                "client", client=participant.name, status=participant.status, reason=participant.reason
            )
        elif self._told[teller] == MOST_TOLD + 1:
            who = "clients that have not worked yet" if teller is None else f"client {participant.name}"
            self._reporter.note(f"{MOST_TOLD} comings and goings of {who} are recorded; further ones are not")


# Beyond the time that clients have, so that time is up by our clock and not by Flower's.
SPARE_SECONDS = 600.0

OnReply = Callable[[str, Message, float], None]
"""Called with a client's name, its reply, and the seconds it took."""
OnFailure = Callable[[str, str], None]
"""Called with a client's name and the reason, in words."""


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
    """

    def __init__(self, grid: FederationGrid, roster: Roster, rejoin_timeout: float) -> None:
        """Start with nothing outstanding; a client that is gone is waited for so many seconds."""
        self._grid = grid
        self._roster = roster
        self._rejoin_timeout = rejoin_timeout
        self._outstanding: dict[str, _Outstanding] = {}

    def run(self, messages: list[Message], timeout: float, on_reply: OnReply, on_failure: OnFailure) -> None:
        """Send each client its message, and see to it until it has answered or fallen out."""
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
