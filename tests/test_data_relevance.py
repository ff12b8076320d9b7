import pytest

from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.relevance import resolve_relevant_ids
from fedrag_cli.errors import DataError

NODES = [
    KnowledgeNode("plain", "Some text."),
    KnowledgeNode("long#0", "It lies in New\nYork.", {"document_id": "long"}),
    KnowledgeNode("long#1", "And elsewhere.", {"document_id": "long"}),
    KnowledgeNode("long#2", "NEW YORK again.", {"document_id": "long"}),
]


def example(*relevant_ids, responses=("new york",)):
    return Example("q", "Where?", responses, relevant_ids)


def resolved(*examples):
    return [item.relevant_ids for item in resolve_relevant_ids(examples, NODES)]


def test_documents_become_their_passages_with_an_answer():
    assert resolved(example("plain", "long"), example()) == [("plain", "long#0", "long#2"), ()]


def test_documents_become_all_their_passages_where_none_has_an_answer():
    every = ("long#0", "long#1", "long#2")
    assert resolved(example("long", responses=("Paris",)), example("long", responses=())) == [every, every]


def test_ids_are_not_repeated():
    assert resolved(example("long#2", "long")) == [("long#2", "long#0")]


def test_unknown_ids_are_listed():
    examples = [Example(f"q{number}", "Where?", ("x",), ("plain", f"gone{number}")) for number in range(23)]
    with pytest.raises(DataError) as caught:
        resolve_relevant_ids(examples, NODES)
    lines = caught.value.message.splitlines()
    assert lines[:2] == [
        "23 problems in the relevant ids:",
        "example 'q0': the relevant id 'gone0' is no passage and no document of the corpus",
    ]
    assert len(lines) == 22
    assert lines[-1] == "... and 3 more"
