"""Libraries that know nothing of us answer as we do, greedily, on a tiny model. (Engines with
environments of their own, on a real one: tests/engines.)"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import peft
import pytest
import torch
from tiny_models import save_tiny
from transformers import pipeline

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterModel
from qadapter.evaluation import generate_answers
from qadapter.exporting import stock, verification
from qadapter.exporting.export import export
from qadapter.trunk.loading import load_tokenizer

QUESTION = [{"role": "user", "content": "What color is the sky?"}]
TOKENS = 12


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """(folder of all exports, our answer with the head adapter, our answer with the LoRA)."""
    folder = tmp_path_factory.mktemp("serving")
    save_tiny(folder / "base")
    tokenizer = load_tokenizer(folder / "base")
    head = QAdapterModel.from_base(
        folder / "base", AdapterConfig(rank=8),
        ObjectiveConfig(alpha_0=0.3, alpha_tilde=0.7, parametrization="q"),
    )
    lora = QAdapterModel.from_base(
        folder / "base", peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    )
    torch.manual_seed(4)
    torch.nn.init.normal_(head.adapter.up.weight, std=0.3)
    for parameter in lora.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "ask_stock", lambda request, scratch: stock.answer(request))
        export(head, folder / "merged")
        export(head, folder / "lm_head_lora", "lm_head_lora")
        export(lora, folder / "peft", "peft")
        export(lora, folder / "merged_lora")
    answers = [generate_answers(m, tokenizer, [QUESTION], max_new_tokens=TOKENS)[0].text
               for m in (head, lora)]
    base = generate_answers(head, tokenizer, [QUESTION], max_new_tokens=TOKENS, strength=0)[0].text
    assert len({base, *answers}) == 3
    return folder, *answers


def piped(folder) -> str:
    tokenizer = str(folder.parent / "base")
    generator = pipeline("text-generation", model=str(folder), tokenizer=tokenizer)
    output = generator(QUESTION, max_new_tokens=TOKENS, do_sample=False)
    return output[0]["generated_text"][-1]["content"].strip()


def test_pipeline_with_the_merged_head(exports):
    folder, answer, _ = exports
    assert piped(folder / "merged") == answer


def test_pipeline_with_the_merged_trunk(exports):
    folder, _, answer = exports
    assert piped(folder / "merged_lora") == answer


def test_pipeline_with_a_peft_folder(exports, monkeypatch):
    folder, answer, _ = exports
    monkeypatch.chdir(folder)  # where the base has the name that the adapter gives it
    assert piped(folder / "lm_head_lora") == answer


def test_peft_with_the_trunks_lora(exports, monkeypatch):
    folder, _, answer = exports
    monkeypatch.chdir(folder)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(str(folder / "peft"))
    assert model.peft_config["default"].base_model_name_or_path == "base"
    tokenizer = load_tokenizer(folder / "base")
    found = generate_answers(model, tokenizer, [QUESTION], max_new_tokens=TOKENS)
    assert found[0].text == answer


# --- over HTTP ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(exports, tmp_path_factory):
    """``transformers serve`` on loopback with the merged model; its URL."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="transformers serve needs transformers[serving]")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-P", "-m", "transformers.cli.transformers", "serve",
        str(exports[0] / "merged"), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
    ]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT,
            # Else it asks PyPI for news of itself before it starts.
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while not alive(url):
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        process.kill()
        process.wait()


def alive(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def ask(url: str, model, **body) -> dict:
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", method="POST",
        data=json.dumps({"model": str(model), "messages": QUESTION, **body}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def test_transformers_serve_answers_as_we_do(server, exports):
    folder, answer, _ = exports
    reply = ask(server, folder / "merged", temperature=0, max_tokens=TOKENS)
    assert reply["object"] == "chat.completion"
    assert reply["choices"][0]["message"]["content"].strip() == answer
