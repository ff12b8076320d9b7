import pytest

from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.relevance import find_overlaps, normalized_question, resolve_relevant_ids
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


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What  is the colour,\nof the CAT ?", "what is the colour of the cat", True),
        ("caf\u00e9?", "CAFE\u0301", True),
        ("\uff37\uff48\uff4f\uff1f", "who", True),
        ("\u00bfD\u00f3nde est\u00e1?", "d\u00f3nde est\u00e1", True),
        ("Stra\u00dfe", "STRASSE", True),
        ("don\u2019t\u200b", "Don't", True),
        ("a state-of-the-art U.S. law", "a state of the art US law", True),
        ("don\u00b4t", "don't", True),
        ("don`t \u00abgo\u00bb", "don\u02bct go", True),
        ("from 1990\u20131995", "from 1990-1995", True),
        ("\u2212 5 or \u22125 or (-5)", "- 5 or -5 or \u22125", True),
        ("\u2764\ufe0f or \u2600", "\u2764 or \u2600\ufe0e", True),
        ("is -5 cold", "is 5 cold", False),
        ("who is it", "who is he", False),
        ("what is 1.5 ?", "what is 15 ?", False),
        ("what is 3 * 4 ?", "what is 3 / 4 ?", False),
        ("what is C# ?", "what is C ?", False),
        ("???", "!", False),
    ],
)
def test_questions_are_the_same_apart_from_how_they_are_written(one: str, other: str, same: bool) -> None:
    assert (normalized_question(one) == normalized_question(other)) is same


def _asked(*queries: str, choices: tuple[str, ...] = ()) -> list[Example]:
    return [Example(str(number), query, ("a",), choices=choices) for number, query in enumerate(queries)]


def test_splits_that_share_questions_are_found_and_what_follows_is_said() -> None:
    train, validation = _asked("one ?", "two ?", "three ?"), _asked("Three", "four")
    test = _asked("ONE", "Four?", "five")
    splits = {"train": train, "validation": validation, "test": test}
    assert [overlap.message for overlap in find_overlaps(splits, "test")] == [
        "1 of 3 test questions is also in train: part of the difference may be what was learnt by heart",
        "1 of 3 test questions is also in validation: they chose the best checkpoint, so the difference flatters",
        "1 of 2 validation questions is also in train: what validates best may be what was learnt by heart",
    ]
    [whole] = find_overlaps({"train": train, "validation": [], "test": _asked("two", "TWO", "one")}, "test")
    assert whole.message == "3 of 3 test questions are also in train: the difference says nothing"
    assert [overlap.split for overlap in find_overlaps(splits, "validation")] == ["validation"]
    assert find_overlaps({"train": train, "validation": [], "test": _asked("six")}, "test") == []
    # With other choices it is another question.
    chosen = _asked("which ?", choices=("a", "b"))
    assert not find_overlaps({"train": chosen, "test": _asked("which ?", choices=("a", "c"))}, "test")
    assert find_overlaps({"train": chosen, "test": _asked("Which?", choices=("B", "a"))}, "test")
