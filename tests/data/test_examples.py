import csv
import datetime
import json
import math
from decimal import Decimal

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from fedrag_cli.data.config import BeirExamplesConfig, ExampleColumns, FileExamplesConfig, SquadExamplesConfig
from fedrag_cli.data.examples import Example, examples_from_dataset, load_examples
from fedrag_cli.errors import ConfigError, DataError


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(path, **settings):
    return load_examples(FileExamplesConfig(path=str(path), **settings))


def test_file_examples(tmp_path):
    path = write_jsonl(
        tmp_path / "train.jsonl",
        {"query": " Who? ", "response": " Me ", "relevant_ids": "d1", "owner": "A"},
        {"query": "How many?", "response": ["four", 4, "four"], "relevant_ids": [7, "d2"]},
        {"query": "Which?", "response": {"text": ["that"], "answer_start": [0]}, "relevant_ids": None},
    )
    examples = load(path)
    assert examples == [
        Example("train-0001", "Who?", ("Me",), ("d1",), {"owner": "A"}),
        Example("train-0002", "How many?", ("four", "4"), ("7", "d2")),
        Example("train-0003", "Which?", ("that",)),
    ]
    assert examples[1].response == "four"


def test_own_ids_are_taken_where_all_rows_have_one_of_their_own(tmp_path, caplog):
    caplog.set_level("WARNING", logger="fedrag_cli")
    rows = [{"id": 5, "query": "a", "response": "b"}, {"id": "x", "query": "c", "response": "d"}]
    assert [item.id for item in load(write_jsonl(tmp_path / "t.jsonl", *rows))] == ["5", "x"]
    assert caplog.messages == []
    rows[1]["id"] = 5
    numbered = load(write_jsonl(tmp_path / "t.jsonl", *rows))
    assert [(item.id, item.metadata) for item in numbered] == [("t-0001", {"id": 5}), ("t-0002", {"id": 5})]
    assert caplog.messages == ["t.jsonl: not every row has an id of its own, so the rows are numbered instead"]


def test_every_bad_row_is_listed(tmp_path):
    good = {"query": "q", "response": "r"}
    bad = [
        {"query": "q", "response": ""},
        {"query": "q", "response": None},
        {"query": "q"},
        {"query": "q", "response": []},
        {"query": "q", "response": ["x", " "]},
        {"query": "q", "response": True},
        {"query": "q", "response": {"a": 1}},
        {"query": "q", "response": math.nan},
        {"query": " ", "response": {"text": []}},
        {"query": 3, "response": [["x"]]},
        {"query": "q", "response": "r", "relevant_ids": [1.5]},
        {"query": "q", "response": "\ud800"},
        {"query": "q", "response": math.inf},
    ]
    with pytest.raises(DataError) as caught:
        load(write_jsonl(tmp_path / "train.jsonl", good, *bad))
    assert caught.value.message.splitlines() == [
        "15 problems in train.jsonl:",
        "train.jsonl:2: response is empty",
        "train.jsonl:3: response is missing (null)",
        "train.jsonl:4: has no 'response'",
        "train.jsonl:5: response is an empty list",
        "train.jsonl:6: response 2 of 2 is blank",
        "train.jsonl:7: response is a boolean, not a text",
        "train.jsonl:8: response is an object, not a text",
        "train.jsonl:9: response is missing (null)",
        "train.jsonl:10: query is blank",
        "train.jsonl:10: response is an empty list",
        "train.jsonl:11: query is a number, not a text",
        "train.jsonl:11: response is a list, not a text",
        "train.jsonl:12: relevant_ids is a number, not a text or a whole number",
        "train.jsonl:13: response is no valid Unicode text: it has half of a surrogate pair",
        "train.jsonl:14: response is infinite",
    ]
    assert caught.value.hint == "Correct or remove what is listed; nothing is left out in silence."
    assert caught.value.exit_code == 3


def test_bad_rows_come_in_the_order_of_the_lines(tmp_path):
    path = tmp_path / "train.jsonl"
    lines = [
        '{"query": "q", "response": "r"}', '{"query": " ", "response": ""}', "no JSON", '{"query": "q"}', "[]",
        '{"query": 1, "response": "r"}',
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load(path)
    told = [line.partition(": ")[0] for line in caught.value.message.splitlines()[1:]]
    assert told == [f"train.jsonl:{number}" for number in (2, 2, 3, 4, 5, 6)]
    assert next(problem.to_dict() for problem in caught.value.problems) == {
        "file": "train.jsonl",
        "line": 2,
        "path": "",
        "message": "query is blank",
    }
    with pytest.raises(DataError) as caught:
        examples_from_dataset([{"query": "q", "response": ""}])
    (problem,) = (problem.to_dict() for problem in caught.value.problems)
    assert (problem["file"], problem["line"], problem["path"]) == ("dataset", None, "row 1")


def test_rows_may_lack_answers_where_none_is_needed(tmp_path):
    answers = [{"response": "a"}, {}, {"response": None}, {"response": " "}, {"response": []}, {"response": math.nan}]
    path = write_jsonl(tmp_path / "train.jsonl", *({"query": "q", **row} for row in answers))
    config = FileExamplesConfig(path=path)
    assert [item.responses for item in load_examples(config, needs_responses=False)] == [("a",), *[()] * 5]
    with pytest.raises(DataError, match=r"train\.jsonl:3: response is missing"):
        load_examples(config)
    bad = write_jsonl(tmp_path / "bad.jsonl", {"query": "q", "response": True})
    with pytest.raises(DataError, match=r"bad\.jsonl:1: response is a boolean"):
        load_examples(FileExamplesConfig(path=bad), needs_responses=False)
    # A column that the config names is there.
    named = FileExamplesConfig(path=path, columns=ExampleColumns(response="answer"))
    with pytest.raises(DataError, match="has no column 'answer'"):
        load_examples(named, needs_responses=False)
    squad = SquadExamplesConfig(path=str(tmp_path / "none.json"))
    with pytest.raises(DataError, match="does not exist"):
        load_examples(squad, needs_responses=False)


def test_long_lists_of_problems_are_cut(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", *({"query": "q", "response": ""} for _ in range(55)))
    with pytest.raises(DataError) as caught:
        load(path)
    lines = caught.value.message.splitlines()
    assert len(lines) == 22
    assert lines[-1] == "... and 35 more"
    assert load(write_jsonl(tmp_path / "u.jsonl", {"query": "q", "response": "r"}, {}), limit=1)


@pytest.mark.parametrize(
    ("row", "missing", "hint"),
    [
        ({"query": "q", "respones": "r"}, "response", ": did you mean 'respones'?"),
        ({"query": "q", "answer": "r"}, "response", ": did you mean 'answer'?"),
        ({"query": "q", "x": {"y": 1}}, "response", "."),
        ({"question": "q", "response": "r"}, "query", ": did you mean 'question'?"),
    ],
)
def test_missing_columns_are_one_error(tmp_path, row, missing, hint):
    path = write_jsonl(tmp_path / "train.jsonl", row, row)
    with pytest.raises(DataError, match=f"train.jsonl has no column '{missing}'; its columns are: ") as caught:
        load(path)
    assert caught.value.hint == f"Set `columns.{missing}` to the name of the column that holds it{hint}"


def test_mapped_relevant_ids_must_exist(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", {"query": "q", "response": "r", "docs": ["d"]})
    assert load(path, columns=ExampleColumns(relevant_ids="docs"))[0].relevant_ids == ("d",)
    with pytest.raises(DataError, match="has no column 'doc'") as caught:
        load(path, columns=ExampleColumns(relevant_ids="doc"))
    assert caught.value.hint.endswith("did you mean 'docs'?")
    with pytest.raises(DataError, match="has no column 'gold'"):
        load(path, columns=ExampleColumns(relevant_ids="gold"))


def test_dots_reach_into_nested_values(tmp_path):
    row = {"in": {"q": "Q", "lang": "en"}, "answers": [{"text": "A"}, {"text": "B"}]}
    path = write_jsonl(tmp_path / "t.jsonl", row)
    columns = ExampleColumns(query="in.q", response="answers.text")
    assert load(path, columns=columns) == [Example("t-0001", "Q", ("A", "B"), (), {"in": {"lang": "en"}})]
    with pytest.raises(DataError, match=r"no column 'in.query'; its columns are: in, in.q, in.lang, answers\."):
        load(path, columns=ExampleColumns(query="in.query"))


def test_csv_with_several_answers_in_a_cell(tmp_path):
    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["query", "response", "relevant_ids"], ["q", "a | b", "1|2"], ["q", "c", ""]])
    assert load(path, list_separator="|") == [
        Example("t-0002", "q", ("a", "b"), ("1", "2")),
        Example("t-0003", "q", ("c",)),
    ]
    assert load(path)[0].responses == ("a | b",)
    with pytest.raises(ConfigError, match="`list_separator` is for CSV and TSV"):
        load(write_jsonl(tmp_path / "t.jsonl", {"query": "q", "response": "a|b"}), list_separator="|")


def test_csv_with_empty_cells(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("query,response\nq,\nq,r,s\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load(path)
    assert caught.value.message.splitlines()[1:] == [
        "t.csv:2: response is empty",
        "t.csv:3: has 3 cells, but the header has 2",
    ]


def test_parquet_metadata_has_types_of_json(tmp_path):
    path = tmp_path / "t.parquet"
    columns = {"query": ["q"], "response": [2.5], "day": [datetime.date(2024, 1, 2)], "raw": [b"abc"], "n": [math.nan]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    examples = load(path)
    assert examples == [Example("t-0001", "q", ("2.5",), (), {"day": "2024-01-02", "raw": "<3 bytes>"})]
    json.dumps(examples[0].metadata, allow_nan=False)


def test_parquet_problems_count_rows(tmp_path):
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"query": ["q", "q"], "response": ["r", None]}), path)
    with pytest.raises(DataError, match=r"t.parquet row 2: response is missing \(null\)"):
        load(path)


def test_examples_from_mappings_and_examples():
    examples = examples_from_dataset([{"query": "q", "response": "r"}])
    assert examples == [Example("dataset-0001", "q", ("r",))]
    assert examples_from_dataset(examples) == examples
    assert examples_from_dataset(iter([{"a": "q", "b": "r"}]), ExampleColumns(query="a", response="b")) == examples
    with pytest.raises(DataError, match="dataset row 2: has no 'response'"):
        examples_from_dataset([{"query": "q", "response": "r"}, {"query": "q"}])
    with pytest.raises(DataError, match="dataset row 1: is no object with named fields but a text"):
        examples_from_dataset(["q"])
    with pytest.raises(DataError, match="The data set has no rows"):
        examples_from_dataset([])
    with pytest.raises(DataError, match=r"A mapping is no data set: .* \(query, response\)"):
        examples_from_dataset({"query": ["q"], "response": ["r"]})
    with pytest.raises(DataError, match="An object of type NoneType is no data set"):
        examples_from_dataset(None)
    with pytest.raises(DataError, match="id 'dataset-0001': is used by 2 examples"):
        examples_from_dataset(examples * 2)


def squad_file(tmp_path, *questions):
    content = {"data": [{"title": "New York", "paragraphs": [{"context": "One.", "qas": list(questions)}]}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def question(number, *answers):
    return {"id": f"q{number}", "question": "Q?", "answers": [{"text": text, "answer_start": 0} for text in answers]}


def test_squad_examples(tmp_path):
    path = squad_file(
        tmp_path, question(1, "One", "one", "One"), question(2, "a"), {**question(3), "is_impossible": True}
    )
    assert load_examples(SquadExamplesConfig(path=path, limit=2)) == [
        Example("q1", "Q?", ("One", "one"), ("New_York-0",), {"title": "New York"}),
        Example("q2", "Q?", ("a",), ("New_York-0",), {"title": "New York"}),
    ]


def test_bad_squad_examples(tmp_path):
    unanswerable = {**question(2), "is_impossible": True}
    path = squad_file(tmp_path, question(1, "a"), unanswerable, question(1, "b"), {"question": "", "answers": 1})
    with pytest.raises(DataError) as caught:
        load_examples(SquadExamplesConfig(path=path))
    place = "squad.json data[0].paragraphs[0]"
    assert caught.value.message.splitlines()[1:] == [
        f"{place}.qas[1]: the question has no answers",
        f"{place}.qas[2]: id 'q1' is used by a question before it",
        f"{place}.qas[3]: question is empty",
        f"{place}.qas[3]: answers is no list of objects",
    ]
    assert "unanswerable questions of SQuAD v2 (`is_impossible`) must be removed first" in caught.value.hint


def beir_folder(tmp_path, judgements):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text(judgements, encoding="utf-8")
    write_jsonl(tmp_path / "queries.jsonl", *({"_id": f"q{number}", "text": f"Q{number}?"} for number in range(4)))
    return str(tmp_path)


def test_beir_examples(tmp_path):
    path = beir_folder(tmp_path, "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq1\td3\t2\nq2\td1\t0\nq3\td1\t1\n")
    examples = load_examples(BeirExamplesConfig(path=path))
    assert examples == [Example("q1", "Q1?", (), ("d1", "d3")), Example("q3", "Q3?", (), ("d1",))]
    assert load_examples(BeirExamplesConfig(path=path, limit=1)) == examples[:1]
    with pytest.raises(DataError, match="The example 'q1' has no answer"):
        _ = examples[0].response
    with pytest.raises(DataError, match=r"dev.tsv does not exist") as caught:
        load_examples(BeirExamplesConfig(path=path, split="dev"))
    assert caught.value.hint == "Its folder has: test.tsv."


def test_bad_beir_judgements(tmp_path):
    path = beir_folder(tmp_path, "query-id\tcorpus-id\tscore\nq1\td1\tx\nq1\t\t1\nq9\td1\t1\n")
    with pytest.raises(DataError) as caught:
        load_examples(BeirExamplesConfig(path=path))
    assert caught.value.message.splitlines()[1:] == [
        "test.tsv:2: score is no number: 'x'",
        "test.tsv:3: corpus-id is empty",
    ]
    judgements = tmp_path / "qrels" / "test.tsv"
    judgements.write_text("query-id\tcorpus-id\tscore\nq9\td1\t1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"query-id 'q9': is not in queries.jsonl"):
        load_examples(BeirExamplesConfig(path=path))
    judgements.write_text("query-id\tcorpus-id\tscore\nq1\td1\t0\n", encoding="utf-8")
    with pytest.raises(DataError, match="judges no document as relevant"):
        load_examples(BeirExamplesConfig(path=path))
    judgements.write_text("q1\t0\td1\t1\n", encoding="utf-8")
    with pytest.raises(DataError, match="has no rows"):
        load_examples(BeirExamplesConfig(path=path))
    judgements.write_text("q1\td1\t1\nq2\td1\t1\n", encoding="utf-8")
    with pytest.raises(DataError, match="has no column 'query-id'; its columns are: q1, d1, 1"):
        load_examples(BeirExamplesConfig(path=path))


def answers_in_csv(tmp_path, *cells, **settings):
    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["query", "response"], *(["q", cell] for cell in cells)])
    return [example.responses for example in load(path, **settings)]


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ("['six', '6 am']", ("six", "6 am")),
        ('["six", "6 am"]', ("six", "6 am")),
        ("""[ "it's six", 'x, y', ]""", ("it's six", "x, y")),
        ("('six', '6 am')", ("six", "6 am")),
        ("{'six', '6 am'}", ("six", "6 am")),
        ("[84, 85.0, 2.5]", ("84", "85", "2.5")),
        ("{'text': ['six'], 'answer_start': [0]}", ("six",)),
        ("['six']", ("six",)),
        # Texts in brackets.
        ("[sic] six", ("[sic] six",)),
        ("[REDACTED]", ("[REDACTED]",)),
        ("[0, 1)", ("[0, 1)",)),
        ("(1, 2)", ("(1, 2)",)),
        ("(see 'six')", ("(see 'six')",)),
        ('{"name": "search", "arguments": {}}', ('{"name": "search", "arguments": {}}',)),
        ("six", ("six",)),
    ],
)
def test_lists_in_a_cell_of_csv(tmp_path, cell, answers):
    assert answers_in_csv(tmp_path, cell) == [answers]
    # With a separator, no cell is taken for a list; and JSON has lists of its own.
    assert answers_in_csv(tmp_path, cell, list_separator="|") == [(cell,)]
    assert load(write_jsonl(tmp_path / "t.jsonl", {"query": "q", "response": cell}))[0].responses == (cell,)


def test_cells_that_only_look_like_lists_are_told(tmp_path):
    # The second one is how numpy writes lists: Python would read it as one text.
    cells = ["['six', '6 am'", "['six' '6 am']", "[six, 6 am]", "['six', 6 am]", "{'text': array(['six'])}"]
    with pytest.raises(DataError) as caught:
        answers_in_csv(tmp_path, "six", *cells, "[]", "['']", "[None]")
    lines = caught.value.message.splitlines()[1:]
    for number, (line, cell) in enumerate(zip(lines, cells, strict=False), start=3):
        assert line.startswith(f"t.csv:{number}: response looks like a list, but cannot be read as one: {cell} (")
    assert lines[5:] == [
        "t.csv:8: response is an empty list",
        "t.csv:9: response is empty",
        "t.csv:10: response is missing (null)",
    ]


def test_ids_and_choices_in_cells_of_csv(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        "id,query,response,relevant_ids,choices,note\n"
        "007,q,a,\"['d1', 'd2']\",\"['a', 'b']\",\"['kept']\"\n008,q,a,None,nan,None\n",
        encoding="utf-8",
    )
    first, second = load(path)
    assert first == Example("007", "q", ("a",), ("d1", "d2"), {"note": "['kept']"}, ("a", "b"))
    assert second == Example("008", "q", ("a",))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (84.0, "84"),
        (-0.0, "0"),
        (84, "84"),
        (10**400, "1" + "0" * 400),
        (2.5, "2.5"),
        (1e300, "1e+300"),
        (np.float64(84), "84"),
        (np.float32(84.1), "84.1"),
        (np.int64(84), "84"),
        (Decimal("84.00"), "84"),
        (Decimal("84.50"), "84.5"),
        (Decimal("1E+3"), "1000"),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        (datetime.datetime(2024, 1, 2), "2024-01-02"),
        (datetime.datetime(2024, 1, 2, 3, 4), "2024-01-02 03:04:00"),
        (pandas.Timestamp("2024-01-02"), "2024-01-02"),
        (datetime.time(6, 30), "06:30:00"),
    ],
)
def test_numbers_and_dates_as_answers(value, text):
    assert examples_from_dataset([{"query": "q", "response": value}])[0].responses == (text,)
    assert examples_from_dataset([{"query": "q", "response": [value, "x"]}])[0].responses == (text, "x")


@pytest.mark.parametrize("value", [None, math.nan, np.float32("nan"), Decimal("NaN"), pandas.NaT, pandas.NA])
def test_missing_values(value):
    example = examples_from_dataset([{"query": "q", "response": "r", "title": value, "relevant_ids": value}])[0]
    assert example == Example("dataset-0001", "q", ("r",))
    for column in ("query", "response"):
        with pytest.raises(DataError, match=rf"dataset row 1: {column} is missing \(null\)"):
            examples_from_dataset([{"query": "q", "response": "r", column: value}])
    assert examples_from_dataset([{"query": "q", "response": value}], needs_responses=False)[0].responses == ()


def test_whole_floats_as_ids_and_metadata(tmp_path):
    path = tmp_path / "t.parquet"
    columns = {"id": [7.0, 8.0], "query": ["q", "q"], "response": [84.0, 85.5], "relevant_ids": [1.0, None]}
    pyarrow.parquet.write_table(pyarrow.table({**columns, "year": [1997.0, None]}), path)
    examples = load(path)
    assert examples == [Example("7", "q", ("84",), ("1",), {"year": 1997}), Example("8", "q", ("85.5",))]
    assert str(examples[0].metadata["year"]) == "1997"


def test_metadata_keeps_nested_values_as_data():
    extra = {"tags": ["a", None], "source": {"page": np.int64(3), "at": np.array([1.5, 2.0])}, "ok": np.bool_(True)}
    metadata = examples_from_dataset([{"query": "q", "response": "r", **extra}])[0].metadata
    assert json.dumps(metadata) == '{"tags": ["a", null], "source": {"page": 3, "at": [1.5, 2]}, "ok": true}'


def test_half_surrogates_in_metadata_are_told(tmp_path):
    rows = [{"query": "q", "response": "r", "note": {"x": ["\ud800"]}}, {"query": "q", "response": "r", "\udfff": 1}]
    with pytest.raises(DataError) as caught:
        load(write_jsonl(tmp_path / "t.jsonl", *rows))
    assert caught.value.message.splitlines()[1:] == [
        "t.jsonl:1: 'note' is no valid Unicode text: it has half of a surrogate pair",
        "t.jsonl:2: '\\udfff' is no valid Unicode text: it has half of a surrogate pair",
    ]


def test_arrays_are_lists():
    rows = [
        {"query": "q", "response": np.array(["a", "b"], dtype=object), "relevant_ids": np.array([1, 2])},
        {"query": "q", "response": {"text": np.array(["a"])}},
        {"query": "q", "response": {"text": np.array([])}},
    ]
    examples = examples_from_dataset(rows, needs_responses=False)
    assert [(row.responses, row.relevant_ids) for row in examples] == [(("a", "b"), ("1", "2")), (("a",), ()), ((), ())]
    with pytest.raises(DataError, match="dataset row 3: response is an empty list"):
        examples_from_dataset(rows)
