"""Arrow's own view of a file: what its metadata claims is never carried out."""

import builtins
import io
import json
import socket

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qadapter.data import as_preferences, load_preferences
from qadapter.data.arrow import ArrowRows, declared_media
from qadapter.errors import QAdapterError
from qadapter.system import textfiles

ROWS = [{"prompt": f"Why {i}?", "chosen": f" So {i}.", "rejected": " No."} for i in range(3)]
MEDIA = (
    {"_type": "Image"}, {"_type": "Audio", "decode": True}, {"_type": "Video"},
    {"_type": "SomethingNew"}, {"_type": "List", "feature": {"_type": "Image"}},
    [{"x": {"_type": "Pdf"}}], {"_type": "Array2D", "shape": [10**9, 10**9], "dtype": "int8"},
)
"""What metadata may say of a column that `datasets` then decodes, or makes of its cells."""


def declared(table, **features):
    plain = {name: {"dtype": "string", "_type": "Value"} for name in table.column_names}
    info = {"info": {"features": plain | features}}
    return table.replace_schema_metadata({"huggingface": json.dumps(info)})


@pytest.fixture
def watched(monkeypatch):
    """What was opened and connected to."""
    seen = []
    original = builtins.open
    monkeypatch.setattr(builtins, "open", lambda f, *a, **k: seen.append(f) or original(f, *a, **k))
    monkeypatch.setattr(io, "open", builtins.open)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: seen.append(address))
    return seen


@pytest.mark.parametrize("feature", MEDIA, ids=[json.dumps(feature) for feature in MEDIA])
@pytest.mark.parametrize("kind", ["file", "table"])
def test_a_declared_column_is_neither_decoded_nor_opened(tmp_path, watched, feature, kind):
    secret = tmp_path / "secret.txt"
    secret.write_text("not to be read")
    cells = [str(secret), "http://127.0.0.1:1/x.png", "s3://x/y"]
    table = pa.Table.from_pylist(ROWS).append_column("history", pa.array(cells))
    path, source = tmp_path / "a.parquet", declared(table, history=feature)
    if kind == "file":
        pq.write_table(source, path)
    read = (lambda **k: load_preferences(path, **k)) if kind == "file" else (
        lambda **k: as_preferences(source, **k)
    )
    watched.clear()
    assert list(read()["prompt"]) == [row["prompt"] for row in ROWS]
    with pytest.raises(QAdapterError, match=r"the column 'history' holds \w+ values"):
        read(columns={"prompt": "history"})
    # Nor where the lie is of a column that pairs are made of.
    with pytest.raises(QAdapterError, match=r"the column 'prompt' holds \w+ values"):
        as_preferences(declared(table, prompt=feature))
    assert not [seen for seen in watched if "secret" in str(seen) or "127.0.0.1" in str(seen)]


@pytest.mark.parametrize("metadata", [
    "[" * 5000, "{", "null", "[]", '{"info": 7}', '{"info": {"features": [1]}}',
    '{"info": {"features": {"chosen": 7, "prompt": {"_type": 7}}}}',
    '{"info": {"features": {"chosen": {"_type": "Value", "dtype": "nothing"}}}}',
    '{"info": {"features": {"no such": {"_type": "Image"}}}}', b"\xff\xfe",
])
def test_metadata_that_is_none_is_nothing(tmp_path, metadata):
    table = pa.Table.from_pylist(ROWS).replace_schema_metadata({"huggingface": metadata})
    assert not set(declared_media(table.schema)) & set(table.column_names)
    pq.write_table(table, tmp_path / "a.parquet")
    assert len(load_preferences(tmp_path / "a.parquet")) == 3


def test_json_columns_are_parsed_by_their_type_alone(tmp_path):
    turns = [{"role": "assistant", "content": "Yes.", "x": [1, None]}]
    data = datasets.Dataset.from_list(
        [{"prompt": "Why?", "chosen": turns, "rejected": turns, "tools": [{"a": 1}]}],
        features=datasets.Features({
            "prompt": datasets.Value("string"), "chosen": datasets.List(datasets.Json()),
            "rejected": datasets.List(datasets.Json()), "tools": datasets.Json(),
        }),
    )
    data.to_parquet(tmp_path / "a.parquet")
    plain = pq.read_table(tmp_path / "a.parquet").replace_schema_metadata(None)
    for rows in (ArrowRows(data), ArrowRows(plain)):
        (row,) = rows.take({"a": "chosen", "b": "tools"})
        assert row["a"][0]["role"] == "assistant" and row["b"] == [{"a": 1}]
    lying = declared(pa.Table.from_pylist(ROWS), chosen={"_type": "Json"})
    assert [row["a"] for row in ArrowRows(lying).take({"a": "chosen"})] == [
        row["chosen"] for row in ROWS
    ]


def test_a_file_that_grows_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("qadapter.data.arrow.ZIPPED_BYTES", 2**20)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([ROWS[0] | {"chosen": "x" * 1000}] * 100_000), path)
    assert path.stat().st_size < 10**6
    with pytest.raises(QAdapterError, match=r"a\.parquet can't be read: it grows to more than 100"):
        load_preferences(path)
    assert len(load_preferences(path, limit=100)) == 100
    assert textfiles.ZIPPED_BYTES > 2**20


def test_what_arrow_may_hold_and_text_may_not_names_the_column(tmp_path):
    def error(table):
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(QAdapterError) as caught:
            load_preferences(tmp_path / "a.parquet")
        return str(caught.value)

    whole = pa.Table.from_pylist(ROWS)
    bad = pa.array([b"\xff\xfe", b"a", b"b"]).view(pa.string())
    assert "the column 'chosen' can't be read" in error(whole.set_column(1, "chosen", bad))
    assert "the column 'chosen' holds binary values" in error(
        whole.set_column(1, "chosen", pa.array([b"a"] * 3))
    )
    assert "several columns 'chosen'" in error(whole.append_column("chosen", whole["chosen"]))
    unread = whole.append_column("other", bad)  # nobody asked
    pq.write_table(unread, tmp_path / "b.parquet")
    assert len(load_preferences(tmp_path / "b.parquet")) == 3
