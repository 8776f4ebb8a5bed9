"""Reading files, folders and hub names; every bad input ends in one line that names it."""

import gzip
import json
import time

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from qadapter.data import load_preferences
from qadapter.errors import QAdapterError

ROWS = [
    {"prompt": "Why?", "chosen": " So.", "rejected": " No."},
    {"prompt": "Who?", "chosen": " I.", "rejected": " You."},
]


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines if name.endswith(".jsonl") else json.dumps(rows, indent=1))
    return path


def error(*args, **kwargs) -> str:
    with pytest.raises(QAdapterError) as caught:
        load_preferences(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_file_kinds_read_alike(tmp_path, name):
    dataset = load_preferences(write(tmp_path / name))
    assert [{k: row[k] for k in ROWS[0]} for row in dataset] == ROWS
    assert list(dataset["row"]) == [0, 1]
    assert list(dataset["problem"]) == [None, None]


def test_json_and_json_lines_are_told_apart_with_a_bom_and_blank_lines(tmp_path):
    path = tmp_path / "a.json"
    lines = b"\r\n\r\n".join(json.dumps(row).encode() for row in ROWS) + b"\n\n"
    for content in (lines, b" \n" + json.dumps(ROWS).encode()):
        path.write_bytes(b"\xef\xbb\xbf" + content)
        assert len(load_preferences(path)) == 2


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_limit(tmp_path, name):
    path = write(tmp_path / name)
    assert list(load_preferences(path, limit=1)["prompt"]) == ["Why?"]
    assert len(load_preferences(path, limit=9)) == 2
    assert "limit" in error(path, limit=0)


def test_folder_takes_the_files_named_for_the_split(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:1])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[1:])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[:1])
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert list(load_preferences(tmp_path)["prompt"]) == ["Why?", "Who?"]
    assert list(load_preferences(tmp_path, split="test")["prompt"]) == ["Why?"]
    message = error(tmp_path, split="validation")
    assert "'validation'" in message and "test-00000-of-00001.parquet" in message


def test_folder_without_split_names_is_the_train_split(tmp_path):
    write(tmp_path / "one.jsonl", ROWS[:1])
    write(tmp_path / "two.jsonl", ROWS[1:])
    assert len(load_preferences(tmp_path)) == 2
    assert "no file named for split 'test'" in error(tmp_path, split="test")


def test_folder_with_only_test_files_is_no_train_split(tmp_path):
    write(tmp_path / "test.jsonl")
    assert "no file named for split 'train'" in error(tmp_path)


def test_saved_datasets(tmp_path):
    dataset = Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "two")
    assert len(load_preferences(tmp_path / "one")) == 2
    assert list(load_preferences(tmp_path / "two", split="test")["prompt"]) == ["Who?"]
    assert "it has train, test" in error(tmp_path / "two", split="dev")
    assert "no split 'test'" in error(tmp_path / "one", split="test")
    (tmp_path / "two" / "dataset_dict.json").write_text("{")
    assert "two" in error(tmp_path / "two")


def test_bad_lines_are_named(tmp_path):
    good = json.dumps(ROWS[0])
    path = tmp_path / "a.jsonl"
    path.write_text(f'{good}\n\n{{"prompt": "x", \n')
    assert f"{path}:3 is not JSON" in error(path)
    path.write_text(f"{good}\n[1, 2]\n")
    assert f"{path}:2 holds a list" in error(path)
    path.write_bytes(good.encode() + b'\n{"prompt": "\xff"}\n')
    assert f"{path}:2 is not UTF-8" in error(path)


def test_bad_json_files_are_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"prompt": "x"},\n{"prompt" "y"}\n]')
    assert f"{path}:3 is not JSON" in error(path)
    path.write_text('[{"prompt": "x"}, 7]')
    assert f"{path}: row 1 is a int" in error(path)
    path.write_text(json.dumps({"data": ROWS}, indent=2))
    assert "one JSON dict with the keys data" in error(path)
    path.write_text("not json")
    assert f"{path}:1 is not JSON" in error(path)


def test_damaged_binary_files(tmp_path):
    parquet, zipped = tmp_path / "a.parquet", tmp_path / "a.jsonl.gz"
    parquet.write_bytes(b"nonsense")
    zipped.write_bytes(gzip.compress(b"x" * 1000)[:-20])
    for path in (parquet, zipped):
        assert f"{path} cannot be read" in error(path)


@pytest.mark.parametrize("content", ["", "\n \n", "[]"])
def test_empty_files(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    assert f"{path} holds no rows" in error(path)


def test_empty_parquet_and_folder(tmp_path):
    pq.write_table(pa.table({"chosen": [], "rejected": []}), tmp_path / "a.parquet")
    assert "holds no rows" in error(tmp_path / "a.parquet")
    (tmp_path / "empty").mkdir()
    assert "holds no .json" in error(tmp_path / "empty")


def test_local_mistakes(tmp_path):
    path = write(tmp_path / "a.jsonl")
    assert "single file and has no split 'test'" in error(path, split="test")
    assert "config 'en'" in error(path, config="en")
    assert f"no file or folder {tmp_path}/b.jsonl" in error(tmp_path / "b.jsonl")
    assert "no file or folder b.parquet" in error("b.parquet")
    (tmp_path / "a.csv").write_text("chosen,rejected\n")
    assert "unknown kind of file" in error(tmp_path / "a.csv")
    assert "cannot be read" in error("x" * 5000)
    write(tmp_path / "b.parquet")
    assert "mixes JSON and Parquet" in error(tmp_path / ".")


def test_unreachable_hub_fails_once_and_names_both(monkeypatch):
    calls = []

    def unreachable(self, *args, **kwargs):
        calls.append(args)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("retries with waits"))
    message = error("nobody/no-such-preferences")
    assert "no file or folder 'nobody/no-such-preferences'" in message
    assert "hub dataset 'nobody/no-such-preferences'" in message
    assert "Name or service not known" in message
    assert len(calls) == 1


def test_hub_dataset_is_loaded_by_name(monkeypatch):
    def load(name, config, split):
        assert (name, config, split) == ("owner/name", "en", "test")
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("qadapter.data.sources.load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: None)
    assert len(load_preferences("owner/name", config="en", split="test", limit=1)) == 1
