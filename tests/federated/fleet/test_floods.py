"""Many new keys, members that come and go, and requests of another time: what they cost, and whom they hurt."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_from_proto
from toy_federation import (
    Notes,
    Raw,
    Recorder,
    ToyClient,
    answered,
    common,
    ended,
    eventually,
    new_key,
    node,
    request_bytes,
    rounds_of,
    serving,
    start,
)

from fedrag_cli.federated.client import ACTION, AGREEMENT, NAME, STOP
from fedrag_cli.federated.fleet._flower import ACTIVATE, DEACTIVATE, HEARTBEAT, TYPES, Packer
from fedrag_cli.federated.fleet.auth import Refusals, Signer
from fedrag_cli.federated.fleet.state import Client
from fedrag_cli.federated.keys import load_allowed_keys, load_private_key
from fedrag_cli.federated.participants import Roster

pytestmark = pytest.mark.fl


def request(raw: Raw, path: str, **fields: Any) -> tuple[bytes, dict[str, str]]:
    """Return a signed request's body and headers."""
    body = TYPES[path][0](**fields).SerializeToString()
    return body, raw.signer.headers(path, body)


def test_what_was_signed_for_another_start_of_the_server_opens_nothing() -> None:
    """Who listens on a plain line repeats an introduction after a restart, and takes the client's place over."""
    key = new_key()
    first, second = Raw(Signer(key)), Raw(Signer(key))

    def repeat(path: str, content: tuple[bytes, dict[str, str]]) -> str:
        body, headers = content
        return str(httpx.post(f"http://127.0.0.1:{port}{path}", content=body, headers=headers).json()["detail"])

    with serving() as server:
        first.connect(server)
        port = server.address[1]
        # One that was taken once, and one that was held back.
        taken = request(first, ACTIVATE, public_key=first.signer.public_key)
        assert httpx.post(f"http://127.0.0.1:{port}{ACTIVATE}", content=taken[0], headers=taken[1]).status_code == 200
        held_back = request(first, ACTIVATE, public_key=first.signer.public_key)
        goodbye = request(first, DEACTIVATE)
    with serving() as server:
        port = server.address[1]
        assert repeat(ACTIVATE, taken) == repeat(ACTIVATE, held_back) == "challenged"
        second.connect(server)
        assert repeat(ACTIVATE, taken) == repeat(ACTIVATE, held_back) == "challenged"
        assert repeat(DEACTIVATE, goodbye) == "superseded"
        second.post(HEARTBEAT)
        assert [member.activation for member in server.state.members()] == [1]
        # Nor what a client has signed before it was forgotten, though it goes on with its session.
        third = Raw(Signer(new_key()))
        third.connect(server)
        goodbye = request(third, DEACTIVATE)
        server.state._clients.clear()
        third.connect(server)
        assert repeat(DEACTIVATE, goodbye) == "used"
        assert len(server.state.members()) == 1


def register(server: Any, count: int, keys: list[Any], source: str = "127.0.0.1") -> list[int]:
    """Introduce many new clients from an address, and return the codes of the answers."""
    codes = []
    transport = httpx.HTTPTransport(verify=False, local_address=source)
    with httpx.Client(base_url=f"http://127.0.0.1:{server.address[1]}", transport=transport) as line:
        for number in range(count):
            raw = Raw(Signer(keys[number % len(keys)] if keys else new_key()))
            for _ in range(2):
                body, headers = request(raw, ACTIVATE, public_key=raw.signer.public_key)
                answer = line.post(ACTIVATE, content=body, headers=headers)
                if answer.status_code == 401 and answer.json()["challenge"]:
                    raw.signer.begin(answer.json()["challenge"])
            codes.append(answer.status_code)
    return codes


def in_memory(kind: type) -> int:
    gc.collect()
    return sum(type(item) is kind for item in gc.get_objects())


def test_a_flood_of_new_keys_is_bounded_and_locks_nobody_out() -> None:
    """From one address come many more than there is room for; those that take part stay, others still get in."""
    early, late = ToyClient("early", [1.0, 2.0, 3.0]), ToyClient("late", [3.0, 2.0, 1.0])
    before = in_memory(Client)
    with serving() as server:
        server.state.most_clients = 20
        threads = start({node(server): early})
        done = threading.Event()
        codes: list[int] = []

        def flood() -> None:
            while not done.is_set():
                codes.extend(register(server, 10, []))

        flooding = [threading.Thread(target=flood) for _ in range(2)]
        for thread in flooding:
            thread.start()
        eventually(lambda: len(codes) > 60)
        threads += start({node(server): late})
        state = rounds_of(server, 3, min_clients=2)
        done.set()
        for thread in [*threads, *flooding]:
            thread.join(20)
        assert len(server.state.clients()) == len(server.state._by_id) == 20
        # The greetings of those that are there now, at most.
        assert len(server.state._asked) <= 20
    assert [row["clients"] for row in state.history] == [["early", "late"]] * 3
    assert set(codes) == {200}
    assert in_memory(Client) - before <= 2 * 20


def greeted(server: Any, source: str = "127.0.0.1") -> Raw:
    """Return a stranger that has introduced itself and shaken hands, whatever it was asked."""
    raw = Raw(Signer(new_key()), source)
    raw.connect(server)
    assert server.grid.push_messages([Message(RecordDict(), raw.node_id, "query")]) != [""]
    (head,), _ = raw.pull()
    raw.announce(Packer().pack(Message(RecordDict(), reply_to=message_from_proto(head)), uuid.uuid4().hex))
    return raw


def test_strangers_that_shake_hands_and_stay_leave_places_for_others() -> None:
    with serving() as server:
        server.state.most_clients = 10
        worker = Raw(Signer(new_key()))
        worker.connect(server)
        (asked,) = server.grid.push_messages([Message(RecordDict(), worker.node_id, "train")])
        (head,), _ = worker.pull()
        worker.announce(Packer().pack(Message(RecordDict(), reply_to=message_from_proto(head)), "reply"))
        assert len(server.grid.pull_messages([asked])) == 1
        elsewhere = greeted(server, "127.0.0.2")
        crowd = [greeted(server) for _ in range(8)]
        # The address that has most places without work gives one, and its most silent one goes.
        for raw in [worker, elsewhere, *crowd[1:]]:
            raw.post(HEARTBEAT)
        newcomer = greeted(server, "127.0.0.3")
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            crowd[0].post(HEARTBEAT)
        for raw in [worker, elsewhere, newcomer, *crowd[1:]]:
            raw.post(HEARTBEAT)
        # However many come, who has worked and who comes from elsewhere stays.
        for _ in range(15):
            greeted(server)
        for raw in (worker, elsewhere, newcomer):
            raw.post(HEARTBEAT)
        assert len(server.state.clients()) == 10


def test_connections_of_forgotten_clients_are_ended() -> None:
    with serving() as server, socket.socket() as connection:
        server.state.most_clients = 1
        raw = Raw(Signer(new_key()))
        raw.connect(server)
        connection.settimeout(20.0)
        connection.connect(("127.0.0.1", server.address[1]))
        connection.sendall(request_bytes(raw.signer, HEARTBEAT, b""))
        assert answered(connection)
        Raw(Signer(new_key())).connect(server)
        # Within 20 s, long before it would be for its silence.
        assert ended(connection)


def test_few_open_files_leave_room_for_few_clients_without_keys() -> None:
    code = (
        "import resource\n"
        "from toy_federation import serving\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))\n"
        "with serving() as server: print(server.state.most_clients)\n"
        "with serving(allowed={str(n): bytes([n]) for n in range(100)}) as server: print(server.state.most_clients)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    # Each may have 8 connections, and half of the files are for these.
    assert found.stdout.split() == ["64", "100"]


def test_a_flood_of_unknown_keys_is_refused_and_disturbs_no_known_client(keys: Path) -> None:
    notes = Notes()
    clients = [ToyClient(name, [1.0, 2.0, 3.0]) for name in ("north", "south")]
    strangers = [new_key() for _ in range(30)]
    with serving(allowed=load_allowed_keys(keys), reporter=notes) as server:
        done, codes = threading.Event(), []

        def flood() -> None:
            while not done.is_set():
                codes.extend(register(server, 30, strangers))

        flooding = threading.Thread(target=flood)
        flooding.start()
        eventually(lambda: len(codes) >= 30)
        ends = {node(server, load_private_key(keys / f"{client.name}.key")): client for client in clients}
        threads = start(ends)
        state = rounds_of(server, 3, min_clients=2)
        done.set()
        for thread in [flooding, *threads]:
            thread.join(20)
        assert len(server.state.clients()) == 2
    assert state.weights["w"].tolist() == [3.0, 6.0, 9.0]
    assert set(codes) == {401}
    assert len(notes.lines) == Refusals.MOST_LINES + 1


def comings_and_goings(server: Any, roster: Roster, count: int) -> None:
    """Have new clients come, shake hands and leave."""
    for number in range(count):
        stranger = Raw(Signer(new_key()))
        stranger.connect(server)
        roster.refresh()
        (head,), _ = stranger.pull()
        stranger.announce(Packer().pack(Message(RecordDict(), reply_to=message_from_proto(head)), f"{number}"))
        roster.refresh()
        stranger.post(DEACTIVATE)
        roster.refresh()


def test_strangers_do_not_fill_the_record_and_who_works_is_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedrag_cli.federated.participants.MOST_TOLD", 5)
    told = Recorder()
    with serving() as server:
        roster = Roster(server.grid, common(), told)
        client = ToyClient("worker", [1.0, 0.0, 0.0])
        (thread,) = start({node(server): client})

        def is_there() -> bool:
            roster.refresh()
            return bool(roster.ready())

        eventually(is_there)
        (worker,) = roster.ready()
        worker.has_worked = True
        comings_and_goings(server, roster, 12)
        client.ended = True
        server.grid.push_messages(
            [Message(RecordDict({"config": ConfigRecord({ACTION: STOP})}), worker.node_id, "query")]
        )
        thread.join(20)
        roster.refresh()
    events = [(event["client"].split("-")[0], event["status"]) for event in told.events]
    assert events[0] == ("worker", "ready")
    # Its own, 4 of 24 of the strangers, and its own again.
    assert len(events) == 6
    assert events[-1] == ("worker", "offline")
    assert told.notes == ["5 comings and goings of clients that have not worked yet are recorded; further ones are not"]


class Leaver(Raw):
    """A member that takes each round's message, leaves, and comes back once nobody waits for it any more."""

    def __init__(self, server: Any) -> None:
        super().__init__(Signer(new_key()))
        self.server, self.back = server, threading.Event()

    def run(self, rounds: int) -> None:
        """Take part."""
        for _ in range(rounds):
            self.shake_hands()
            self.back.set()
            asked = self.await_message("train")
            self.post(DEACTIVATE)
            eventually(lambda asked=asked: asked not in self.server.state._asked)
        self.shake_hands()
        self.back.set()

    def shake_hands(self) -> None:
        """Come back."""
        self.connect(self.server)
        self.await_message("query")
        agreement = ConfigRecord({AGREEMENT: common().to_json(), NAME: "leaver"})
        self.announce(Packer().pack(Message(RecordDict({"c": agreement}), reply_to=self.asked), uuid.uuid4().hex))

    def await_message(self, kind: str) -> str:
        """Return the id of the next message of a kind."""
        while True:
            for head in self.pull()[0]:
                if head.metadata.message_type == kind:
                    self.asked = message_from_proto(head)
                    return str(head.metadata.message_id)


def test_a_member_that_leaves_in_every_round_is_waited_for_half_as_long_each_time() -> None:
    rounds = 4
    with serving() as server:
        leaver = Leaver(server)

        class Patient(ToyClient):
            def __call__(self, message: Message) -> Message:
                if message.metadata.message_type == "train":
                    # The round goes on until the other one is back, so that the next one has it again.
                    leaver.back.clear()
                    assert leaver.back.wait(60)
                return super().__call__(message)

        honest = Patient("honest", [1.0, 2.0, 3.0])
        threads = [threading.Thread(target=leaver.run, args=(rounds,), daemon=True), *start({node(server): honest})]
        threads[0].start()
        state = rounds_of(server, rounds, min_clients=1, wait_for_clients=2, rejoin_timeout=2.0, round_timeout=60.0)
        for thread in threads:
            thread.join(20)
    assert [row["refused"] for row in state.history] == [
        {"leaver": f"it went away and did not come back within {seconds} s"} for seconds in ("2", "1", "0.5", "0.25")
    ]
    assert state.weights["w"].tolist() == [4.0, 8.0, 12.0]
