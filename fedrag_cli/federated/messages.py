"""What messages between server and clients hold: the keys of their records, and reading them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message

from fedrag_cli.errors import ServerRefusedError
from fedrag_cli.text import printable

# In the config: what is asked, what both sides compare, and about the round.
ACTION, HANDSHAKE, STOP = "action", "handshake", "stop"
AGREEMENT, NAME = "agreement", "name"
ROUNDS, FINAL, EVALUATE_FIRST = "rounds", "final", "evaluate-first"
# As Flower's strategies name them.
SERVER_ROUND, PROXIMAL_MU = "server-round", "proximal-mu"
EXAMPLES = "num-examples"
STRATEGY_LOSS = "train_loss"
# In the metrics, beside those that the config lists.
VALIDATION_EXAMPLES = "validation-examples"
MOST_ROUNDS = 10**6
NO_SERVER = "It is another program, or not to be trusted: ask its owner."


def config_of(message: Message) -> ConfigRecord:
    """Return the config of a message; an empty one where it has none."""
    return next(iter(message.content.config_records.values()), ConfigRecord())


def arrays_of(message: Message) -> ArrayRecord:
    """Return the tensors of a message; an empty record where it has none."""
    return next(iter(message.content.array_records.values()), ArrayRecord())


def with_arrays(messages: Iterable[Message], record: ArrayRecord) -> list[Message]:
    """Return messages with this record in place of the arrays that a strategy has put into them."""
    replaced = list(messages)
    for message in replaced:
        for key in list(message.content.array_records):
            message.content[key] = record
    return replaced


def round_number(config: Mapping[str, Any], default: int) -> int:
    """Return which round a server's message is about; raises ServerRefusedError where it is none, from 0 on."""
    number = config.get(SERVER_ROUND, default)
    if type(number) is not int or not 0 <= number <= MOST_ROUNDS:
        raise ServerRefusedError(f"The server speaks of a round {printable(number, 40)}.", NO_SERVER)
    return number
