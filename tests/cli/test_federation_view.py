"""The live table of a federation, as people see it on a terminal."""

from __future__ import annotations

import io
from typing import Any

import torch
from rich.console import Console
from toy_federation import ToyClient, common
from toy_strategies import MeasuringClient, federate, measuring, strategy

from fedrag_cli.cli.federation_view import LiveFederationReporter
from fedrag_cli.federated.checkpoint import RoundState
from fedrag_cli.runs.reporter import SilentReporter

SIZE = 1000
# 1000 numbers of 4 bytes and a head of 128, sent and received in two rounds.
TWICE = "8.3 kB"


def shown(told: list[tuple[str, dict[str, Any]]]) -> str:
    """Return what a terminal shows at the end of some events."""
    console = Console(record=True, width=200, file=io.StringIO())
    with LiveFederationReporter(console) as reporter:
        for name, fields in told:
            reporter.event(name, **fields)
    return console.export_text()


def rows(text: str) -> list[list[str]]:
    """Return the cells of the tables."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.replace("┃", "│").split("│")]
        if len(cells) > 2:
            found.append(cells[1:-1])
    return found


def toy(name: str, step: float, examples: int, loss: float, checked: int, offset: float) -> MeasuringClient:
    client = measuring(name, [step] * SIZE, examples, loss, checked, offset)
    client.agreement = common(SIZE)
    return client


def test_two_rounds_are_shown_with_clients_states_reasons_and_bytes() -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    reporter = SilentReporter()
    reporter.event = lambda name, **fields: told.append((name, fields))  # type: ignore[method-assign]
    liar = ToyClient(
        "liar", [0.0] * SIZE, 7, change=lambda weights: {"w": weights["w"] * float("nan")}, agreement=common(SIZE)
    )
    clients = [toy("north", 1.0, 1, 0.25, 9, 0.125), toy("south", 3.0, 3, 2.25, 1, 4.0), liar]
    state = RoundState(0, {"w": torch.full((SIZE,), 2.0)})
    federate(strategy("FedAvg"), clients, rounds=2, min_clients=2, state=state, reporter=reporter)  # type: ignore[arg-type]
    last = max(place for place, (name, _) in enumerate(told) if name == "round")
    text = shown(told[: last + 1])
    assert "Round 2 of 2 done" in text
    table = rows(text)
    heads = [row for row in table if row[0] in ("after round", "client")]
    assert heads == [
        ["after round", "clients", "refused", "examples", "loss", "seconds", "clients: validation_loss"],
        ["client", "state", "round", "examples", "loss", "seconds", "sent", "received", "refused", "why"],
    ]
    # Clients have measured what they received, which is the outcome of the round before.
    assert [[*row[:5], *row[6:]] for row in table if "/" in row[0]] == [
        ["0/2", "", "", "", "", "2.5125"],
        ["1/2", "2", "1", "4", "1.7500", "5.0125"],
        ["2/2", "2", "1", "4", "1.7500", ""],
    ]
    assert [[*row[:5], *row[6:]] for row in table if row[0] in ("liar", "north", "south")] == [
        ["liar", "refused", "2", "", "", TWICE, "", "2", "w holds values that are not finite"],
        ["north", "done", "2", "1", "0.2500", TWICE, TWICE, "", ""],
        ["south", "done", "2", "3", "2.2500", TWICE, TWICE, "", ""],
    ]
    final = rows(shown(told))
    assert [row[-2:] for row in final if row[0] == "2/2"] == [[final[3][-2], "7.5125"]]
    assert {row[0]: row[1] for row in final if row[0] in ("north", "south")} == dict.fromkeys(
        ("north", "south"), "final model"
    )


def test_a_client_that_left_and_one_that_does_not_fit_are_shown_with_the_reason() -> None:
    listening = {"address": "127.0.0.1:8080", "tls": True, "keys": True, "rounds": 3, "done": 1, "min_clients": 2}
    told = [
        ("listening", listening),
        ("client", {"client": "north", "status": "ready", "reason": ""}),
        ("client", {"client": "south", "status": "refused", "reason": "another generator model"}),
        ("client", {"client": "east", "status": "ready", "reason": ""}),
        ("round_started", {"round": 2, "rounds": 3, "clients": ["east", "north"], "bytes": 1_234_567}),
        ("client", {"client": "east", "status": "offline", "reason": ""}),
    ]
    text = shown(told)
    line = "Listening on 127.0.0.1:8080 (TLS, allowed keys); 3 rounds, 1 done, at least 2 clients"
    assert line in text.splitlines()
    assert "Round 2 of 3" in text.splitlines()
    assert [row for row in rows(text) if row[0] != "client"] == [
        ["east", "offline", "2", "", "", "", "1.2 MB", "", "", ""],
        ["north", "training", "2", "", "", "", "1.2 MB", "", "", ""],
        ["south", "refused", "", "", "", "", "", "", "", "another generator model"],
    ]
