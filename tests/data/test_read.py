"""Rows out of every kind of source, unchanged; one clear error, with its place, for each that can't be read."""

import json

import datasets
import pyarrow.parquet
import pytest

from burnish.config.errors import UserError
from burnish.data.read import is_stream, open_source

ROWS = [{"text": "one", "n": 1}, {"text": "zwei ü", "n": 2}, {"text": "three", "n": 3}]
TOOLS = [
    {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f", "parameters": {"x": {"type": "int"}}}]},
    {"messages": [{"role": "user", "content": "b"}], "tools": [{"name": "g", "parameters": {"y": {"enum": [None]}}}]},
]


def read(source, **options):
    return list(open_source(source, **options).rows())


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_files(tmp_path):
    assert read(write(tmp_path / "a.jsonl", "\n" + jsonl(ROWS) + "\n \n")) == ROWS
    assert read(write(tmp_path / "a.json", json.dumps(ROWS, indent=1))) == ROWS
    assert read(write(tmp_path / "b.json", json.dumps({"version": 1, "data": ROWS}))) == ROWS
    assert read(write(tmp_path / "c.json", jsonl(ROWS))) == ROWS
    assert read(tmp_path / "c.json") == ROWS
    assert read(write(tmp_path / "a.csv", 'text,n\none,1\n"zwei ü",2\nthree,3\n')) == [
        {**row, "n": str(row["n"])} for row in ROWS
    ]
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ROWS


def test_datasets_objects_and_folders(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    assert read(dataset) == read(ROWS) == ROWS
    dataset.save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == ROWS
    both = datasets.DatasetDict(train=dataset, test=dataset.select([1]))
    both.save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two", split="test") == read(both, split="test") == ROWS[1:2]
    with pytest.raises(UserError, match="no split 'valid'. It has: train, test"):
        read(tmp_path / "two", split="valid")


def test_long_datasets_come_whole_and_in_order():
    rows = [{"n": i} for i in range(2500)]
    assert read(datasets.Dataset.from_list(rows)) == rows
    assert [len(block) for block in open_source(rows).blocks(1000)] == [1000, 1000, 500]


def test_json_keeps_the_shape_of_tool_schemas(tmp_path):
    assert read(write(tmp_path / "a.jsonl", jsonl(TOOLS))) == TOOLS


def test_digest_follows_the_content(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, jsonl(ROWS))
    before = open_source(path).digest()
    write(tmp_path / "b.jsonl", jsonl(ROWS))
    assert open_source(tmp_path / "b.jsonl").digest() == before
    write(path, jsonl(ROWS[:2]))
    assert open_source(path).digest() != before
    assert open_source(ROWS).digest() == open_source(datasets.Dataset.from_list(ROWS)).digest()
    assert open_source(ROWS).digest() != open_source(ROWS[::-1]).digest()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', r"a\.jsonl:3: not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl:2: a row must be a JSON object"),
        ("a.json", '[{"a": 1},\n nope]', r"a\.json:2: not JSON"),
        ("a.json", "[1, 2]", r"a\.json row 0: a row must be an object, this one is a int"),
        ("a.json", '"text"', "expected a list of rows"),
        ("a.csv", "text,n\none,1\ntwo\n", r"a\.csv:3: .*2 columns"),
        ("a.parquet", "nope", "not a parquet file"),
        ("a.txt", "nope", r"unknown kind of data file '\.txt'"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(UserError, match=message):
        read(path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        read(tmp_path / "a.jsonl")


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such data file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="hub could not be asked"):
        read("nobody/nothing-of-the-kind")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot read a data set here"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match="cannot read rows from a int"):
        read(3)
    with pytest.raises(UserError, match="row 1: a row must be an object"):
        read([{"a": 1}, "b"])


def test_streams_are_told_from_stored_rows(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    assert is_stream(dataset.to_iterable_dataset()) and is_stream(iter(ROWS))
    assert not any(map(is_stream, (dataset, ROWS, "path", tmp_path)))


def test_parquet_reader_is_pyarrow_s_own(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 1000), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ROWS * 1000
