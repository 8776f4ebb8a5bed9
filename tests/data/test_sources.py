"""Reading files, folders and hub names; every bad input ends in one line that names it."""

import contextlib
import gzip
import json
import time

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from qadapter.data import as_preferences, load_preferences
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
        assert f"{path} can't be read" in error(path)


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


# --- names of splits ----------------------------------------------------------------------------

SHARD = "-00000-of-00001.parquet"


def folder_of(tmp_path, *names):
    """A folder of files, each with one row whose prompt is the file's name."""
    for name in names:
        write(tmp_path / name, [{**ROWS[0], "prompt": name}])
    return tmp_path


def files_read(folder, split, **kwargs):
    return list(load_preferences(folder, split=split, **kwargs)["prompt"])


@pytest.mark.parametrize(
    ("files", "split", "read"),
    [
        # as the hub names them
        ([f"data/{s}{SHARD}" for s in ("train_prefs", "train_sft", "test_sft")], "test_sft", [2]),
        ([f"data/{s}{SHARD}" for s in ("train", "train_sft")], "train", [0]),
        (["data/train-00000-of-00002-0a1b2c3d.parquet", "data/train-00001-of-00002-4e5f.parquet"],
         "train", [0, 1]),
        ([f"helpful/train{SHARD}", f"harmless/train{SHARD}", f"helpful/test{SHARD}"], "train",
         [0, 1]),
        ([f"default/train_prefs/000{i}.parquet" for i in (0, 1)], "train_prefs", [0, 1]),
        # as people do
        (["en/train.jsonl", "en/test.jsonl"], "train", [0]),
        (["train.jsonl.gz", "test.jsonl"], "train", [0]),
        (["my-data-train.jsonl", "my-data-test.jsonl"], "train", [0]),
        (["my-data-train.jsonl", "my-data-test.jsonl"], "my-data-test", [1]),
        (["train_1.jsonl", "train_2.jsonl", "test.jsonl"], "train", [0, 1]),
        (["train_1.jsonl", "train_2.jsonl"], "train_2", [1]),
        (["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"], "train", [0, 1]),
        (["dev.jsonl", "train.jsonl"], "validation", [0]),
        (["validation_seen.jsonl", "validation_unseen.jsonl"], "validation_seen", [0]),
        (["train.jsonl", "train_extra.jsonl"], "train", [0]),
        (["helpful.jsonl", "harmless.jsonl"], "helpful", [0]),
        (["helpful/a.jsonl", "harmless/a.jsonl"], "harmless", [1]),
        (["constrained.jsonl", "latest.jsonl"], "train", [0, 1]),
        (["a.jsonl", "._a.jsonl", ".cache/b.jsonl", "__MACOSX/c.jsonl"], "train", [0]),
    ],
)
def test_split_names_of_folders(tmp_path, files, split, read):
    found = files_read(folder_of(tmp_path, *files), split)
    assert sorted(found) == sorted(files[i] for i in read)


@pytest.mark.parametrize(
    ("files", "split", "words"),
    [
        ([f"data/{s}{SHARD}" for s in ("train_prefs", "train_sft")], "train",
         ["'train'", "it has train_prefs, train_sft"]),
        ([f"data/train_prefs{SHARD}"], "train", ["it has train_prefs"]),
        ([f"data/helpful{SHARD}"], "train", ["it has helpful"]),
        (["train_prefs.jsonl", "train_sft.jsonl"], "train", ["it has train_prefs, train_sft"]),
        (["validation_seen.jsonl", "validation_unseen.jsonl"], "validation", ["validation_seen"]),
        (["en/train.jsonl", "en/test.jsonl"], "en", ["it has test, train"]),
        (["train.jsonl", "test.jsonl"], "tets", ["did you mean 'test'"]),
    ],
)
def test_splits_that_are_not_there_are_not_guessed(tmp_path, files, split, words):
    message = error(folder_of(tmp_path, *files), split=split)
    assert all(word in message for word in words), message


README = """---
license: mit
configs:
- config_name: en
  default: true
  data_files:
  - split: train
    path: english/train-*
  - split: held_out
    path: ["english/test.jsonl"]
- config_name: de
  data_files: german/*.jsonl
- config_name: fr
  data_dir: french
  data_files: {train: "**/*.jsonl", test: gone.jsonl}
---
# Read me
"""


def test_readme_of_a_hub_dataset_says_which_files_are_a_split(tmp_path):
    names = ["english/train-a.jsonl", "english/train-b.jsonl", "english/test.jsonl",
             "german/x.jsonl", "french/deep/y.jsonl"]
    folder = folder_of(tmp_path, *names)
    (folder / "README.md").write_bytes(b"\xef\xbb\xbf" + README.replace("\n", "\r\n").encode())
    assert files_read(folder, "train") == names[:2]
    assert files_read(folder, "held_out") == names[2:3]
    assert files_read(folder, "train", config="de") == names[3:4]
    assert files_read(folder, "train", config="fr") == names[4:]
    assert "it has train, held_out" in error(folder, split="test")
    assert "no configuration 'es'; it has en, de, fr" in error(folder, config="es")
    assert "no such file is there" in error(folder, split="test", config="fr")
    (folder / "README.md").write_text(README.replace("  default: true\n", ""))
    assert "choose one with config" in error(folder)
    (folder / "README.md").write_text("---\nconfigs: 7\n---\n# Notes")
    assert len(files_read(folder, "train-a")) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "folder", "saved"])
def test_slices_of_local_splits(tmp_path, name):
    rows = [{**ROWS[0], "prompt": str(i)} for i in range(20)]
    path = tmp_path / name
    if name == "folder":
        write(path / f"train{SHARD}", rows)
    elif name == "saved":
        DatasetDict(train=Dataset.from_list(rows)).save_to_disk(path)
    else:
        write(path, rows)
    assert files_read(path, "train[:3]") == ["0", "1", "2"]
    assert files_read(path, "train[90%:]") == ["18", "19"]
    assert files_read(path, "train[5:]", limit=2) == ["5", "6"]
    assert files_read(path, "train[-1:]") == ["19"]
    assert "split 'train+test'" in error(path, split="train+test")
    assert "split 'train[first]'" in error(path, split="train[first]")
    assert "holds no rows" in error(path, split="train[3:3]")


# --- what is not asked for ----------------------------------------------------------------------


def test_only_columns_asked_for_are_read(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([r | {"audio": b"xyz", "note": "n"} for r in ROWS]), path)
    read = []
    original = pq.ParquetFile.iter_batches

    def iter_batches(self, size, groups, columns):
        read.extend(columns)
        return original(self, size, groups, columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    assert len(load_preferences(path)) == 2
    assert set(read) == {"prompt", "chosen", "rejected"}


@pytest.mark.parametrize(("split", "rows"), [
    ("train", range(23)), ("train[:4]", range(4)), ("train[9:14]", range(9, 14)),
    ("train[-2:]", range(21, 23)), ("train[6:7]", range(6, 7)),
])
def test_spans_over_files_and_row_groups(tmp_path, split, rows):
    whole = pa.Table.from_pylist([{**ROWS[0], "prompt": str(i)} for i in range(23)])
    for number, (start, length) in enumerate(((0, 10), (10, 13))):
        pq.write_table(whole.slice(start, length), tmp_path / f"train-{number}.parquet",
                       row_group_size=3)
    assert files_read(tmp_path, split) == [str(i) for i in rows]


MEDIA = {
    "audio": (datasets.Audio(), {"bytes": b"RIFF", "path": "x"}),
    "image": (datasets.Image(), {"bytes": b"no png", "path": "x"}),
    "video": (datasets.Video(), {"bytes": b"", "path": "x"}),
    "images": (datasets.List(datasets.Image()), [{"bytes": b"no png", "path": "x"}]),
}


def with_media(name):
    feature, value = MEDIA[name]
    table = pa.Table.from_pylist([row | {name: value} for row in ROWS])
    features = Dataset(table).features | {name: feature}
    # Not encoded as such: that would ask for the libraries that decode it.
    return Dataset(table, info=datasets.DatasetInfo(features=datasets.Features(features)))


@pytest.mark.parametrize("name", MEDIA)
@pytest.mark.parametrize("kind", ["object", "stream", "file", "folder", "saved"])
def test_columns_of_media_are_not_opened(tmp_path, name, kind):
    data = with_media(name)
    if kind in ("file", "folder"):
        path = tmp_path / "data" / f"train{SHARD}"
        path.parent.mkdir()
        data.to_parquet(path)
        source = path if kind == "file" else tmp_path
    elif kind == "saved":
        source = tmp_path / "saved"
        data.save_to_disk(source)
    else:
        source = data if kind == "object" else data.to_iterable_dataset()
    read = as_preferences if kind in ("object", "stream") else load_preferences
    assert list(read(source)["prompt"]) == ["Why?", "Who?"]
    with pytest.raises(QAdapterError, match=rf"the column '{name}' holds \w+ values"):
        read(source, columns={"prompt": name})


# --- folders that name files --------------------------------------------------------------------


@pytest.mark.parametrize(("name", "content", "problem"), [
    ("state.json", "[" * 5000, "more than 100 deep"), ("state.json", "{}", "no list '_data_files'"),
    ("state.json", '{"_data_files": [{"filename": 7}]}', "no list '_data_files'"),
    ("state.json", '{"_data_files": [{"filename": "../secret.arrow"}]}', "not the name of a file"),
    ("state.json", '{"_data_files": [{"filename": "/etc/hostname"}]}', "not the name of a file"),
    ("state.json", '{"_data_files": [{"filename": "state.json"}]}', "as a saved dataset"),
    ("state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', "as a saved dataset"),
    ("dataset_dict.json", '{"splits": ["../train"]}', "has no split 'train'"),
    ("dataset_dict.json", '{"splits": 7}', "no list 'splits'"),
])
def test_a_saved_dataset_reads_its_own_files_alone(tmp_path, name, content, problem):
    folder = tmp_path / "saved"
    Dataset.from_list(ROWS).save_to_disk(folder)
    (folder / name).write_text(content)
    assert problem in error(folder)
    if "../train" in content:
        assert "not the name of a file in it" in error(folder, split="../train")


def test_what_a_saved_dataset_says_of_its_columns_is_not_carried_out(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    info = tmp_path / "saved/dataset_info.json"
    info.write_text(json.dumps({"features": {"chosen": {"_type": "Image"}, "x": 7}}))
    assert len(load_preferences(tmp_path / "saved")) == len(ROWS)


@pytest.mark.parametrize("damage", [8, 64, 200, 300, 400, 500, 600])
def test_a_damaged_arrow_file_is_an_error_or_harmless(tmp_path, damage):
    Dataset.from_list(ROWS * 50).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    data = bytearray(file.read_bytes())
    for at in range(damage, len(data), 997):
        data[at] ^= 0xFF
    file.write_bytes(data)
    with contextlib.suppress(QAdapterError):
        load_preferences(tmp_path / "saved")


@pytest.mark.parametrize("entry", [
    "data_dir: ..", "data_dir: /etc", "data_files: ../secret.jsonl", "data_files: /etc/*",
    "data_files: {train: [a.jsonl, x/../../secret.jsonl]}", "data_files: '..\\secret.jsonl'",
])
def test_a_readme_names_files_of_its_folder_alone(tmp_path, entry):
    folder = tmp_path / "data"
    folder.mkdir()
    write(tmp_path / "secret.jsonl"), write(folder / "a.jsonl")
    files = "" if "data_files" in entry else "\n  data_files: a.jsonl"
    header = f"configs:\n- config_name: default\n  {entry}{files}"
    (folder / "README.md").write_text(f"---\n{header}\n---\n")
    assert "is not within" in error(folder)
