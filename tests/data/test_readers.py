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


ROWS_OF_THEIR_OWN = (
    "has a cell that begins with a quotation mark and ends in line {}, but lines {} to {} look like rows of their own "
    '(a quotation mark of the text itself is doubled, in a quoted cell: """six""")'
)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # Two unpaired quotes would swallow the rows between them.
        (
            'a\tb\n1\tx\n2\t"six\n3\tseven\n4\teight"\n5\ty\n',
            [
                (2, {"a": "1", "b": "x"}, ""),
                (3, {}, ROWS_OF_THEIR_OWN.format(5, 3, 5)),
                (6, {"a": "5", "b": "y"}, ""),
            ],
        ),
        ('a\n"x\ny"\n', [(2, {}, ROWS_OF_THEIR_OWN.format(3, 2, 3))]),
        (
            'a\tb\n1\t"open\n2\tx\n',
            [(2, {}, "cannot be read: a quotation mark at the start of a cell is never closed")],
        ),
        (
            'a\tb\n1\t"six" o\'clock\n2\tx\n',
            [(2, {}, "cannot be read: '\t' expected after '\"'"), (3, {"a": "2", "b": "x"}, "")],
        ),
        # What a writer of quoted cells makes of line breaks, tabs and quotes.
        (
            'a\tb\n1\t"x\ny"\n"2\n3"\tz\n4\t"p\tq"\n5\t"say ""hi"""\n6\t6" pipe\n',
            [
                (2, {"a": "1", "b": "x\ny"}, ""),
                (4, {"a": "2\n3", "b": "z"}, ""),
                (6, {"a": "4", "b": "p\tq"}, ""),
                (7, {"a": "5", "b": 'say "hi"'}, ""),
                (8, {"a": "6", "b": '6" pipe'}, ""),
            ],
        ),
    ],
)
def test_quotes_in_tsv_swallow_no_rows(tmp_path, content, expected):
    assert rows_of(write(tmp_path / "a.tsv", content)) == expected


@pytest.mark.parametrize("content", ["a;b\n1;x, y\n", "a\tb\n1\tx, y\n", '\n"a";b\n1;"x, y"\n', 'a,b\n1,"x, y"\n'])
def test_csv_of_other_delimiters(tmp_path, content):
    assert [values for _, values, _ in rows_of(write(tmp_path / "a.CSV", content))] == [{"a": "1", "b": "x, y"}]


@pytest.mark.parametrize(("first", "cells"), [("sep=;", "1;x, y"), ('"sep=|"', "1|x, y"), ("SEP=,", '1,"x, y"')])
def test_the_separator_that_a_spreadsheet_is_told_is_no_header(tmp_path, first, cells):
    header = "a" + cells[1] + "b"
    assert rows_of(write(tmp_path / "a.csv", f"{first}\r\n{header}\r\n{cells}\r\n")) == [
        (3, {"a": "1", "b": "x, y"}, "")
    ]


def test_missing_cells_are_null(tmp_path):
    cells = ["None", "nan", " NaN ", "NaT", "<NA>", "null", "NULL", "none", "NA", "Nan", "007", "84.0"]
    path = write(tmp_path / "a.csv", "a,b\n" + "".join(f"{cell},x\n" for cell in cells))
    assert [values["a"] for _, values, _ in rows_of(path)] == [None] * 7 + ["none", "NA", "Nan", "007", "84.0"]


def test_fields_that_come_twice_are_told(tmp_path):
    twice = '{"a": 1, "b": {"c": 1, "c": 2}}'
    assert rows_of(write(tmp_path / "a.jsonl", twice + "\n")) == [
        (1, {}, "is not JSON that can be read: it has the field 'c' more than once")
    ]
    with pytest.raises(DataError, match=r"a.json is not JSON that can be read: it has the field 'c' more than once"):
        read_table(write(tmp_path / "a.json", f"[{twice}]"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.TSV", "a.json"])
def test_bytes_of_other_encodings_say_how_to_convert(tmp_path, name):
    with pytest.raises(DataError, match="is not UTF-8 text: it has a NUL byte at offset 1") as caught:
        read_table(write(tmp_path / name, "a,b\n1,2\n".encode("utf-16-le")))
    assert f"`iconv -f UTF-16 -t UTF-8 {name}`" in caught.value.hint
    with pytest.raises(DataError, match="the byte 0xff at offset 0 cannot be decoded") as caught:
        read_table(write(tmp_path / name, "a,b\n1,2\n".encode("utf-16")))
    assert "UTF-16" in caught.value.hint
    with pytest.raises(DataError, match="the byte 0xfc at offset 3 cannot be decoded") as caught:
        read_table(write(tmp_path / name, "a,Dürer\n".encode("latin-1")))
    assert "CP1252" in caught.value.hint


def test_unicode_line_ends_end_no_row(tmp_path):
    text = "a\u2028b\u2029c\u0085d\x0be\x0cf"
    assert rows_of(write(tmp_path / "a.jsonl", json.dumps({"a": text}, ensure_ascii=False))) == [(1, {"a": text}, "")]
    assert rows_of(write(tmp_path / "a.tsv", f"a\tb\n{text}\tx\n")) == [(2, {"a": text, "b": "x"}, "")]


def test_short_floats_of_parquet_stay_what_was_written(tmp_path):
    path = tmp_path / "a.PARQUET"
    columns = {"a": pyarrow.array([84.1, None], pyarrow.float32()), "b": pyarrow.array([0.1, 84.0], pyarrow.float64())}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert rows_of(path) == [(1, {"a": 84.1, "b": 0.1}, ""), (2, {"a": None, "b": 84.0}, "")]
    short = pyarrow.float32()
    kinds = {
        "a": pyarrow.list_(short),
        "b": pyarrow.struct([("text", pyarrow.large_list(short)), ("n", pyarrow.int64())]),
        "c": pyarrow.list_(short, 2),
    }
    row = {"a": [84.1, None], "b": {"text": [0.1], "n": 3}, "c": [0.1, 84.0]}
    columns = {name: pyarrow.array([value, None], kinds[name]) for name, value in row.items()}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert rows_of(path) == [(1, row, ""), (2, dict.fromkeys(row), "")]


def test_cells_of_csv_that_hold_what_looks_like_rows_are_noted(tmp_path, caplog):
    caplog.set_level("WARNING", logger="fedrag_cli")
    path = write(tmp_path / "a.csv", 'a,b\n1,"six\n2,seven"\n3,"x\ny"\n4,z\n')
    assert [number for number, _, _ in rows_of(path)] == [2, 4, 6]
    assert caplog.messages == [
        f"{path}: quoted cells of these lines hold what looks like further rows, check their quotation marks: 2"
    ]
    caplog.clear()
    rows_of(write(tmp_path / "b.csv", 'a\n"x\ny"\n'))
    rows_of(write(tmp_path / "c.csv", 'a,b\n"1\n3",x\n'))
    assert caplog.messages == []
