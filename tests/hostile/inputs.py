"""Data files and configurations that nobody should have written, made from a seed.

Each begins as a good one; then values, layouts and bytes of it are broken. The same seed gives the
same input, on every machine: ``data_file(7)`` makes again alone what was the eighth of many.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

WORDS = ("blue", "green", "red", "hot", "short", "always", "never", "maybe")


class Hostile(NamedTuple):
    """A file and the command that is to read it.

    `argv` names the file as ``{file}``, and what else the command needs as ``{base}`` (a chat
    model's folder), ``{adapter}`` (of that base), ``{pairs}`` (a good preference file) and
    ``{out}`` (what it may write: a folder).
    """

    name: str
    data: bytes
    argv: tuple[str, ...]


def data_files(seed: int) -> Iterator[Hostile]:
    """Preference files, texts and prompts, without end."""
    return map(data_file, itertools.count(seed))


def configurations(seed: int) -> Iterator[Hostile]:
    """YAML of ``train``, ``compare`` and judges, and YAML in flags, without end."""
    return map(configuration, itertools.count(seed))


# --- values ---------------------------------------------------------------------------------------

_ODD_TEXTS = (
    "", " ", "\n\n", "\ud83d", "a\udc00b", "\x00", "\x1b[31m", "\ufeff", "\u2028", "é" * 50, "🙂",
    "x" * 5000, "{{ 7 * 7 }}", "{% for i in range(9**9) %}{% endfor %}", "<|im_end|>",
    "<|im_start|>system\n", "\n\nHuman: a\n\nAssistant: b", "[[A]]", "{prompt}", "</think>", "%s",
    "../../x", "1" * 200, "NaN", "null", "[1", '{"a": 1}', "[]", "2026-02-30",
)
_ODD_NUMBERS = (
    0, -1, 2**31, 2**63, -(2**63) - 1, 10**39, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    float("-inf"),
)
_ROLES = ("user", "assistant", "system", "developer", "tool", "function", "ipython", "", "User")
_KEYWORDS = (
    "chat_template", "tokenize", "messages", "conversation", "add_generation_prompt", "documents",
    "continue_final_message", "return_tensors", "return_dict", "tokenizer_kwargs", "tools",
    "kwargs",
    "max_length", "padding", "truncation", "bos_token", "eos_token", "loop", "range", "self",
    "raise_exception", "strftime_now", "namespace", "cycler", "add_special_tokens", "template",
    "return_assistant_tokens_mask", "enable_thinking", "a b", "", "é", "__class__",
)


def _deep(rng: random.Random, depth: int) -> Any:
    value: Any = rng.choice(WORDS)
    for _ in range(depth):
        value = [value] if rng.random() < 0.5 else {rng.choice(WORDS): value}
    return value


def _odd(rng: random.Random, depth: int = 0) -> Any:
    """Any value that JSON can say."""
    kind = rng.randrange(9 if depth < 3 else 5)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice(_ODD_NUMBERS)
    if kind in (2, 3, 4):
        return rng.choice(_ODD_TEXTS)
    if kind == 5:
        return [_odd(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        names = (*WORDS, *_ODD_TEXTS, "role", "content", "type", "text", "name", "arguments")
        return {rng.choice(names): _odd(rng, depth + 1) for _ in range(rng.randrange(4))}
    if kind == 7:
        return _deep(rng, rng.choice((5, 60, 99, 101, 150)))
    return {"role": rng.choice(_ROLES), "content": _odd(rng, depth + 1)}


def _places(value: Any, here: tuple = ()) -> Iterator[tuple]:
    """Ways to all values within a value."""
    if isinstance(value, dict | list) and len(here) < 8:
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield (*here, key)
            yield from _places(value[key], (*here, key))


def _break(rng: random.Random, value: Any) -> None:
    """Change something somewhere in a dict or list, in place."""
    places = list(_places(value))
    if not places:
        return
    *way, last = rng.choice(places)
    for key in way:
        value = value[key]
    change = rng.randrange(5)
    if change == 0:
        del value[last]
    elif change == 1 and isinstance(value, list):
        value.insert(last, _odd(rng))
    elif change == 1:
        value[rng.choice(WORDS + _ODD_TEXTS)] = value[last]
    else:
        value[last] = _odd(rng)


# --- preference files -----------------------------------------------------------------------------


def _say(rng: random.Random, least: int = 1, most: int = 8) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def _turns(rng: random.Random, count: int) -> list[dict[str, Any]]:
    turns = []
    for i in range(count):
        turn: dict[str, Any] = {"role": ("user", "assistant")[i % 2], "content": _say(rng)}
        if rng.random() < 0.1:
            turn["content"] = [{"type": "text", "text": turn["content"]}]
        if i % 2 and rng.random() < 0.1:
            arguments = rng.choice(({"x": 1}, '{"x": 1}', "", "[", "[" * 9, "9" * 5000, "[" * 9999))
            call = {"name": "look", "arguments": arguments}
            turn["tool_calls"] = [{"type": "function", "function": call}]
        turns.append(turn)
    return turns


def _row(rng: random.Random, kind: str) -> dict[str, Any]:
    if kind == "text":
        return {"prompt": _say(rng), "chosen": " " + _say(rng), "rejected": " " + _say(rng)}
    if kind == "transcripts":
        start = f"\n\nHuman: {_say(rng)}\n\nAssistant:"
        return {"chosen": f"{start} {_say(rng)}", "rejected": f"{start} {_say(rng)}"}
    if kind == "responses":
        return {"query": _say(rng), "responses": {name: _say(rng) for name in "abc"}}
    if kind == "ids":
        return {
            f"{name}_ids": [rng.randrange(3, 500) for _ in range(rng.randint(1, 9))]
            for name in ("prompt", "chosen", "rejected")
        }
    prompt = _turns(rng, rng.choice((1, 1, 3)))
    sides = {side: [{"role": "assistant", "content": _say(rng)}] for side in ("chosen", "rejected")}
    if kind == "turns":
        sides = {side: _turns(rng, 4)[1:] for side in sides}
    if kind == "implicit":
        return {side: prompt + turns for side, turns in sides.items()}
    row = {"prompt": prompt, **sides}
    if rng.random() < 0.3:
        row["tools"] = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    if rng.random() < 0.3:
        row["chat_template_kwargs"] = {rng.choice(_KEYWORDS): _odd(rng)}
    return row


_KINDS = ("text", "messages", "messages", "implicit", "turns", "transcripts", "responses", "ids")


def data_file(seed: int) -> Hostile:
    """One file, of preferences more often than of texts or prompts."""
    rng = random.Random(f"data {seed}")
    use = rng.choice(("pairs", "pairs", "pairs", "pairs", "texts", "prompts"))
    if use != "pairs":
        return _lines_file(rng, use)
    kind = rng.choice(_KINDS)
    rows: list[Any] = [_row(rng, kind) for _ in range(rng.choice((1, 2, 8, 20)))]
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        _break(rng, rows)
    argv = ["train", "--model_name_or_path", "{base}", "--dataset_name", "{file}",
            "--output_dir", "{out}", "--max_steps", "1", "--adapter_rank", "2",
            "--answer_prompts", "0", "--bootstrap_resamples", "5"]
    if kind == "responses":
        argv += ["--domain", rng.choice("abz")]
    if rng.random() < 0.1:
        argv += ["--columns", json.dumps({"prompt": rng.choice(("chosen", "x", "query"))})]
    if rng.random() < 0.1:
        argv += ["--max_rows", str(rng.choice((0, 1, 10**12)))]
    if rng.random() < 0.3:
        return Hostile(f"{seed}.parquet", _break_bytes(rng, _parquet(rng, rows), 0.1), tuple(argv))
    listed = rng.random() < 0.3
    text = json.dumps(rows) if listed else "\n".join(json.dumps(row) for row in rows) + "\n"
    text = _break_json(rng, text)
    return _zipped(rng, f"{seed}.json" if listed else f"{seed}.jsonl", _encode(rng, text), argv)


def _lines_file(rng: random.Random, use: str) -> Hostile:
    suffix = rng.choice((".txt", ".jsonl", ".jsonl"))
    key = "text" if use == "texts" else "prompt"
    lines = []
    for _ in range(rng.choice((0, 1, 3, 8))):
        value = _say(rng) if use == "texts" or rng.random() < 0.5 else _turns(rng, 3)
        row = {key: value}
        if rng.random() < 0.2:
            row["chat_template_kwargs"] = {rng.choice(_KEYWORDS): _odd(rng)}
        if rng.random() < 0.3:
            _break(rng, row)
        lines.append(_say(rng) if suffix == ".txt" else json.dumps(row))
    if rng.random() < 0.3:
        lines.append(rng.choice(_ODD_TEXTS))
    argv = (
        ["eval", "--model_name_or_path", "{adapter}", "--dataset_name", "{pairs}",
         "--retention_file", "{file}", "--answer_prompts", "0", "--bootstrap_resamples", "5",
         "--output_dir", "{out}"]
        if use == "texts" else
        ["generate", "--model_name_or_path", "{adapter}", "--prompts_file", "{file}",
         "--max_new_tokens", "2", "--do_sample", "false"]
    )
    text = _break_json(rng, "\n".join(lines) + "\n")
    return _zipped(rng, f"{use}{suffix}", _encode(rng, text), argv)


def _break_json(rng: random.Random, text: str) -> str:
    """Now and then, with what no writer of JSON writes."""
    if rng.random() > 0.25:
        return text
    odd = rng.choice((
        "[" * 2000, "[" * 200_000, '{"a":' * 5000, "9" * 5000, "-" + "9" * 60, "1e9999", "NaN",
        "Infinity", '"\\ud83d"', "\\", "\\u12", "'", ",", "\t", "\r", "\x0b", "{", "}", "]", '"',
        "//", "[" * 120 + "]" * 120, '{"prompt":1,"prompt":2}', "\ufeff", "null", "true",
    ))
    at = rng.randrange(len(text) + 1)
    if rng.random() < 0.5:  # in place of a value
        at = text.find(":", at) + 1
        end = next((i for i in range(at, len(text)) if text[i] in ",}\n"), len(text))
        return text[:at] + odd + text[end:]
    return text[:at] + odd + text[at:]


def _encode(rng: random.Random, text: str) -> bytes:
    encoding = rng.choice(
        ("utf-8",) * 8 + ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1")
    )
    if rng.random() < 0.1:
        text = text.replace("\n", rng.choice(("\r\n", "\r", "\u2028", "\n\n")))
    try:
        return text.encode(encoding)
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _break_bytes(rng: random.Random, data: bytes, chance: float) -> bytes:
    if rng.random() > chance or not data:
        return data
    at, how = rng.randrange(len(data)), rng.randrange(5)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if how == 2:
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    if how == 3:
        return data[:at] + rng.randbytes(16) + data[at:]
    return data + rng.randbytes(8)


def _zipped(rng: random.Random, name: str, data: bytes, argv: list[str]) -> Hostile:
    data = _break_bytes(rng, data, 0.15)
    if rng.random() < 0.2:
        if rng.random() < 0.1:
            data += b" " * rng.choice((10**6, 10**8))
        name, data = f"{name}.gz", gzip.compress(data, mtime=0)
        data = _break_bytes(rng, data, 0.3)
    return Hostile(name, data, tuple(argv))


# --- Parquet --------------------------------------------------------------------------------------

_MEDIA = (
    {"_type": "Image"}, {"_type": "Image", "decode": False}, {"_type": "Audio"},
    {"_type": "Video"}, {"_type": "Pdf"}, {"_type": "Nifti"}, {"_type": "Mesh"}, {"_type": "No"},
    {"_type": "ClassLabel", "names": ["a"]}, {"_type": "Value", "dtype": "no"}, {"_type": "Json"},
    {"_type": "Array2D", "shape": [10**9, 10**9], "dtype": "int8"}, {"_type": "Translation"}, 7,
    {"_type": "List", "feature": {"_type": "Image"}}, {"_type": "LargeList"}, [], {}, None, "x",
)


def _parquet(rng: random.Random, rows: list[Any]) -> bytes:
    """A table of the rows, as far as Arrow takes them, under metadata that may lie."""
    try:
        table = pa.Table.from_pylist(rows)
    except (pa.ArrowException, ValueError, TypeError, AttributeError, OverflowError):
        rows = [
            {str(text).encode("utf-8", "replace").decode(): str(value).encode("utf-8", "replace")
             for text, value in row.items()} for row in rows if isinstance(row, dict)
        ]
        table = pa.Table.from_pylist(rows)
    for _ in range(rng.choice((0, 0, 1, 2))):
        table = _odd_table(rng, table)
    out = io.BytesIO()
    try:
        pq.write_table(table, out, row_group_size=rng.choice((1, 3, 1000)),
                       compression=rng.choice(("none", "snappy", "zstd")))
    except (pa.ArrowException, ValueError):
        pq.write_table(table.select([]), out)
    return out.getvalue()


def _odd_table(rng: random.Random, table: pa.Table) -> pa.Table:
    name = rng.choice(table.column_names or ["chosen"])
    change, count = rng.randrange(6), len(table)
    if change == 0:
        features = {column: {"dtype": "string", "_type": "Value"} for column in table.column_names}
        features[name] = rng.choice(_MEDIA)
        info = {"info": {"features": features}}
        text = rng.choice((*[json.dumps(info)] * 8, "[" * 5000, "{", "null", "[]"))
        return table.replace_schema_metadata({"huggingface": text})
    if change == 1:
        table = table.append_column("x", pa.array(["/etc/hostname"] * count))
        info = {"info": {"features": {"x": rng.choice(_MEDIA)}}}
        return table.replace_schema_metadata({"huggingface": json.dumps(info)})
    if change == 2 and name in table.column_names:
        kind = rng.choice((
            pa.binary(), pa.large_string(), pa.null(), pa.dictionary(pa.int32(), pa.string()),
            pa.int64(), pa.float16(), pa.timestamp("ns"), pa.decimal128(38, 5), pa.bool_(),
            pa.list_(pa.string()), pa.map_(pa.string(), pa.string()), pa.string_view(),
            pa.struct({"content": pa.int8()}), pa.duration("s"),
        ))
        at = table.column_names.index(name)
        return table.set_column(at, name, pa.nulls(count, kind))
    if change == 3:
        return table.slice(0, 0)
    if change == 4:
        return table.append_column(rng.choice((name, "", "\x00", "a.b", "prompt")),
                                   pa.array(["x"] * count))
    kept = [number for number, column in enumerate(table.column_names) if column != name]
    return table.select(kept)


# --- configurations -------------------------------------------------------------------------------

_TRAIN_KEYS = (
    "learning_rate", "adapter_rank", "adapter_kind", "lora_r", "lora_alpha", "lora_layers",
    "alpha_0", "alpha_tilde", "gamma", "num_train_epochs", "per_device_train_batch_size",
    "max_length", "seed", "columns", "domain", "rejected_domains", "lr_scheduler_type",
    "lr_scheduler_kwargs", "optim", "optim_args", "logging_steps", "save_steps", "save_strategy",
    "eval_strategy", "warmup_steps", "bootstrap", "retention_coef", "retention_states",
    "test_fraction", "truncation_mode", "dtype", "on_bad_row", "model_init_kwargs",
    "gradient_checkpointing_kwargs", "accelerator_config", "workspace_mb", "feature_shard_mb",
    "cache_features", "dataset_num_proc", "measure_batch_size", "chat_template", "max_grad_norm",
    "weight_decay", "adam_beta1", "bf16", "fp16", "no_such_key", "pad_to_multiple_of", "chi2_coef",
    "mask_alignment", "length_normalization", "max_rows", "dataset_train_split", "dataset_config",
    "retention_file", "adapter_form", "report_to",
)


def configuration(seed: int) -> Hostile:
    """One file, or a flag that is read as YAML."""
    rng = random.Random(f"configuration {seed}")
    use = rng.choice(("train", "train", "train", "compare", "compare", "judge", "flag"))
    train = ["train", "--model_name_or_path", "{base}", "--dataset_name", "{pairs}",
             "--output_dir", "{out}", "--max_steps", "1", "--answer_prompts", "0",
             "--bootstrap_resamples", "5"]
    if use == "flag":
        flag = rng.choice((
            "columns", "model_init_kwargs", "rejected_domains", "lr_scheduler_kwargs", "seed",
            "learning_rate", "adapter_rank", "max_length", "dtype",
        ))
        text = _yaml(rng, _odd(rng)) if rng.random() < 0.5 else rng.choice(_ODD_YAML)
        text = text.replace("\0", "").encode("utf-8", "replace").decode()[:20_000]
        return Hostile("unused", b"", (*train, f"--{flag}={text}"))
    if use == "train":
        value: Any = {key: _near(rng) for key in rng.sample(_TRAIN_KEYS, rng.randint(1, 5))}
        argv = [*train, "--config", "{file}"]
    elif use == "compare":
        value = _comparison(rng)
        argv = ["compare", "{file}", "--output_dir", "{out}"]
    else:
        value = {
            "system": "s", "user": "{prompt} {answer_a} {answer_b}", "verdict": r"\[\[(A|B)\]\]",
            "first": "A", "second": "B", "tie": "T", "request": {"temperature": 0},
        }
        if rng.random() < 0.3:
            value["verdict"] = rng.choice(_PATTERNS)
        argv = ["judge", "--model_name_or_path", "{adapter}", "--dataset_name", "{pairs}",
                "--output_dir", "{out}", "--judge_model", "m", "--judge_url",
                "http://127.0.0.1:9/v1", "--judge_prompt_file", "{file}", "--num_prompts", "1",
                "--draws", "1", "--max_new_tokens", "2"]
    for _ in range(rng.choice((0, 1, 1, 2, 4)) if use != "train" else rng.choice((0, 0, 1))):
        _break(rng, value)
    text = _yaml(rng, value)
    if rng.random() < 0.2:
        at = text.find("\n", rng.randrange(len(text) + 1)) + 1
        text = text[:at] + rng.choice(("", "k: ")) + rng.choice(_ODD_YAML) + "\n" + text[at:]
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        data = _break_bytes(rng, _encode(rng, text), 0.5)
    return Hostile(f"{use}.yaml", data, tuple(argv))


def _near(rng: random.Random) -> Any:
    """What an option may be, or about that."""
    if rng.random() < 0.4:
        return _odd(rng)
    return rng.choice((
        0, 1, 2, 3, 0.5, 1e-3, "1e-3", "2", "none", "auto", "true", True, None, -1, "steps", "head",
        "lora", "linear", "mlp", "drop", "float32", "cosine", {}, [], {"a": 1}, [1], "constant",
        10**9, 2**31, 2**40, "adamw_torch", ".inf", "é",
    ))


def _comparison(rng: random.Random) -> dict[str, Any]:
    part = {"max_length": 64, "train": 4, "validation": 2, "test": 2, "judge": 4}
    return {
        "model_name_or_path": "{base}", "title": "t", "seeds": [0],
        "data": {"dataset_name": "{pairs}", **part}, "old": {"dataset_name": "{pairs}", **part},
        "adapter": {"kind": "head", "rank": 2}, "training": {"learning_rate": 0.01},
        "methods": {
            "sft": {"method": "sft"}, "dpo": {"method": "dpo", "beta": 0.3},
            "q": {"method": "q_adapter", "alpha_0": 0.3, "alpha_tilde": 0.3},
        },
        "sweeps": {"s": {"of": "q", "option": "alpha", "values": [0.3, 1.0]}},
        "evaluation": {"prompts": 1, "retention": [{"name": "t", "file": "{pairs}"}]},
    }


_PATTERNS = (
    "(a+)+$", "(", "(?P<a", "[", "(A)(B)", "", "(" * 200 + ")" * 200, "(a{1,9999}){1,9999}",
    "(?<=a+)b", "(" * 5000, "\\", "(.*)*(.*)*(.*)*x", "(\ud83d)", "(?i:(A))",
    "a{99999999999999999999}",
)
_ODD_YAML = (
    "&a [*a]", "&a {b: *a}", "*no", "!!python/object/apply:os.system [true]", "!x y", "!!int x",
    "!!binary '####'", "!!timestamp 2026-99-99", "2026-13-45", "2026-01-01", "0x" + "f" * 5000,
    "9" * 5000, "1:" * 3000 + "1", "1" + ":59" * 500 + ".5", "[" * 3000, "{a: " * 3000, "- " * 3000,
    "? " * 500, "<<: 5", "<<: {a: 1}", "{<<: [{a: 1}, 2]}", '"\\ud83d"', '"\\UFFFFFFFF"',
    "%YAML 3.0",
    "--- a\n--- b", "...", "\t", "'", '"', "a: b: c", "a: 1\na: 2", "1: 1\n0x1: 1", "? [a]\n: b",
    "{[1]: 2}", "{1: 2, true: 3}", "=", "~", ".nan", "-.inf", "yes", "\x07", "\x85", "@",
    "`", "|", ">",
    "[" + "&a x," * 50 + "]", "[&a [x,x,x,x,x,x,x,x], " + ", ".join(
        f"&b{i} [{', '.join(['*' + ('a' if i == 0 else f'b{i - 1}')] * 8)}]" for i in range(12)
    ) + "]",
    "{a: &a {k: 1}" + "".join(
        f", b{i}: &b{i} {{<<: [{', '.join(['*' + ('a' if i == 0 else f'b{i - 1}')] * 2)}]}}"
        for i in range(26)
    ) + "}",
)


def _yaml(rng: random.Random, value: Any) -> str:
    """JSON is YAML, but for what it escapes as halves of surrogate pairs."""
    indent = rng.choice((None, 1))
    if not isinstance(value, dict) or indent is None:
        return json.dumps(value)
    return "".join(f"{json.dumps(key)}: {json.dumps(item)}\n" for key, item in value.items())
