"""How a server begins, what it does under load, and how it ends."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from urllib.parse import urlsplit

import openai
import pytest
import requests
import torch
from running import reference, running, save_adapters, service_of
from tiny_models import batches_continuously, cli, save_tiny, tiny_llama

from qadapter import AdapterConfig, QAdapterModel
from qadapter.evaluation.answers import encode_prompt
from qadapter.serving import server as serving
from qadapter.serving.guard import is_loopback, read_key
from qadapter.serving.preferences import PreferenceFile
from qadapter.trunk.loading import load_tokenizer

QUESTION = [{"role": "user", "content": "What is blue?"}]
KEY = "a-key-of-some-length"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_adapters(tmp_path_factory.mktemp("life"))


def body(**fields):
    return {"model": "gated", "messages": QUESTION, "max_tokens": 8, "temperature": 0} | fields


def post(server, path="chat/completions", **fields):
    return requests.post(f"{server.url}/v1/{path}", timeout=120, **fields)


def unending(server, seconds):
    """No answer ends by itself, and a step takes so long."""
    batches = server.service.engine.batches
    choose, ends = batches.choose, sorted(server.service.models.by_name["base"].ends)

    def slow(found, logits):
        time.sleep(seconds)
        logits[:, ends] = -torch.inf
        return choose(found, logits)

    batches.choose = slow


# --- the end ------------------------------------------------------------------------------------


@batches_continuously
def test_answers_are_finished_after_a_signal_and_new_ones_refused(folder):
    with running(service_of(folder, ["gated"])) as server, ThreadPoolExecutor(2) as pool:
        unending(server, 0.05)
        kept = requests.Session()
        assert kept.get(server.url + "/health").status_code == 200
        begun = pool.submit(post, server, json=body(max_tokens=20))
        while not server.service.engine.running:
            time.sleep(0.01)
        server.server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.3)
        # Either the connection is closed, or the answer says why.
        with contextlib.suppress(requests.ConnectionError):
            assert kept.post(
                server.url + "/v1/chat/completions", json=body()
            ).status_code == 503
        with pytest.raises(requests.ConnectionError):
            post(server, json=body())
        answer = begun.result()
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 20
        server.thread.join(60)
        assert not server.thread.is_alive() and server.error is None


@batches_continuously
@pytest.mark.parametrize("stream, signals", [(True, 1), (False, 1), (False, 2)])
def test_answers_that_take_too_long_after_a_signal_say_so(folder, stream, signals):
    grace = 0.5 if signals == 1 else 600.0  # a second one ends at once
    with running(service_of(folder, ["gated"]), grace_seconds=grace) as server:
        unending(server, 0.1)
        with ThreadPoolExecutor(1) as pool:
            begun = pool.submit(post, server, json=body(max_tokens=150, stream=stream))
            while not server.service.engine.running:
                time.sleep(0.01)
            for _ in range(signals):
                server.server.handle_exit(signal.SIGTERM, None)
            answer = begun.result()
        said = answer.json() if not stream else json.loads(
            answer.text.strip().splitlines()[-1].removeprefix("data: ")
        )
        assert "shut down" in said["error"]["message"]
        server.thread.join(60)
        assert not server.thread.is_alive()


@batches_continuously
def test_a_connection_stays_open_longer_than_clients_keep_theirs(folder):
    """httpx keeps one for five seconds: closed by the server meanwhile, it would lose a request."""
    with running(service_of(folder, names=["block"])) as server:
        connection = HTTPConnection(urlsplit(server.url).netloc)
        for pause in (0, 5.5):
            time.sleep(pause)
            connection.request("GET", "/v1/models", headers={"Connection": "keep-alive"})
            opened = connection.sock
            assert connection.getresponse().read() and connection.sock is opened is not None
        connection.close()


@batches_continuously
@pytest.mark.slow
def test_the_command_from_its_first_line_to_its_last(folder, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "qadapter.cli", "serve", str(folder / "gated"), str(folder / "low"),
         "--port", "0", "--dtype", "float32", "--max_length", "100", "--preferences_file", pairs],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"},
    )
    try:
        lines = iter(process.stderr.readline, "")
        said = []
        for line in lines:
            said.append(line)
            if "at http://" in line:
                break
        assert "serving gated, low and the base base, 100 tokens" in "".join(said)
        url = said[-1].split()[1]
        client = openai.OpenAI(base_url=url + "v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(model="low", messages=QUESTION, max_tokens=5)
        assert answer.model == "low"
        pair = {"prompt": QUESTION, "chosen": "Yes.", "rejected": "No."}
        assert requests.post(url + "v1/qadapter/preferences", json=pair).status_code == 200
        assert requests.get(url).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        assert "".join(lines).strip() == "error: terminated"
        assert json.loads(pairs.read_text())["chosen"][0]["content"] == "Yes."
    finally:
        process.kill()
        process.wait()


# --- load ---------------------------------------------------------------------------------------


@pytest.mark.slow
@batches_continuously
def test_thirty_two_clients_lose_nothing_in_a_cache_too_small_for_them(folder, monkeypatch):
    from qadapter.serving import engine

    monkeypatch.setattr(engine, "_TOKENS_EACH", 32)  # a page each: 32 pages in all
    tokenizer = load_tokenizer(folder / "base")
    models = {name: reference(folder, name) for name in ("gated", "low")}
    contents = [f"What is {word} {i}?" for i in range(4) for word in ("blue", "hot")]
    ends = set()

    def alone(name, content, strength):
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": content}])
        ids = models[name].generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, strength=strength,
            eos_token_id=sorted(ends), pad_token_id=0,
        )[0, len(prompt) :].tolist()
        ids = [i for i in ids if i not in ends]
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    service = service_of(folder, ["gated", "low"], max_concurrency=32)
    assert service.engine._sizes["num_blocks"] == 32
    ends |= service.models.by_name["base"].ends
    asked = [
        (name, content, strength) for name in models for content in contents
        for strength in (0.0, 1.0, 0.5, 2.0)
    ]
    with running(service) as server, ThreadPoolExecutor(32) as pool:
        def ask(one):
            name, content, strength = one
            answer = post(server, json=body(
                model=name, messages=[{"role": "user", "content": content}], strength=strength,
                max_tokens=30, stream=hash(content) % 2 == 0,
            ))
            assert answer.status_code == 200, answer.text
            if answer.headers["content-type"].startswith("application/json"):
                return answer.json()["choices"][0]["message"]["content"]
            events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
            assert events[-1] == "[DONE]"
            chunks = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
            return "".join(chunk.get("content", "") for chunk in chunks)

        found = list(pool.map(ask, asked))
        end = time.monotonic() + 30  # a client has the last piece before the server has let go
        while service.engine.running or service.engine._reserved:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert found == [alone(*one) for one in asked]


@batches_continuously
def test_a_key_is_asked_for_where_there_is_one(folder):
    with running(service_of(folder, ["gated"], key=KEY)) as server:
        assert requests.get(server.url + "/").status_code == 200
        assert requests.get(server.url + "/health").status_code == 200
        for headers in ({}, {"authorization": f"Bearer {KEY}x"}, {"authorization": KEY},
                        {"authorization": "Bearer "}, {"authorization": "Basic " + KEY}):
            for path in ("models", "models/gated"):
                answer = requests.get(f"{server.url}/v1/{path}", headers=headers)
                assert answer.status_code == 401, headers
            assert post(server, json=body(), headers=headers).status_code == 401
            assert post(server, "qadapter/rewards", json={}, headers=headers).status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        client = openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0)
        assert [model.id for model in client.models.list()] == ["gated", "base"]
        assert post(server, "qadapter/preferences", json={}, headers={
            "authorization": f"Bearer {KEY}"
        }).status_code == 404


@batches_continuously
def test_the_default_strength_is_the_servers(folder):
    with running(service_of(folder, ["gated"], strength=0.0)) as server:
        base = post(server, json=body(model="base")).json()["choices"]
        assert post(server, json=body()).json()["choices"] == base
        assert post(server, json=body(strength=1)).json()["choices"] != base


# --- the beginning ------------------------------------------------------------------------------


def refused(capsys, *arguments):
    """What the command says of what it refuses, before anything is loaded."""
    assert cli("serve", *arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    return said[-1]


@pytest.mark.parametrize("arguments, said", [
    ([], "serve needs an adapter"),
    (["none/such/folder"], "no such folder"),
    (["{gated}", "--host", "0.0.0.0"], "can be reached from elsewhere: give --api_key_file"),
    (["{gated}", "--host", "no.such.host.invalid"], "host no.such.host.invalid"),
    (["{gated}", "--port", "70000"], "port must lie between"),
    (["{gated}", "--port", "{taken}"], "choose another --port"),
    (["{gated}", "--strength", "5"], "strength must be at most 4"),
    (["{gated}", "--max_length", "0"], "max_length must lie"),
    (["{gated}", "--max_concurrency", "0"], "max_concurrency must lie"),
    (["{gated}", "--grace_seconds", "nan"], "grace_seconds must be finite"),
    (["{gated}", "--api_key_file", "{short}"], "at least 16 characters"),
    (["{gated}", "--api_key_file", "{gated}/none"], "can't be read"),
    (["{gated}", "--preferences_file", "{short}"], "must end in .jsonl"),
    (["{gated}", "--preferences_file", "{gated}/none/p.jsonl"], "can't be written"),
    (["{gated}", "--preferences_file", "{texts}"], "is no preference pair"),
    (["{gated}", "{gated}", "--port", "0"], "is given twice"),
    (["{base}", "--port", "0"], "qadapter_config.json is missing"),
    (["{gated}", "--port", "0", "--base_model_name_or_path", "{other}"], "base"),
])
@batches_continuously
def test_what_cant_be_served_is_refused(folder, tmp_path, capsys, arguments, said):
    (tmp_path / "short").write_text("short")
    (tmp_path / "texts.jsonl").write_text('{"text": "hello"}\n')
    save_tiny(tmp_path / "other", seed=5)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        places = {
            "gated": folder / "gated", "base": folder / "base", "other": tmp_path / "other",
            "short": tmp_path / "short", "texts": tmp_path / "texts.jsonl",
            "taken": taken.getsockname()[1],
        }
        line = refused(capsys, *(a.format(**places) for a in arguments))
    assert line.startswith("error: ") and said in line


def test_an_older_transformers_is_refused(folder, capsys, monkeypatch):
    from qadapter.serving import engine

    monkeypatch.setattr(engine, "CONTINUOUS_BATCHING", "99.0")
    assert "serve needs transformers 99.0 or newer" in refused(capsys, folder / "gated")


def test_what_is_not_installed_is_said(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'qadapter[serve]'" in refused(capsys, folder / "gated")


@batches_continuously
def test_an_adapter_of_another_base_is_refused_by_name(folder, tmp_path, capsys):
    stranger = QAdapterModel.from_base(tiny_llama(seed=7), AdapterConfig(rank=2))
    stranger.save_pretrained(tmp_path / "stranger")
    line = refused(capsys, folder / "gated", tmp_path / "stranger", "--port", "0")
    assert "stranger" in line


@batches_continuously
def test_max_length_that_memory_has_no_room_for_is_refused(folder):
    from qadapter.errors import QAdapterError

    with pytest.raises(QAdapterError, match="choose a smaller max_length"):
        service_of(folder, ["gated"], max_length=2**40)


def test_names_of_models(tmp_path):
    from qadapter.errors import QAdapterError
    from qadapter.serving.models import names_of

    for name in ("a/mine", "b/mine", "base"):
        (tmp_path / name).mkdir(parents=True)
    one, other, base = (str(tmp_path / name) for name in ("a/mine", "b/mine", "base"))
    assert names_of([one], base) == (["mine"], "base")
    assert names_of([one, other], "hub/base") == ([one, other], "hub/base")
    assert names_of([one + "/", base], base)[0] == ["mine", base]
    assert len({*names_of([base], base)[0], names_of([base], base)[1]}) == 2
    with pytest.raises(QAdapterError, match="given twice"):
        names_of([one, one], base)


def test_hosts_and_keys(tmp_path):
    from qadapter.errors import QAdapterError

    assert all(map(is_loopback, ("127.0.0.1", "localhost", "127.0.0.9")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.1")))
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    assert read_key(file) == KEY
    for text in ("", "short", "two words of some length", "schlüssel-schlüssel"):
        file.write_text(text)
        with pytest.raises(QAdapterError, match="at least 16 characters"):
            read_key(file)


def test_an_address_of_the_newer_kind():
    try:
        listening = serving.listen("::1", 0)
    except Exception:
        pytest.skip("this machine has no IPv6")
    with listening:
        assert serving.address_of(listening, "::1").startswith("http://[::1]:")


# --- pairs ------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = PreferenceFile(tmp_path / "p.jsonl")
    file.append(QUESTION, "Yes.", "No.")
    before = file.path.read_bytes()
    file.path.write_bytes(before[:-1])  # an editor left the last line open

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", full)
        file.append(QUESTION, "Yes!", "No!")
    assert file.path.read_bytes() == before[:-1]
    file.append(QUESTION, "Yes!", "No!")
    rows = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [row["chosen"][0]["content"] for row in rows] == ["Yes.", "Yes!"]


def test_two_servers_may_share_a_file(tmp_path):
    path = tmp_path / "p.jsonl"
    files = [PreferenceFile(path), PreferenceFile(path)]
    threads = [
        threading.Thread(target=lambda f=file: [f.append(QUESTION, f"Yes {i}", "No") for i in
                                                range(20)])
        for file in files
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 40 and set(rows[0]) == {"prompt", "chosen", "rejected"}


