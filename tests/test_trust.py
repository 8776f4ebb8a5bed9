"""SECURITY.md, line by line: what strangers' files can't do."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hostile.strangers import AUTO_MAP, Mark, litter, name_code, watching, write_pickle
from tiny_models import (
    cli,
    preference_rows,
    save_tiny,
    tiny_llama,
    write_jsonl,
)

from qadapter import AdapterConfig, QAdapterModel
from qadapter.trunk.loading import load_tokenizer

PAGE = Path(__file__).parents[1] / "SECURITY.md"
FREE = ("What nothing here protects from", "Reporting")
"""Sections that promise nothing."""
held: dict[str, str] = {}


def holds(*beginnings: str) -> Callable:
    """The test holds the lines of SECURITY.md that begin so."""
    def note(test: Callable) -> Callable:
        held.update(dict.fromkeys(beginnings, test.__name__))
        return test

    return note


def lines_of_the_page() -> list[str]:
    """What it promises, without marks of Markdown."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = []
    for section in sections:
        name, text = section.split("\n", 1)
        if name not in FREE:
            found += [" ".join(item.split()) for item in re.split(r"^- ", text, flags=re.M)[1:]]
    return [line.replace("`", "") for line in found]


def test_every_line_of_the_page_is_held():
    lines = lines_of_the_page()
    assert len(lines) > 15
    for line in lines:
        assert [b for b in held if line.startswith(b)], f"no test holds: {line}"
    for beginning in held:
        assert [line for line in lines if line.startswith(beginning)], f"not there: {beginning}"


# --- the server -----------------------------------------------------------------------------------


def asked_of(guard, path="/v1/models", method="GET", **headers):
    """The status that a guard answers with, and its headers; 200 is what stands behind it."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": method, "path": path,
        "headers": [
            (name.replace("_", "-").encode(), value.encode())
            for name, value in ({"host": "127.0.0.1:8000"} | headers).items()
        ],
    }
    asyncio.run(guard(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


def guarded(key=None, host="127.0.0.1"):
    from qadapter.serving.guard import Guard

    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    return Guard(application, host, key, lambda: False)


@holds("qadapter serve listens on this machine alone")
def test_another_host_needs_a_key(tmp_path, capsys):
    assert cli("serve", tmp_path, "--host", "0.0.0.0") == 2
    assert "give --api_key_file" in capsys.readouterr().err
    guard = guarded("0123456789abcdef", "0.0.0.0")
    for path, open_to_all in (("/", True), ("/health", True), ("/v1/models", False),
                              ("//v1/models", False), ("/v1/chat/completions", False),
                              ("/health/", False), ("/anything", False)):
        assert (asked_of(guard, path)[0] == 200) is open_to_all, path
        assert asked_of(guard, path, authorization="Bearer 0123456789abcdef")[0] == 200
    for wrong in ("Bearer 0123456789abcde", "bearer", "0123456789abcdef", "Bearer  ", "Bearer é"):
        assert asked_of(guard, authorization=wrong)[0] == 401


@holds("Pages of other sites that a browser shows")
def test_pages_of_other_sites_cant_ask():
    guard, json_body = guarded(), {"content_type": "application/json; charset=utf-8"}
    ask = partial(asked_of, guard, "/v1/chat/completions", "POST")
    assert ask(**json_body, origin="http://127.0.0.1:8000")[0] == 200
    assert ask(**json_body, host="localhost:8000", origin="http://localhost:8000")[0] == 200
    assert ask(**json_body, host="[::1]:8000")[0] == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9000", "http://localhost:8000",
                   "http://127.0.0.1:8000.evil.example", "http://127.0.0.1:8000@evil.example"):
        status, headers = ask(**json_body, origin=origin)
        assert status == 403, origin
        assert not [name for name in headers if name.startswith(b"access-control")]
    for host in ("evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example", "[::1"):
        assert ask(**json_body, host=host)[0] == 403, host
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert ask(content_type=kind)[0] == 415
    assert asked_of(guard, "/v1/models", "OPTIONS", origin="http://evil.example")[0] == 403


@holds("The page at / fetches nothing but this server's answers")
def test_the_servers_page_is_held_by_its_policy():
    from qadapter.serving.page import page

    html, headers = page()
    policy = dict(
        part.partition(" ")[::2] for part in headers["Content-Security-Policy"].split("; ")
    )
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    [script] = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["script-src"] == f"'sha256-{digest}'"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|://", script)


@holds("A request's bytes, tokens and seconds are limited")
def test_a_request_is_limited(monkeypatch):
    from qadapter.serving import app, requests

    class Request:
        headers: typing.ClassVar = {}

        def __init__(self, parts, seconds=0.0):
            self.parts, self.seconds = parts, seconds

        async def stream(self):
            for _ in range(self.parts):
                await asyncio.sleep(self.seconds)
                yield b"[1, 2, 3, 4, 5] "

    def refused(work):
        with pytest.raises(requests.RequestError) as found:
            work()
        return found.value.status

    assert refused(lambda: asyncio.run(app._body(Request(10**9), 1000))) == 413
    monkeypatch.setattr(app, "_BODY_SECONDS", 0.05)
    assert refused(lambda: asyncio.run(app._body(Request(10, 1.0), 1000))) == 408
    assert refused(lambda: requests._most_tokens(100, None, None, 100)) == 400

    class Full:
        max_concurrency = 2

        def reserve(self, answers):
            raise app.Busy

    def reserve(answers):
        with app._reserved(Full(), answers):
            pass

    assert [refused(lambda n=n: reserve(n)) for n in (1, 3)] == [429, 400]


# --- the folders ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base and adapters on it, as strangers sent them, and data of one's own."""
    folder = tmp_path_factory.mktemp("trust")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    mark = Mark(folder / "marks")
    save_tiny(folder / "plain")
    save_tiny(folder / "base")
    for name, adapter in {
        "head": AdapterConfig(rank=4),
        "lora": peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    }.items():
        model = QAdapterModel.from_base(folder / "base", adapter)
        model.chat_template = (folder / "base" / "chat_template.jinja").read_text()
        model.save_pretrained(folder / name)
        litter(folder / name, mark)
    litter(folder / "base", mark)
    name_code(folder / "base")
    write_jsonl(folder / "pairs.jsonl", preference_rows(64))
    yield folder, mark
    patch.undo()


def stranger(world, tmp_path: Path, name: str = "plain", **files: dict | str) -> Path:
    """A copy of a folder, with other files: text as it is, a dictionary put into the JSON."""
    folder = shutil.copytree(world[0] / name, tmp_path / "stranger")
    for file, value in files.items():
        path = folder / file
        if isinstance(value, dict):
            path.write_text(json.dumps(json.loads(path.read_text()) | value))
        else:
            path.write_text(value)
    return folder


def ask(folder: Path, *more: object) -> int:
    return cli("generate", folder, "--prompt", "What is blue?", "--max_new_tokens", 2, *more)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }


def started(watch) -> list[str]:
    """Programs, but those by which libraries ask what fonts there are and what machine it is."""
    return [x for x in watch.programs if not re.search(r"'(fc-list|uname)'", x)]


READ = {
    "manifest.json", "qadapter_config.json", "adapter_config.json", "adapter_model.safetensors",
    "chat_template.jinja",
}


@pytest.mark.slow
@holds("A load opens manifest.json", "Where all that is named", "Nothing is written into folders",
       "No program is started")
@pytest.mark.parametrize("name", ["head", "lora"])
def test_commands_open_what_they_need_and_run_nothing(world, tmp_path, monkeypatch, name):
    folder, mark = world
    monkeypatch.chdir(folder / name)  # where a module of the folder would be found first
    pairs = ("--dataset_name", folder / "pairs.jsonl")
    before = digests(folder / name), digests(folder / "base"), digests(folder / "plain")
    with watching() as watch:
        assert ask(folder / name) == 0
        assert cli("eval", folder / name, *pairs, "--max_rows", 8, "--answer_prompts", 2,
                   "--answer_tokens", 2, "--output_dir", tmp_path / "eval") == 0
        assert cli("rewards", folder / name, *pairs, "--max_pairs", 2,
                   "--output_file", tmp_path / "rewards.html") == 0
        assert cli("judge", folder / name, *pairs, "--judge_fraction", 0.6, "--num_prompts", 2,
                   "--draws", 1, "--opponent_draws", 1, "--max_new_tokens", 2) == 0
    assert mark() == []
    assert watch.opened_in(folder / name) <= READ | {"."}
    assert {"adapter_model.safetensors", "manifest.json"} <= watch.opened_in(folder / name)
    assert not [file for file in watch.opened_in(folder / "base")
                if not file.endswith((".json", ".jinja", ".safetensors"))]
    assert started(watch) == [] and watch.connections == []
    assert before == (digests(folder / name), digests(folder / "base"), digests(folder / "plain"))


@pytest.mark.parametrize(("said", "off"), [(None, True), ("0", False)])
def test_nothing_is_counted_on_the_hub(said, off):
    """In a process of its own: libraries look when they are imported."""
    environment = {k: x for k, x in os.environ.items() if not k.endswith("TELEMETRY")}
    if said is not None:
        environment["HF_HUB_DISABLE_TELEMETRY"] = said
    code = (
        "from qadapter.commands import root; root.run(['--version'])\n"
        "from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                          text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(off)


@pytest.mark.slow
@holds("Exports hold no code")
def test_an_export_holds_none_of_it(world, tmp_path):
    folder, mark = world
    before = digests(folder / "head"), digests(folder / "base")
    with watching() as watch:
        assert cli("export", folder / "head", "--output_dir", tmp_path / "out") == 0
    kinds = {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert kinds <= {".json", ".jinja", ".safetensors", ".md"}
    for file in (tmp_path / "out").glob("*.json"):
        assert "evil" not in file.read_text()
    assert mark() == [] and watch.connections == []
    [program] = started(watch)
    assert "stock.py" in program
    assert before == (digests(folder / "head"), digests(folder / "base"))


@holds("An adapter without safetensors")
@pytest.mark.parametrize("name", ["head", "lora"])
def test_weights_in_a_pickle_are_not_read(world, tmp_path, capsys, name):
    path = stranger(world, tmp_path, name)
    (path / "adapter_model.safetensors").unlink()
    with watching() as watch:
        assert ask(path) == 2
    assert "adapter_model.safetensors is missing" in capsys.readouterr().err
    assert world[1]() == [] and "adapter_model.bin" not in watch.opened_in(path)


@holds("An adapter names its base")
def test_the_base_that_an_adapter_names_is_loaded_unless_another_is_given(world, tmp_path, capsys):
    folder = world[0]
    assert ask(folder / "head") == 0
    assert f"base: {folder / 'base'} " in capsys.readouterr().err.replace("\n", "")
    assert ask(folder / "head", "--base_model_name_or_path", folder / "plain") == 0
    assert f"base: {folder / 'plain'} " in capsys.readouterr().err.replace("\n", "")
    save_tiny(tmp_path / "other", seed=1)
    assert ask(folder / "head", "--base_model_name_or_path", tmp_path / "other") == 2


@holds("The digests in manifest.json")
def test_who_can_write_a_folder_can_write_its_digests(world, tmp_path, capsys):
    from qadapter.system import manifest

    path = stranger(world, tmp_path, "head")
    written = json.loads((path / "qadapter_config.json").read_text())
    written["objective"]["alpha_0"] = 0.5
    (path / "qadapter_config.json").write_text(json.dumps(written))
    assert ask(path) == 2
    assert "qadapter_config.json" in capsys.readouterr().err
    names = list(manifest.read(path / "manifest.json").files)
    manifest.write(path, names)
    assert ask(path) == 0


def rewritten(folder: Path, file: str, changes: dict) -> None:
    """Another value in a JSON file, and the manifest that goes with it."""
    from qadapter.system import manifest

    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    manifest.write(folder, list(manifest.read(folder / "manifest.json").files))


@holds("The adapters of a composition")
@pytest.mark.parametrize("how", ["../outside", "absolute", "link"])
def test_parts_of_a_composition_lie_inside_it(world, tmp_path, capsys, how):
    from qadapter.policy.composition import compose

    lora = QAdapterModel.from_pretrained(world[0] / "lora", world[0] / "plain")
    composed = tmp_path / "composed"
    compose([lora, lora], [0.5, 0.5]).save_pretrained(composed)
    assert ask(composed, "--base_model_name_or_path", world[0] / "plain") == 0
    shutil.copytree(composed / "adapter-0", tmp_path / "outside")
    if how == "link":
        shutil.rmtree(composed / "adapter-0")
        (composed / "adapter-0").symlink_to(tmp_path / "outside")
    else:
        name = how if how.startswith("..") else str(tmp_path / "outside")
        rewritten(composed, "qadapter_config.json", {
            "adapter": {"kind": "composition", "adapters": [name, "adapter-1"],
                        "weights": [0.5, 0.5]},
        })
    with watching() as watch:
        assert ask(composed, "--base_model_name_or_path", world[0] / "plain") == 2
    assert "composed" in capsys.readouterr().err
    weights = tmp_path / "outside" / "adapter_model.safetensors"
    assert how == "link" or str(weights) not in watch.opened


@holds("Nothing is made of a configuration")
@pytest.mark.parametrize(("name", "field", "value"), [
    ("head", "rank", 10**9), ("head", "rank", -1), ("lora", "r", 10**9),
    ("lora", "rank_pattern", {"q_proj": 10**9}), ("lora", "layer_replication", [[0, 10**9]]),
    ("lora", "megatron_core", "evil"),
])
def test_numbers_of_an_adapter_are_looked_at_first(
    world, tmp_path, capsys, monkeypatch, name, field, value
):
    path = stranger(world, tmp_path, name)
    monkeypatch.chdir(path)
    adapter = json.loads((path / "qadapter_config.json").read_text())["adapter"]
    if field == "megatron_core":
        adapter["megatron_config"] = {"tensor_model_parallel_size": 1}
    if name == "lora":
        rewritten(path, "adapter_config.json", {key: x for key, x in adapter.items()
                                                if key != "kind"} | {field: value})
    rewritten(path, "qadapter_config.json", {"adapter": adapter | {field: value}})
    assert ask(path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and world[1]() == []


@holds("Nothing is made of a configuration")
def test_a_regular_expression_is_ended(world, tmp_path, capsys, monkeypatch):
    from qadapter.adapters import peft_config

    assert peft_config.MAX_PATTERN_SECONDS == 10
    monkeypatch.setattr(peft_config, "MAX_PATTERN_SECONDS", 1)
    path = stranger(world, tmp_path, "lora")
    adapter = json.loads((path / "qadapter_config.json").read_text())["adapter"]
    endless = {"target_modules": r"(.*)*(.*)*(.*)*x"}
    rewritten(path, "adapter_config.json", endless)
    rewritten(path, "qadapter_config.json", {"adapter": adapter | endless})
    with watching() as watch:
        assert ask(path) == 2
    assert "takes more than 1 s" in capsys.readouterr().err
    assert all("python" in program for program in started(watch))


# --- bases ----------------------------------------------------------------------------------------


@holds("Code that comes with a base")
def test_code_of_a_base_runs_where_it_is_trusted_alone(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, _ = world
    mark = Mark(tmp_path / "marks")
    path = stranger(world, tmp_path, **{"config.json": {"auto_map": AUTO_MAP}})
    litter(path, mark, pickles=False)
    (path / "generation_config.json").write_text('{"custom_generate": "./custom_generate"}')
    assert ask(path) == 0 and mark() == []  # a Llama: transformers has its code
    for file, change in {
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": AUTO_MAP["AutoTokenizer"]},
                                  "tokenizer_class": "Tokenizer"},
        "config.json": {"model_type": "evil", "architectures": ["Evil"]},
    }.items():
        (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | change))
        with watching() as watch:
            assert ask(path) == 2
            assert cli("train", "--model_name_or_path", path, "--dataset_name",
                       folder / "pairs.jsonl", "--output_dir", tmp_path / "out") == 2
        assert "custom code" in capsys.readouterr().err
        assert mark() == [] and not [x for x in watch.opened if x.endswith("_evil.py")]
    assert ask(path, "--trust_remote_code", "true") == 2  # it ran, and is no model
    assert "configuration_evil.py" in mark()


@holds("Attention kernels of the hub")
@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_kernels_that_a_configuration_names_are_not_fetched(world, tmp_path, capsys, field):
    path = stranger(world, tmp_path, **{"config.json": {field: "evil/kernel"}})
    with watching() as watch:
        assert ask(path) == 2
        assert cli("train", "--model_name_or_path", path, "--dataset_name",
                   world[0] / "pairs.jsonl", "--output_dir", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("asks for attention from the hub (evil/kernel)") == 2
    assert watch.connections == [] and not [name for name in watch.imported if "kernels" == name]


@holds("Weights in pickles")
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_of_a_base_are_tensors_or_refused(world, tmp_path, capsys, zipped):
    path = stranger(world, tmp_path)
    (path / "model.safetensors").unlink()
    write_pickle(path / "pytorch_model.bin", world[1], zipped=zipped)
    assert ask(path) == 2
    assert "a pickle that holds more than tensors" in capsys.readouterr().err
    assert world[1]() == []
    torch.save(tiny_llama().state_dict(), path / "pytorch_model.bin")
    assert ask(path) == 0
    # Beside safetensors they are not looked at.
    shutil.copy(world[0] / "plain" / "model.safetensors", path)
    write_pickle(path / "pytorch_model.bin", world[1], zipped=zipped)
    with watching() as watch:
        assert ask(path) == 0
    assert world[1]() == [] and "pytorch_model.bin" not in watch.opened_in(path)


@holds("Weights come from the base")
@pytest.mark.parametrize("how", ["../outside/model.safetensors", "absolute"])
def test_an_index_names_files_of_its_folder(world, tmp_path, capsys, how):
    from safetensors import safe_open

    path = stranger(world, tmp_path)
    outside = shutil.copytree(path, tmp_path / "outside") / "model.safetensors"
    with safe_open(outside, "pt") as weights:
        names = list(weights.keys())
    (path / "model.safetensors").unlink()
    name = str(outside) if how == "absolute" else how
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert ask(path) == 2
    assert "which is no file of its folder" in capsys.readouterr().err


@holds("Weights come from the base")
@pytest.mark.parametrize("field", [
    "vocab_file", "tokenizer_file", "merges_file", "added_tokens_file", "special_tokens_map_file",
    "name_or_path", "chat_template",
])
def test_a_tokenizer_is_made_of_its_folder(world, tmp_path, field):
    """A file elsewhere that it names is not read: what it says of itself would show in the ids."""
    outside = shutil.copytree(world[0] / "plain", tmp_path / "outside")
    found = json.loads((outside / "tokenizer.json").read_text())
    vocabulary = found["model"]["vocab"]
    found["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    (outside / "tokenizer.json").write_text(json.dumps(found))
    value = str(outside if field == "name_or_path" else outside / "tokenizer.json")
    path = stranger(world, tmp_path, **{"tokenizer_config.json": {field: value}})
    with watching() as watch:
        ids = load_tokenizer(path)("What is blue?")["input_ids"]
    assert ids == load_tokenizer(world[0] / "plain")("What is blue?")["input_ids"]
    assert watch.opened_in(outside) == set()


TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    "{{ raise_exception.__globals__['sys'] }}", "{{ (messages|attr('append')).__self__ }}",
    "{% include '/etc/hostname' %}", "{% import 'os' as os %}", "{% extends 'setup.py' %}",
    "{{ strftime_now.__code__.co_consts }}", "{{ self.__init__.__globals__ }}",
    "{{ messages.append(1) or messages.clear() }}", "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{% for x in range(10**12) %}x{% endfor %}", "{{ tojson.__globals__ }}",
)


@holds("Chat templates, those of adapters too")
@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_reach_nothing(world, tmp_path, capsys, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.jinja"
    path.write_text(template + "{% for m in messages %}{{ m.content }}{% endfor %}")
    with watching() as watch:
        code = ask(world[0] / "plain", "--chat_template_path", path)
    shown = capsys.readouterr()
    assert code in (0, 2) and "Traceback" not in shown.err
    assert "built-in" not in shown.out and "<class" not in shown.out + shown.err
    assert started(watch) == []
    assert not [x for x in watch.opened if x.endswith(("hostname", "pwned", "setup.py"))]


# --- data and configurations ---------------------------------------------------------------------


@holds("Data files are data")
def test_no_column_is_more_than_its_values(world, tmp_path):
    folder, mark = world
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    for name in ("pairs.py", "dataset_infos.json", "loader.py"):
        (tmp_path / name).write_text(mark.code(name) if name.endswith(".py") else "{}")
    rows = preference_rows(16)
    table = pa.table({
        **{key: [json.dumps(row[key]) if key == "x" else row[key][-1]["content"] for row in rows]
           for key in ("prompt", "chosen", "rejected")},
        "picture": [{"bytes": None, "path": path} for path in
                    [str(secret), "http://127.0.0.1:9/x.png"] * 8],
        "sound": [{"bytes": None, "path": str(secret)}] * 16,
    })
    features = {
        **{key: {"dtype": "string", "_type": "Value"} for key in ("prompt", "chosen", "rejected")},
        "picture": {"_type": "Image"}, "sound": {"_type": "Audio"},
    }
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, tmp_path / "pairs.parquet")
    with watching() as watch:
        assert cli("eval", folder / "plain", "--dataset_name", tmp_path / "pairs.parquet",
                   "--answer_prompts", 0) == 0
    assert mark() == [] and watch.connections == []
    assert watch.opened_in(tmp_path) <= {"pairs.parquet", "."}


@holds("What a row gives its chat template")
@pytest.mark.parametrize("name", [
    "chat_template", "tokenize", "tools", "messages", "conversation", "documents", "padding",
    "tokenizer_kwargs", "return_dict", "add_generation_prompt", "continue_final_message",
])
def test_a_row_brings_no_template(world, tmp_path, capsys, name):
    rows = preference_rows(16)
    rows[0]["chat_template_kwargs"] = {name: "{% for x in range(99999) %}evil{% endfor %}"}
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert cli("eval", world[0] / "plain", "--dataset_name", tmp_path / "pairs.jsonl",
               "--answer_prompts", 0) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "15 of 16 kept" in shown or name == "tools"


@holds("YAML and JSON make plain values")
def test_yaml_makes_no_objects(world, tmp_path, capsys):
    mark = Mark(tmp_path / "marks")
    evil = f"!!python/object/apply:os.makedirs [{tmp_path / 'marks' / 'yaml'}]"
    (tmp_path / "config.yaml").write_text(f"dataset_name: {evil}\n")
    (tmp_path / "compare.yaml").write_text(f"title: {evil}\n")
    assert cli("train", "--config", tmp_path / "config.yaml") == 2
    assert cli("compare", tmp_path / "compare.yaml", "--output_dir", tmp_path / "out") == 2
    assert cli("train", "--dataset_name", world[0] / "pairs.jsonl", "--output_dir",
               tmp_path / "out", "--model_init_kwargs", f"{{a: {evil}}}") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)
    assert "config.yaml" in lines[0] and "compare.yaml" in lines[1] and mark() == []


@holds("How deep, how large")
@pytest.mark.parametrize(("name", "content"), [
    ("pairs.json", b"[" * 5000 + b"]" * 5000),
    ("pairs.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n"),
    ("pairs.jsonl.gz", None),
    ("config.yaml", b"a: &a [x, x, x, x, x, x, x, x]\n" + b"".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n".encode() for a, b in
        zip("abcdefgh", "bcdefghi", strict=True))),
    ("config.yaml", b"[" * 500 + b"]" * 500),
])
def test_what_is_beyond_a_limit_is_named(world, tmp_path, capsys, name, content):
    import gzip

    if content is None:
        with gzip.open(tmp_path / name, "wb", compresslevel=9) as file:
            for _ in range(160):
                file.write(bytes(2**20))
    else:
        (tmp_path / name).write_bytes(content)
    option = "--config" if name.endswith("yaml") else "--dataset_name"
    assert cli("train", option, tmp_path / name, "--model_name_or_path", world[0] / "plain",
               "--output_dir", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert name in error and error.count("\n") == 1 and len(error) < 1000


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert cli(*run_flags(world, folder / "run"), "--max_steps", 1) == 0
    return folder / "run"


def run_flags(world, out: Path) -> tuple:
    return ("train", "--model_name_or_path", world[0] / "plain", "--dataset_name",
            world[0] / "pairs.jsonl", "--output_dir", out, "--save_steps", 1, "--test_fraction", 0,
            "--retention_coef", 0, "--max_rows", 8)


@holds("optimizer.pt, scheduler.pt")
@pytest.mark.parametrize(("name", "told"), [
    ("optimizer.pt", "optimizer.pt"), ("scheduler.pt", "scheduler.pt"),
    ("rng_state.pth", "random numbers"), ("scaler.pt", "scaler"),
])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_a_checkpoint(world, checkpoint, tmp_path, capsys, name, told, zipped):
    from qadapter.system import manifest

    mark = Mark(tmp_path / "marks")
    run = shutil.copytree(checkpoint, tmp_path / "run")
    saved = run / "checkpoint-1"
    write_pickle(saved / name, mark, zipped=zipped)
    manifest.write(saved, {*manifest.read(saved / "manifest.json").files, name})
    with watching() as watch:
        assert ask(saved) == 0
        assert cli("train", *run_flags(world, run)[1:], "--resume_from_checkpoint", saved,
                   "--max_steps", 2) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and f"{saved}" in error and told in error
    assert mark() == [] and started(watch) == []


def test_pickles_are_read_when_a_run_is_resumed_alone(world, checkpoint):
    names = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"}
    with watching() as watch:
        assert ask(checkpoint / "checkpoint-1") == 0
        assert cli("eval", checkpoint / "checkpoint-1", "--dataset_name",
                   world[0] / "pairs.jsonl", "--max_rows", 4, "--answer_prompts", 0) == 0
    assert not names & watch.opened_in(checkpoint / "checkpoint-1")


# --- judges, and what is written ------------------------------------------------------------------


@holds("An endpoint gets prompts", "A reply is text")
def test_what_an_endpoint_gets_and_says(world, tmp_path, capsys, monkeypatch):
    pytest.importorskip("openai")
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    asked: list[tuple[dict, dict]] = []
    evil = "<script>alert(1)</script> [/x] \x1b[2J {{7*7}} $(touch pwned) [[A]]"

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((dict(self.headers), body))
            reply = json.dumps({
                "id": "x", "object": "chat.completion", "created": 1, "model": "m",
                "choices": [{"index": 0, "finish_reason": "stop",
                             "message": {"role": "assistant", "content": evil}}],
            }).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "the-key")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("A_SECRET", "another-secret")
    try:
        with watching() as watch:
            assert cli("judge", world[0] / "head", "--opponent", world[0] / "plain",
                       "--dataset_name", world[0] / "pairs.jsonl", "--judge_model", "m",
                       "--judge_url", f"http://127.0.0.1:{server.server_port}/v1", "--num_prompts",
                       2, "--draws", 1, "--opponent_draws", 1, "--max_new_tokens", 3,
                       "--output_dir", tmp_path / "out") == 0
    finally:
        server.shutdown()
        server.server_close()
    assert asked and started(watch) == []
    for headers, body in asked:
        assert {k.lower(): v for k, v in headers.items()}["authorization"] == "Bearer the-key"
        told = json.dumps([headers, body])
        assert "secret" not in told and str(world[0]) not in told
        assert any(row["prompt"][0]["content"] in told for row in preference_rows(64))
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert "<script>" not in (tmp_path / "out" / "judge.md").read_text()
    kept = (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()
    assert kept and all(json.loads(line)["reply"] == evil for line in kept)


@holds("Pages (HTML) that are written", "Names, prompts, answers and tokens are text")
def test_pages_and_texts(world, tmp_path, monkeypatch, capsys):
    """The many texts and places are in system/test_markup.py, test_what_names_may_hold.py and
    compare/test_names_and_numbers.py; here is one of each."""
    from data.tiny import chatml

    from qadapter.commands.generate import Streamer
    from qadapter.console.terminal import Terminal
    from qadapter.evaluation.html_page import html_page
    from qadapter.system.markup import html_text, markdown_text, picture_text

    evil = "<script>$x$[/b]\x1b[2J|"
    assert html_text(evil) == "&lt;script&gt;$x$[/b]\\x1b[2J|"
    assert markdown_text(evil) == "&lt;script>\\$x\\$[/b]\\\\x1b[2J\\|"
    assert picture_text(evil) == "<script>\\$x\\$[/b]\\x1b[2J|"
    terminal = Terminal(file=io.StringIO(), width=200)
    terminal.print(evil)
    assert terminal.file.getvalue() == "<script>$x$[/b]\\x1b[2J|\n"
    for tty, shown in ((True, "\\x1b[2J é\n"), (False, "\x1b[2J é\n")):
        monkeypatch.setattr("sys.stdout.isatty", lambda tty=tty: tty)
        Streamer(chatml()).on_finalized_text("\x1b[2J é", stream_end=True)
        assert capsys.readouterr().out == shown
    assert cli("rewards", world[0] / "head", "--prompt", evil, "--answer", evil, "--output_file",
               tmp_path / "rewards.html") == 0
    page = (tmp_path / "rewards.html").read_text()
    assert "<script" not in page and "default-src 'none'" in page
    page = html_page(evil, style="", body="", script="turn()")
    assert re.findall(r"<script>(.*?)</script>", page) == ["turn()"] and page.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(b"turn()").digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page
