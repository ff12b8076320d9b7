import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from fedrag_cli.data.readers import read_table
from fedrag_cli.errors import ConfigError, DataError


def rows_of(path, **settings):
    return [(row.number, dict(row.values), row.problem) for row in read_table(path, **settings).rows]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_jsonl_counts_blank_lines_and_reports_broken_ones(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"a": 1}\r\n\n{"a": "x\u2028y"}\n{"a": \n[1]\n')
    assert rows_of(path) == [
        (1, {"a": 1}, ""),
        (3, {"a": "x\u2028y"}, ""),
        (4, {}, "is not JSON: Expecting value (column 6)"),
        (5, {}, "is no object with named fields but a list"),
    ]


def test_limit_takes_the_first_rows_only(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\nbroken\n')
    assert rows_of(path, limit=2) == [(1, {"a": 1}, ""), (3, {"a": 2}, "")]


@pytest.mark.parametrize("content", [[{"a": 1}, 5], {"data": [{"a": 1}, 5], "version": 2}])
def test_json_is_a_list_or_has_one_in_data(tmp_path, content):
    path = write(tmp_path / "a.json", json.dumps(content))
    assert rows_of(path) == [(1, {"a": 1}, ""), (2, {}, "is no object with named fields but a number")]


@pytest.mark.parametrize("content", ['{"rows": []}', '"text"', '{"data": {}}'])
def test_other_json_is_refused(tmp_path, content):
    path = write(tmp_path / "a.json", content)
    with pytest.raises(DataError, match="neither a list of objects nor an object whose key 'data' holds one"):
        read_table(path)


def test_jsonl_named_json_says_so(tmp_path):
    path = write(tmp_path / "a.json", '{"a": 1}\n{"a": 2}\n')
    with pytest.raises(DataError, match=r"a.json:2 is not JSON: Extra data \(column 1\)") as caught:
        read_table(path)
    assert "the format is 'jsonl'" in caught.value.hint
    assert rows_of(path, format="jsonl") == [(1, {"a": 1}, ""), (2, {"a": 2}, "")]


def test_csv_rows_have_the_line_where_they_start(tmp_path):
    path = write(tmp_path / "a.csv", '\ufeffa, b\r\n"1\r\n2",x\r\n\r\n3\r\n4,5,6\r\n7,"8"9\r\n10,11\r\n')
    limit = csv.field_size_limit()
    assert rows_of(path) == [
        (2, {"a": "1\r\n2", "b": "x"}, ""),
        (5, {}, "has 1 cells, but the header has 2"),
        (6, {}, "has 3 cells, but the header has 2"),
        (7, {}, "cannot be read: ',' expected after '\"'"),
        (8, {"a": "10", "b": "11"}, ""),
    ]
    assert csv.field_size_limit() == limit


def test_csv_takes_long_cells(tmp_path):
    path = write(tmp_path / "a.csv", "a\n" + "x" * 200_000 + "\n")
    assert rows_of(path) == [(2, {"a": "x" * 200_000}, "")]


def test_csv_with_an_open_quote_is_reported(tmp_path):
    path = write(tmp_path / "a.csv", 'a\n"open\nuntil the end')
    assert rows_of(path) == [(2, {}, "cannot be read: a quotation mark at the start of a cell is never closed")]


def test_tsv(tmp_path):
    assert rows_of(write(tmp_path / "a.tsv", "a\tb\n1\t2,3\n")) == [(2, {"a": "1", "b": "2,3"}, "")]


@pytest.mark.parametrize(
    ("header", "message"), [("a,b,a", "names more than once: a"), ("a,,b,", "has no name for column 2, 4")]
)
def test_bad_csv_header(tmp_path, header, message):
    with pytest.raises(DataError, match=message):
        read_table(write(tmp_path / "a.csv", header + "\n1,2,3\n"))


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, None], "b": [["x"], []]}), path)
    assert rows_of(path) == [(1, {"a": 1, "b": ["x"]}, ""), (2, {"a": None, "b": []}, "")]


def test_parquet_with_two_columns_of_one_name(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array([1])] * 2, names=["a", "a"]), path)
    with pytest.raises(DataError, match="names more than once: a"):
        read_table(path)


def test_broken_parquet(tmp_path):
    with pytest.raises(DataError, match=r"a.parquet is no Parquet file that can be read"):
        read_table(write(tmp_path / "a.parquet", b"nothing of the kind"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_bytes_that_are_not_utf8_name_the_offset(tmp_path, name):
    with pytest.raises(DataError, match=rf"{name} is not UTF-8 text: the byte 0xe9 at offset 10 "):
        read_table(write(tmp_path / name, b"\xef\xbb\xbf[1]\n caf"[:9] + b"f\xe9\n"))


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", "\n \n"), ("a.csv", "a,b\n"), ("a.json", "[]")])
def test_file_without_rows(tmp_path, name, content):
    with pytest.raises(DataError, match=f"{name} has no rows"):
        read_table(write(tmp_path / name, content))


def test_empty_file(tmp_path):
    with pytest.raises(DataError, match=r"a.jsonl is empty"):
        read_table(write(tmp_path / "a.jsonl", ""))


def test_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"trian.jsonl does not exist") as caught:
        read_table(tmp_path / "trian.jsonl")
    assert caught.value.hint == "Did you mean 'train.jsonl'?"
    with pytest.raises(DataError) as caught:
        read_table(tmp_path / "zzz.csv")
    assert caught.value.hint == "Its folder has: train.jsonl."
    with pytest.raises(DataError) as caught:
        read_table(tmp_path / "no" / "train.jsonl")
    assert "does not exist either" in caught.value.hint


def test_folder_where_a_file_is_expected(tmp_path):
    with pytest.raises(DataError, match="is a folder, but a file is expected"):
        read_table(tmp_path)


def test_unknown_ending(tmp_path):
    with pytest.raises(ConfigError, match=r"The format of 'a.txt' cannot be told by its ending") as caught:
        read_table(write(tmp_path / "a.txt", "x"))
    assert caught.value.hint == "Set `format` to one of jsonl, json, csv, tsv, parquet."
