"""One admitted client that is hostile, written by hand: what it may move, and what people see of it."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from toy_federation import Recorder, ToyClient, asking, serving
from toy_federation import federate as federate_over_the_wire
from toy_strategies import federate, moved, strategy

from fedrag_cli import federated
from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.errors import FederationError
from fedrag_cli.federated.checkpoint import RoundState
from fedrag_cli.federated.handshake import Agreement, differences
from fedrag_cli.federated.task import round_number
from fedrag_cli.federated.weights import to_wire
from fedrag_cli.reports.model_card import model_card
from fedrag_cli.runs.reporter import SilentReporter

WEIGHING = ["FedAvg", "FedProx", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "MultiKrum"]
HOSTILE = "\x1b[2J\x1b]0;x\x07\n| \x9b31m\u202e\u200b\ud800`<b>[red]"
Change = Callable[[RecordDict], None]


class HostileClient(ToyClient):
    """Takes part like others, and then spoils what it sends."""

    spoil: Change = staticmethod(lambda content: None)

    def __call__(self, message: Message) -> Message:
        reply = super().__call__(message)
        if message.metadata.message_type != "query":
            self.spoil(reply.content)
        return reply


def honest(count: int = 4) -> list[ToyClient]:
    return [ToyClient(f"c{n}", [1.0, 0.1 * n, 0.0], 10 + n, loss=1.0 + n / 10) for n in range(count)]


def hostile(step: list[float], examples: int, loss: float = 1.0, spoil: Change = lambda content: None) -> HostileClient:
    client = HostileClient("liar", step, examples, loss)
    client.spoil = spoil
    return client


@pytest.mark.parametrize("name", WEIGHING)
def test_no_number_of_examples_counts_for_more_than_ten_medians(name: str) -> None:
    options = {"num_malicious_nodes": 1, "num_nodes_to_select": 5} if name == "MultiKrum" else {}
    outcomes = [
        federate(strategy(name, **options), [*honest(), hostile([0.0, 1.0, 0.0], examples)])
        for examples in (2**40, 120, 10)
    ]
    forged, capped, plain = map(moved, outcomes)
    # The lower median of 10, 11, 12, 13 and the forged one is 12.
    assert forged == capped
    # Adagrad's first step is as long whatever the mean is.
    assert name == "FedAdagrad" or forged != pytest.approx(plain, abs=1e-4)
    (row,) = outcomes[0].history
    assert row["outliers"] == {"liar": f"its {2**40} examples count as 120"}
    assert row["examples"] == 10 + 11 + 12 + 13 + 120
    assert outcomes[1].history[0]["outliers"] == {}


@pytest.mark.parametrize("name", ["FedAvg", "FedProx", "FedAvgM", "FedAdam", "QFedAvg"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_no_update_is_longer_than_five_medians(name: str, dtype: Any) -> None:
    def outcome(step: list[float]) -> RoundState:
        clients = [*(ToyClient(f"c{n}", [3.0, 4.0, 0.0]) for n in range(3)), hostile(step, 1)]
        for client in clients:
            client.dtype = dtype
        return federate(strategy(name), clients, transport_dtype=dtype)

    forged, held = outcome([0.0, 0.0, -6e4]), outcome([0.0, 0.0, -25.0])
    assert moved(forged) == pytest.approx(moved(held), abs=2e-3 if dtype == "float16" else 1e-5)
    assert forged.history[0]["outliers"] == {"liar": "its norm 6e+04 is scaled down to 25"}
    assert held.history[0]["outliers"] == {}


def test_two_clients_are_weighed_up_to_ten_to_one_and_norms_of_two_are_not_compared() -> None:
    state = federate(strategy("FedAvg"), [ToyClient("a", [1, 0, 0], 10), ToyClient("b", [0, 1, 0], 1000)])
    assert moved(state) == pytest.approx([10 / 110, 100 / 110, 0], abs=1e-6)
    assert state.history[0]["outliers"] == {"b": "its 1000 examples count as 100"}
    # One that sends nothing does not silence the other.
    state = federate(strategy("FedAvg"), [ToyClient("a", [0, 0, 0], 1), ToyClient("b", [0, 1, 0], 9)])
    assert moved(state) == pytest.approx([0, 0.9, 0], abs=1e-6)
    one = federate(strategy("FedAvg"), [ToyClient("a", [1e3, 0, 0], 2**40)])
    assert (moved(one)[0], one.history[0]["outliers"]) == (1e3, {})


def test_bounds_can_be_turned_off_and_set() -> None:
    clients = [*honest(), hostile([0.0, 1e3, 0.0], 2**40)]
    off = federate(strategy("FedAvg"), clients, settings={"max_weight_ratio": None, "max_norm_ratio": None})
    assert moved(off)[1] == pytest.approx(1e3, rel=1e-4)
    assert off.history[0]["outliers"] == {}
    tight = federate(strategy("FedAvg"), clients, settings={"max_weight_ratio": 1.0, "max_norm_ratio": 1.0})
    assert abs(moved(tight)[1]) < 0.5
    assert set(tight.history[0]["outliers"]) == {"c0", "c1", "c2", "c3", "liar"} - {"c0", "c1", "c2"} | {"c3"}


@pytest.mark.parametrize(("loss", "counted"), [(1e6, 12.0), (0.0, 0.12), (None, 0.12)])
def test_losses_weigh_within_ten_medians_under_qfedavg(loss: float | None, counted: float) -> None:
    def outcome(reported: float | None) -> RoundState:
        clients = [ToyClient(f"c{n}", [1.0, 0.0, 0.0], 1, loss=1.2) for n in range(4)]
        liar = hostile([0.0, 1.0, 0.0], 1, reported or 0.0)
        if reported is None:
            liar.spoil = lambda content: content.metric_records["metrics"].pop("loss")
        return federate(strategy("QFedAvg", q=1.0), [*clients, liar])

    assert moved(outcome(loss)) == moved(outcome(counted))
    assert outcome(loss).history[0]["outliers"] == {"liar": f"its loss {loss or 0:.4g} counts as {counted:g}"}


def metrics(**values: Any) -> Change:
    def spoil(content: RecordDict) -> None:
        record = content.metric_records["metrics"]
        # As hand-written bytes may hold them, past Flower's own checks.
        record.__dict__["_data"] = {**record.__dict__["_data"], **values}

    return spoil


def array(**fields: Any) -> Change:
    def spoil(content: RecordDict) -> None:
        for record in content.array_records.values():
            for name, value in fields.items():
                setattr(record["w"], name, value)

    return spoil


def renamed(name: str) -> Change:
    def spoil(content: RecordDict) -> None:
        for record in content.array_records.values():
            record[name] = record.pop("w")

    return spoil


def doubled(content: RecordDict) -> None:
    content["more"] = MetricRecord({"num-examples": 1})


REFUSALS: list[tuple[Change, str]] = [
    (metrics(**{"num-examples": value}), "its number of examples is no whole number, or too large")
    for value in (-1, float("nan"), 3.0, True, 2**40 + 1, 10**400, [1], "3", b"3")
]
REFUSALS += [
    (metrics(**{"num-examples": 0}), "it reports no training example"),
    (metrics(loss=-1.0), "its loss -1.0 is not between 0 and 1e+06"),
    (metrics(loss=1e7), "its loss 10000000.0 is not between 0 and 1e+06"),
    (metrics(loss=10**400), "its loss is not finite"),
    (metrics(loss=True), "its loss is not finite"),
    (metrics(loss="1"), "its loss is not finite"),
    (metrics(mrr=123456.0), "its mrr 123456.0 is not between 0 and 1"),
    (metrics(mrr=-0.1), "its mrr -0.1 is not between 0 and 1"),
    (metrics(mrr=[0.5]), "its mrr is not finite"),
    (metrics(**{"validation-examples": True}), "its number of validation examples is no whole number, or too large"),
    (metrics(**{"validation-examples": 0}), "its number of validation examples is no whole number, or too large"),
    (doubled, "it has no metrics"),
    (array(dtype=HOSTILE), r"w is \x1b[2J\x1b]0;x..., not float32"),
    (array(dtype="object"), "w is object, not float32"),
    (array(dtype=">f4"), "w is >f4, not float32"),
    (array(shape=tuple([3] * 10**6)), "w has the shape (3, 3, 3, 3, 3, 3, 3, 3, ... 1000000 dimensions), not (3,)"),
    (array(shape=(3.0,)), "w has the shape (3.0,), not (3,)"),
    (array(shape=(2**63, 2**63)), "w has the shape (9223372036854775808, 9223372036854775808), not (3,)"),
    (array(shape=(0,)), "w has the shape (0,), not (3,)"),
    (array(shape=("\x1b[2J",)), r"w has the shape (\x1b[2J,), not (3,)"),
    (array(stype=HOSTILE), "w cannot be read"),
    (renamed(HOSTILE), "the tensor w is missing"),
]


@pytest.mark.parametrize(("spoil", "reason"), REFUSALS)
def test_what_is_refused_is_named_and_the_round_goes_on(spoil: Change, reason: str) -> None:
    told = Recorder()
    settings = {"metrics": ("loss", "mrr")}
    clients = [*honest(3), hostile([0.0, 1.0, 0.0], 1, spoil=spoil)]
    state = federate(strategy("FedAvg"), clients, min_clients=3, reporter=told, settings=settings)
    assert state.history[0]["refused"] == {"liar": reason}
    assert moved(state) == moved(federate(strategy("FedAvg"), honest(3)))
    assert all(text.isprintable() and len(text) <= 300 for text in state.history[0]["refused"].values())


def test_what_nobody_agreed_on_is_left_out() -> None:
    many = metrics(**{f"m{n}": 1.0 for n in range(5000)}, **{HOSTILE: 7.0})
    told = Recorder()
    state = federate(strategy("FedAvg"), [*honest(3), hostile([0.0, 0.0, 0.0], 1, spoil=many)], reporter=told)
    assert state.history[0]["refused"] == {}
    assert "m1" not in json.dumps(told.events)


def test_forged_measurements_are_bounded_in_number_and_range() -> None:
    def measured(count: int, value: float) -> Change:
        return metrics(**{"validation-examples": count, "mrr": value})

    def client(name: str, count: int, value: float) -> HostileClient:
        toy = hostile([0.0, 0.0, 0.0], 1, spoil=measured(count, value))
        toy.name = name
        return toy

    told = Recorder()
    clients = [client("a", 4, 0.25), client("b", 6, 0.5), client("liar", 2**40, 1.0)]
    settings = {"metrics": ("loss", "mrr")}
    state = federate(strategy("FedAvg"), clients, rounds=2, reporter=told, settings=settings)
    mean = (4 * 0.25 + 6 * 0.5 + 60 * 1.0) / 70
    for number in range(3):
        assert state.evaluations[str(number)]["clients"] == {"examples": 70, "metrics": {"mrr": pytest.approx(mean)}}
    reason = f"its {2**40} validation examples count as 60"
    assert [row["outliers"] for row in state.history] == [{"liar": reason}] * 2
    # The last is that of the final model.
    assert [event["reason"] for event in told.events if event["event"] == "client_outlier"] == [reason] * 3


def test_a_hostile_client_over_the_transport() -> None:
    clients = [ToyClient(f"c{n}", [1.0, 0.0, 0.0], 10) for n in range(3)]
    with serving() as server:
        state = federate_over_the_wire(server, [*clients, hostile([0.0, 1e6, 0.0], 2**40)], 1)
    # It counts 100 beside three of 10, with a norm of 5.
    assert state.weights["w"].tolist() == pytest.approx([30 / 130, 500 / 130, 0.0], rel=1e-5)
    reason = f"its {2**40} examples count as 100; its norm 1e+06 is scaled down to 5"
    assert state.history[0]["outliers"] == {"liar": reason}


def test_a_strategy_whose_state_is_not_finite_fails_the_round_though_its_weights_are() -> None:
    # Adagrad divides by the root of what it adds up, so that weights with such a state stand still for good.
    state = RoundState(0, {"w": torch.zeros(3)}, {"v_t/dict/w": np.full(3, np.inf, np.float32)})
    saved: list[int] = []
    with pytest.raises(FederationError, match="The strategy's state after round 1 is not finite: v_t/dict/w"):
        federate(strategy("FedAdagrad"), honest(2), state=state, save_round=lambda state: saved.append(state.number))
    assert saved == [0]


def test_a_round_whose_outcome_float16_cannot_carry_fails_and_is_not_saved() -> None:
    saved: list[int] = []
    clients = [ToyClient(f"c{n}", [6e4, 0.0, 0.0], dtype="float16") for n in range(2)]
    state = RoundState(0, {"w": torch.tensor([6e4, 0.0, 0.0])})
    with pytest.raises(FederationError, match="Round 1 would leave values above 65504 in w, too large for float16"):
        federate(
            strategy("FedAvg"),
            clients,
            state=state,
            transport_dtype="float16",
            save_round=lambda state: saved.append(state.number),
        )
    assert saved == [0]


def test_factors_that_no_training_reaches_are_refused_before_svd() -> None:
    manifest = {"x.lora_A.default.weight": [2, 3], "x.lora_B.default.weight": [4, 2]}
    agreement = Agreement(1, "generator", manifest, {}, {})

    class Adapters(ToyClient):
        def __call__(self, message: Message) -> Message:
            if message.metadata.message_type == "query":
                return super().__call__(message)
            record = message.content.array_records["arrays"]
            changed = {name: torch.from_numpy(array.numpy().copy()) + self.step for name, array in record.items()}
            content = {"arrays": to_wire(changed), "metrics": MetricRecord({"num-examples": 1, "loss": 1.0})}
            return Message(RecordDict(content), reply_to=message)

    from fedrag_cli.federated.grid import InProcessGrid
    from fedrag_cli.federated.rounds_loop import Federation
    from fedrag_cli.registry import build

    settings = FederatedConfig(min_clients=2, rounds=1, lora_aggregation="svd", rejoin_timeout=0.01)
    clients = {f"c{n}": Adapters(f"c{n}", [0.1 * n], agreement=agreement) for n in range(2)}
    clients["liar"] = Adapters("liar", [3e38], agreement=agreement)
    built = build("strategy", settings.strategy, min_clients=2, learning_rate=1.0)
    state = Federation(
        InProcessGrid(clients),  # type: ignore[arg-type]
        agreement,
        settings,
        built,
        seed=0,
        reporter=SilentReporter(),
    ).run(RoundState(0, {name: torch.ones(shape) for name, shape in manifest.items()}))
    assert state.history[0]["refused"] == {"liar": "its norm 1.122e+39 is beyond any training"}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.weights.values())


def test_handshakes_of_either_side_are_shown_printable_and_short() -> None:
    mine = Agreement(1, "retriever", {"w": [3]}, {"query encoder": "00"}, {"a": 1})
    values = {
        "protocol": 1,
        "side": "retriever",
        "manifest": {HOSTILE: [1] * 10**5},
        "models": {HOSTILE: HOSTILE},
        "settings": {HOSTILE: HOSTILE * 100, "a": [HOSTILE] * 10**4},
    }
    sides = [values, {**values, "side": HOSTILE}, {**values, "protocol": 10**300}]
    for theirs in map(Agreement.from_json, map(json.dumps, sides)):
        for pair in ((mine, theirs), (theirs, mine)):
            text = "; ".join(differences(*pair))
            assert text.isprintable()
            assert 0 < len(text) < 1500


@pytest.mark.parametrize("number", [HOSTILE, -1, True, 1.5, 10**9, [1], None])
def test_a_server_that_names_no_round_is_refused(number: object) -> None:
    with pytest.raises(FederationError, match="The server speaks of a round ") as error:
        round_number({"server-round": number}, 1)
    assert str(error.value).replace("\n", "").isprintable()


def test_a_client_prints_no_number_of_rounds_that_is_none() -> None:
    from fedrag_cli.federated.client import ClientHandler

    told = Recorder()
    settings, agreement = FederatedConfig(), Agreement(1, "retriever", {}, {}, {})

    def fit(*_: Any) -> None:
        raise FederationError("stop")

    task: Any = SimpleNamespace(fit=fit, settings=settings, agreement=agreement)
    content = RecordDict(
        {"arrays": ArrayRecord(), "config": ConfigRecord({"server-round": 1, "rounds": HOSTILE.replace("\ud800", "")})}
    )
    with pytest.raises(FederationError, match="stop"):
        ClientHandler(task, reporter=told)(asking(content))
    assert len(told.notes) == 1
    assert told.notes[0].isprintable()


def test_the_model_card_shows_names_and_reasons_as_they_are() -> None:
    row = {
        "round": 1,
        "clients": ["a"],
        "refused": {HOSTILE: HOSTILE},
        "outliers": {"c|d": "its norm\n# 9"},
        "examples": 3,
        "loss": 0.5,
    }
    card = model_card(
        {
            "run_name": HOSTILE,
            "status": HOSTILE,
            "mode": "retriever",
            "seed": 1,
            "command": ["fedrag", HOSTILE],
            "tuned": {"retriever": {"model": HOSTILE, "trainer": "lsr"}, "generator": None},
            "data": {HOSTILE: 1},
            "fingerprints": {HOSTILE: HOSTILE},
            "role": "server",
            "rounds": [row],
            "settings": {HOSTILE: "```\n# not a heading\n" + HOSTILE},
        }
    )
    assert all(character.isprintable() or character == "\n" for character in card)
    assert r"c\|d: its norm\\n\# 9" in card
    # Without what is code, no HTML and no link is left.
    unescaped = re.sub(r"\\[\W_]", "", card)
    prose = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", unescaped, flags=re.DOTALL)
    assert re.findall(r"[<\[`]", prose) == []
    rows = [line for line in card.splitlines() if line.startswith("| 1 |")]
    assert len(rows) == 1


# What the other side sends, by the names that it has in our code.
WIRE = {"dtype", "shape", "stype", "cid", "claimed", "protocol", "side", "rounds"}
SHOWN = {"printable", "readable", "shape_text", "markdown_text", "markdown_code"}


def test_no_message_quotes_the_other_side_in_another_way() -> None:
    """Every f-string passes what the other side sends through one function."""
    folder = Path(federated.__file__).parent
    found = []
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FormattedValue):
                found += [f"{path.name}:{node.lineno}: {name}" for name in sorted(_names(node.value) & WIRE)]
    assert found == []


def _names(node: ast.AST) -> set[str]:
    """Return names and attributes in an expression, but for what is handed to a function that makes it printable."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SHOWN:
        return set()
    if isinstance(node, ast.Subscript):
        return _names(node.value)
    if ast.unparse(node).startswith(("self.task.", "trainer.", "tensor.")):
        # Of our own model.
        return set()
    own = {node.attr} if isinstance(node, ast.Attribute) else {node.id} if isinstance(node, ast.Name) else set()
    return own.union(*map(_names, ast.iter_child_nodes(node)))
