"""Files that are read piece by piece give what they give when they are read whole."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from qadapter.data import (
    as_preferences,
    json_rows,
    load_preferences,
    split_by_prompt,
    spooled,
    without_prompts,
)
from qadapter.data.columns import list_lengths, list_sums
from qadapter.errors import QAdapterError
from qadapter.system import textfiles
from qadapter.system.textfiles import lines_of, read_text, split_lines

ROWS = [
    {"prompt": f"p{i} é\u2028", "chosen": f"yes {i}", "rejected": "no", "n": i}
    for i in range(10)
]
for row in ROWS[::3]:  # not every row has every column
    del row["n"]


@pytest.fixture(params=[False, True], ids=["whole", "by line"])
def by_line(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(json_rows, "_WHOLE", 0)
    return request.param


def lines(rows):
    return "\n".join(map(json.dumps, rows))


CONTENTS = {
    "lines": lines(ROWS).encode(),
    "ended": lines(ROWS).encode() + b"\n\n",
    "mark": b"\xef\xbb\xbf" + lines(ROWS).encode(),
    "windows": lines(ROWS).replace("\n", "\r\n").encode(),
    "old mac": lines(ROWS).replace("\n", "\r").encode(),
    "utf-16": lines(ROWS).encode("utf-16"),
    "a list": json.dumps(ROWS, indent=1).encode(),
    "as it is": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(),
    "blank lines": lines(ROWS).replace("\n", "\n \n").encode(),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", CONTENTS)
def test_however_a_file_is_written(tmp_path, by_line, kind, zipped):
    path = tmp_path / ("a.jsonl.gz" if zipped else "a.jsonl")
    path.write_bytes(gzip.compress(CONTENTS[kind]) if zipped else CONTENTS[kind])
    found = load_preferences(path)
    assert found["prompt"][:] == [row["prompt"] for row in ROWS]
    assert found["row"][:] == list(range(10))
    limited = load_preferences(path, limit=4)
    assert limited["chosen"][:] == [row["chosen"] for row in ROWS[:4]]


def test_parts_of_several_files(tmp_path, by_line):
    for number, part in enumerate((ROWS[:4], ROWS[4:])):
        (tmp_path / f"train-{number:05d}-of-00002.jsonl").write_text(lines(part))
    found = load_preferences(tmp_path, split="train[20%:70%]")
    assert found["prompt"][:] == [row["prompt"] for row in ROWS[2:7]]
    rows = json_rows.read_json_files(sorted(tmp_path.iterdir()), None)
    assert type(rows).__name__ == ("JsonRows" if by_line else "ListRows")
    assert (len(rows), rows.columns) == (10, ["prompt", "chosen", "rejected", "n"])
    taken = rows.part(3, 6).take({"n": "n"})
    assert [list(taken), list(taken)] == [[{}, {"n": 4}, {"n": 5}]] * 2


BROKEN = {
    "not JSON": (lines(ROWS[:2]).encode() + b"\n{", ":3 is not JSON"),
    "no object": (lines(ROWS[:2]).encode() + b"\n7", ":3 holds a int"),
    "not UTF-8": (lines(ROWS[:2]).encode() + b"\n\xff", ":3 is not UTF-8 text (byte 0xff)"),
    "a zero byte": (lines(ROWS[:2]).encode() + b"\n\0", ":3 holds a zero byte"),
    "one object": (b'{\n"a": [1]\n}', "holds one JSON dict with the keys a"),
    "empty": (b"", "holds no rows"),
    "no rows": (b"\n \n", "holds no rows"),
    "a list of others": (b"[1]", "row 0 is a int, not an object"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_wrong_is_named_by_its_line(tmp_path, by_line, kind):
    content, words = BROKEN[kind]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(QAdapterError) as error:
        load_preferences(tmp_path / "a.jsonl")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "content", [gzip.compress(b"x" * 1000, mtime=0)[:-9], b"no gz"], ids=["cut", "no gz"])
def test_a_gz_that_is_cut_or_none(tmp_path, content):
    (tmp_path / "a.txt.gz").write_bytes(content)
    with pytest.raises(QAdapterError, match="can't be read"):
        list(lines_of(tmp_path / "a.txt.gz"))


@pytest.mark.parametrize("content", [b"\n" * 100_000, b"a" * 100_000])
def test_a_gz_that_is_made_to_fill_the_memory(tmp_path, monkeypatch, content):
    monkeypatch.setattr(textfiles, "ZIPPED_BYTES", 1000)
    monkeypatch.setattr(textfiles, "ZIPPED_TIMES", 10)
    monkeypatch.setattr(textfiles, "_LOOKED_AT", 50)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content))
    with pytest.raises(QAdapterError, match="grows to more than 10 times"):
        list(lines_of(tmp_path / "a.txt.gz"))


@pytest.mark.parametrize("seed", range(60))
def test_lines_are_those_of_the_text(tmp_path, monkeypatch, seed):
    """Wherever the piece that is looked at first ends."""
    rng = random.Random(seed)
    monkeypatch.setattr(textfiles, "_LOOKED_AT", rng.choice((1, 2, 7, 1000)))
    text = "".join(rng.choices(["a", "\n", "\r\n", "é", "\u2028", ""], k=rng.randrange(12)))
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert list(lines_of(path)) == split_lines(read_text(path))


def test_a_pipe_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "_WHOLE", 0)
    path = tmp_path / "a.jsonl"
    os.mkfifo(path)
    writer = subprocess.Popen(
        [sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write(sys.argv[2])", path,
         lines(ROWS)]
    )
    assert len(load_preferences(path)) == 10
    assert writer.wait(10) == 0


# --- Parquet --------------------------------------------------------------------------------------


def test_parquet_over_groups_and_files(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(3500)]
    for number, part in enumerate((rows[:2500], rows[2500:])):
        path = tmp_path / f"train-{number:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(part), path, row_group_size=700)
    assert load_preferences(tmp_path)["prompt"][:] == [row["prompt"] for row in rows]
    part = load_preferences(tmp_path, split="train[2400:2600]")
    assert part["prompt"][:] == [row["prompt"] for row in rows[2400:2600]]
    assert part["row"][:] == list(range(200))


def test_parquet_files_of_which_one_lacks_a_column(tmp_path):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    tools = [{"type": "function"}]
    pq.write_table(pa.Table.from_pylist([pair]), tmp_path / "train-00000-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist([pair | {"tools": json.dumps(tools)}]),
                   tmp_path / "train-00001-of-00002.parquet")
    assert load_preferences(tmp_path)["tools"][:] == [None, tools]


# --- what is made of them -------------------------------------------------------------------------


@pytest.fixture
def spilling(monkeypatch, tmp_path):
    """Everything goes to a file, in a cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(spooled, "_IN_MEMORY", -1)
    monkeypatch.setattr(spooled, "_CHUNK", 4)
    return tmp_path / "cache/qadapter/pairs"


def test_pairs_beyond_the_memory_are_mapped(spilling):
    expected = [{"prompt": [{"role": "user", "content": f"u{i}"}],
                 "chosen": [{"role": "assistant", "content": "a", "x": i}],
                 "rejected": [{"role": "assistant", "content": "b"}]} for i in range(11)]
    found, others = as_preferences(expected), as_preferences(ROWS)
    assert len(found.cache_files) == len(others.cache_files) == 1
    assert {Path(x["filename"]).parent.parent for x in found.cache_files} == {spilling}
    assert [{k: row[k] for k in expected[0]} for row in found] == expected
    assert others["prompt"][:] == [row["prompt"] for row in ROWS]


@pytest.mark.slow
def test_the_file_goes_with_its_process(spilling):
    script = (
        "import sys; from qadapter.data import as_preferences, spooled\n"
        "spooled._IN_MEMORY = -1\n"
        "pairs = as_preferences([{'prompt': 'p', 'chosen': 'a', 'rejected': 'b'}])\n"
        "print(pairs.cache_files[0]['filename'], pairs[0]['chosen'], flush=True)\n"
        "import os, signal\n"
        "if sys.argv[1] == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
    )

    def run(how):
        done = subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True)
        assert done.stdout.endswith(" a\n"), done.stderr
        return Path(done.stdout.split()[0])

    assert run("killed").exists() and len(list(spilling.iterdir())) == 1
    assert not run("ended").exists() and not list(spilling.iterdir())


def test_without_a_place_for_the_file_they_stay_in_memory(spilling, caplog):
    spilling.parent.parent.parent.joinpath("cache").write_text("")
    found = as_preferences(ROWS)
    assert found["prompt"][:] == [row["prompt"] for row in ROWS] and not found.cache_files
    assert caplog.text.count("stays in memory") == 1


def test_a_full_disk_is_one_line(spilling, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spooled.ArrowWriter, "write_table", full)
    with pytest.raises(QAdapterError, match=r"No space left on device.*XDG_CACHE_HOME"):
        as_preferences(ROWS)


def test_columns_are_measured_over_pieces_and_selections():
    data = Dataset.from_dict({"x": [[True] * (i % 4) + [False] * (i % 3) for i in range(9000)]})
    expected = [(i % 4 + i % 3, i % 4) for i in range(9000)]
    order = [8999, 0, 5, 4096]
    for dataset, wanted in ((data, expected), (data.select(order), [expected[i] for i in order]),
                            (data.select([]), [])):
        found = zip(list_lengths(dataset, "x"), list_sums(dataset, "x"), strict=True)
        assert [tuple(map(int, x)) for x in found] == wanted
    assert list_lengths(data, "x").dtype == np.int64


def test_splits_are_those_that_they_were():
    """Which prompts a seed holds out does not change with how they are kept in memory."""
    data = Dataset.from_dict({"prompt_id": [f"{i * 7919 % 40:04x}" for i in range(100)]})
    prompts = sorted(set(data["prompt_id"]))
    random.Random(3).shuffle(prompts)
    parts = split_by_prompt(data, (0.25, 6), seed=3)
    held_out = [set(part["prompt_id"]) for part in parts[1:]]
    assert held_out == [set(prompts[:10]), set(prompts[10:16])]
    assert len(without_prompts(data, parts[1]["prompt_id"])) == 100 - len(parts[1])
    assert without_prompts(data, []).num_rows == 100
