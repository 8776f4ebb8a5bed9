"""Whatever holds rows in memory gives the same pairs."""

import collections

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from tiny import llama3

from qadapter.data import as_preferences, tokenize_preferences
from qadapter.errors import QAdapterError

ROWS = [
    {"id": 1, "prompt": "Why?", "chosen": " So.", "rejected": " No."},
    {"id": 2, "prompt": "Who?", "chosen": " I.", "rejected": None},
]
TEXTS = ("prompt", "chosen", "rejected")


class MapStyle(torch.utils.data.Dataset):
    """As Torch's are: its `__getitem__` never ends an iteration."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index % len(self.rows)]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(ROWS)


class SpeaksArrow:
    """As polars' frames and duckdb's relations do."""

    def __arrow_c_stream__(self, requested_schema=None):
        return pa.Table.from_pylist(ROWS).__arrow_c_stream__(requested_schema)


COLUMNS = {key: [row[key] for row in ROWS] for key in ROWS[0]}
HOLDERS = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "generator": lambda: (row for row in ROWS),
    "ordered dicts": lambda: [collections.OrderedDict(row) for row in ROWS],
    "dict of columns": lambda: COLUMNS,
    "dict of arrays": lambda: {k: np.array(v, dtype=object) for k, v in COLUMNS.items()},
    "Dataset": lambda: Dataset.from_list(ROWS),
    "Dataset in torch's format": lambda: Dataset.from_list(ROWS).with_format("torch"),
    "Dataset of which some are selected": lambda: Dataset.from_list(ROWS * 2).select([2, 1]),
    "IterableDataset": lambda: Dataset.from_list(ROWS).to_iterable_dataset(),
    "IterableDataset without features": lambda: IterableDataset.from_generator(lambda: iter(ROWS)),
    "Arrow table": lambda: pa.Table.from_pylist(ROWS),
    "Arrow batches": lambda: pa.Table.from_pylist(ROWS).to_reader(),
    "speaks Arrow": SpeaksArrow,
    "pandas": lambda: pd.DataFrame(ROWS),
    "pandas with an index": lambda: pd.DataFrame(ROWS).set_index("id"),
    "pandas of objects": lambda: pd.DataFrame(ROWS).astype(object),
    "pandas with NaN": lambda: pd.DataFrame(ROWS).astype(object).fillna(float("nan")),
    "pandas with a mixed column": lambda: pd.DataFrame(ROWS).assign(meta=[{"a": 1}, "x"]),
    "torch": lambda: MapStyle(ROWS),
    "torch subset": lambda: torch.utils.data.Subset(MapStyle(ROWS), [0, 1]),
    "torch stream": Stream,
}


@pytest.mark.parametrize("make", HOLDERS.values(), ids=HOLDERS)
def test_holders_of_rows_read_alike(make):
    pairs = as_preferences(make())
    assert list(pairs["problem"]) == [None, "missing_value: rejected"]
    assert [pairs[0][key] for key in TEXTS] == [ROWS[0][key] for key in TEXTS]
    assert list(pairs["row"]) == [0, 1]


MESSAGES = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": [{"role": "assistant", "content": "So."}],
    "rejected": [{"role": "assistant", "content": "No.", "name": "x"}],
}


@pytest.mark.parametrize("make", [
    lambda rows: pd.DataFrame(rows),
    lambda rows: pd.DataFrame([{k: np.array(v, dtype=object) for k, v in r.items()} for r in rows]),
    lambda rows: {k: tuple(tuple(r[k]) for r in rows) for k in rows[0]},
    lambda rows: pa.Table.from_pylist(rows),
])
def test_messages_in_frames_and_columns(make):
    pairs = as_preferences(make([MESSAGES, MESSAGES]))
    assert [pairs[1][key] for key in TEXTS] == list(MESSAGES.values())


@pytest.mark.parametrize("ids", [
    lambda ids: np.array(ids), lambda ids: np.array(ids, dtype=np.uint16), torch.tensor, tuple,
    lambda ids: [np.int64(i) for i in ids],
])
def test_token_ids_of_any_integer_type(ids):
    row = {"prompt_ids": ids([5, 6]), "chosen_ids": ids([7]), "rejected_ids": ids([8, 9])}
    pairs = as_preferences([row | {"chosen_mask": np.array([True]), "rejected_mask": ids([0, 1])}])
    assert pairs[0]["rejected_ids"] == [8, 9] and pairs[0]["rejected_mask"] == [False, True]
    assert pairs[0]["problem"] is None


def test_numpy_strings():
    pairs = as_preferences({key: np.array([f"{key} a", f"{key} b"]) for key in TEXTS})
    assert list(pairs["prompt"]) == ["prompt a", "prompt b"]


@pytest.mark.parametrize(("data", "words"), [
    (DatasetDict(a=Dataset.from_list(ROWS), b=Dataset.from_list(ROWS)), ["splits a, b", "choose"]),
    (IterableDatasetDict(a=Dataset.from_list(ROWS).to_iterable_dataset()), ["splits a"]),
    ({"train": ROWS, "test": ROWS}, ["splits train, test"]),
    ({"train": pd.DataFrame(ROWS)}, ["splits train"]),
    (ROWS[0], ["'id' is a int", "one row alone goes into a list"]),
    ({"prompt": ["a"], "chosen": ["b", "c"], "rejected": ["d"]}, ["prompt 1, chosen 2"]),
    ("pairs.jsonl", ["'pairs.jsonl'", "load_preferences"]),
    ([["a", "b"]], ["row 0 is a list"]),
    (["a"], ["row 0 is a str"]),
    (None, ["NoneType"]),
    (7, ["a int, not rows"]),
    (lambda: ROWS, ["call it"]),
    ([], ["no rows"]),
    ({}, ["no rows"]),
    (pd.DataFrame(), ["no rows"]),
    ([{7: "a", "chosen": "b"}], ["columns 7, chosen"]),
    ([{"cut \ud83d": "a"}], ["columns cut \\ud83d"]),
])
def test_what_holds_no_rows_is_named(data, words):
    with pytest.raises(QAdapterError) as caught:
        as_preferences(data)
    assert all(word in str(caught.value) for word in words), str(caught.value)


HALF = "cut \ud83d"


@pytest.mark.parametrize("row", [
    {"prompt": HALF, "chosen": "a", "rejected": "b"},
    {"prompt": "p", "chosen": "a", "rejected": HALF},
    {"prompt": MESSAGES["prompt"], "chosen": HALF, "rejected": "b"},
    MESSAGES | {"prompt": [{"role": "user", "content": HALF}]},
    MESSAGES | {"prompt": [{"role": HALF, "content": "p"}]},
    MESSAGES | {"chosen": [{"role": "assistant", "content": "a", HALF: "x"}]},
    MESSAGES | {"chosen": [{"role": "assistant", "content": "", "tool_calls": [{"name": HALF}]}]},
    MESSAGES | {"tools": [{"name": HALF}]},
    MESSAGES | {"tools": '[{"name": "\\ud83d"}]'},
    MESSAGES | {"chat_template_kwargs": {"style": HALF}},
    {"chosen": "\n\nHuman: a\n\nAssistant: " + HALF, "rejected": "\n\nHuman: a\n\nAssistant: b"},
    {"chosen": "Sky? blue " + HALF, "rejected": "Sky? red"},
])
@pytest.mark.parametrize("frame", [False, True])
def test_half_a_surrogate_pair_costs_its_row_alone(row, frame):
    good = {
        "prompt": "Sky?", "chosen": "Sky? blue", "rejected": "Sky? red",
    } if isinstance(row["chosen"], str) and isinstance(row.get("prompt", ""), str) else MESSAGES
    if "prompt" not in row:
        good = {key: row[key].replace(HALF, "c") for key in ("chosen", "rejected")}
    rows = [good, row, good]
    pairs = as_preferences(pd.DataFrame(rows, dtype=object) if frame else rows)
    assert [problem is None for problem in pairs["problem"]] == [True, False, True]
    assert pairs[1]["problem"].startswith("wrong_type") and "surrogate" in pairs[1]["problem"]
    report = tokenize_preferences(pairs, llama3()).report
    assert report.dropped == {"wrong_type": 1}


@pytest.mark.parametrize("message", [{7: "x"}, {"made_by": object()}, {"when": {"a", "b"}}])
def test_what_is_no_json_in_a_message_costs_its_row_alone(message):
    row = MESSAGES | {"prompt": [MESSAGES["prompt"][0] | message]}
    problems = as_preferences([MESSAGES, row])["problem"]
    assert problems[0] is None and problems[1].startswith(("wrong_type", "bad_messages"))


def test_half_a_surrogate_pair_in_a_column_nobody_asked_for():
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "note": HALF}]
    assert as_preferences(rows)[0]["problem"] is None
