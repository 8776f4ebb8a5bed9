"""Exports read by transformers 4, in an environment of its own: ``make test-transformers4``.

Not a part of the usual suite. Every export decodes there what it decodes under version 5.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from data.tiny import chatml
from safetensors import safe_open
from tiny_models import ARCHITECTURES, save_tiny, tiny_base

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterModel
from qadapter.exporting import stock, verification
from qadapter.exporting.export import export

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-transformers4/bin/python"
PROMPTS = [[5, 9, 11, 3, 20, 7, 33], [2, 90, 4, 17, 50, 60, 61, 62, 63, 64, 65, 1]]
DIFFERENCE = 1e-4
"""Of logits, most, in float32: other kernels of the same sums."""
STRETCHED = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {"factor": 2.0, "original_max_position_embeddings": 64,
                 "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]},
}
PARTIAL = {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.5}
GEMMA3 = {
    "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 7777.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 55.0},
    },
}
CASES = {
    **{name: (name, {}) for name in ARCHITECTURES if name != "gemma2"},
    **{
        f"llama, {kind}": ("llama", {"rope_parameters": {
            "rope_type": kind, "rope_theta": 777.0, **parameters
        }}) for kind, parameters in STRETCHED.items()
    },
    "gpt_neox, partial": ("gpt_neox", {"rope_parameters": PARTIAL}),
    "stablelm, partial": ("stablelm", {"rope_parameters": PARTIAL}),
    "gemma3": ("gemma3_text", GEMMA3),
}


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(
        verification, "ask_stock", lambda request, scratch: stock.answer(request)
    )


def compare(folder: Path, base: Path | None = None, texts: list[str] | None = None) -> None:
    """Decode with an export under both versions: the same tokens, of the same logits."""
    prompts = PROMPTS if texts is None else [chatml()(text)["input_ids"] for text in texts]
    request = {
        "export": str(folder), "base": None if base is None else str(base), "revision": None,
        "dtype": "float32", "device": "cpu", "attn_implementation": "sdpa", "threads": 1,
        "prompts": prompts, "texts": texts, "max_new_tokens": 12,
    }
    (folder.parent / "request.json").write_text(json.dumps(request))
    answer = folder.parent / "answer.safetensors"
    subprocess.run(
        [PYTHON, "-P", stock.__file__, folder.parent / "request.json", answer], check=True
    )
    ours, _ = stock.answer(request)
    with safe_open(answer, "pt") as theirs:
        assert json.loads(theirs.metadata()["versions"])["transformers"].startswith("4.")
        for name, x in ours.items():
            y = theirs.get_tensor(name)
            if x.is_floating_point():
                torch.testing.assert_close(y, x, atol=DIFFERENCE, rtol=0)
            else:
                assert y.tolist() == x.tolist()


def model_on(base) -> QAdapterModel:
    model = QAdapterModel.from_base(base, AdapterConfig(rank=4), ObjectiveConfig()).eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(model.adapter.up.weight, std=0.5)
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_merged_checkpoint(case, tmp_path):
    architecture, changes = CASES[case]
    export(model_on(tiny_base(architecture, **changes)), tmp_path / "out")
    compare(tmp_path / "out")


def test_its_tokenizer(tmp_path):
    save_tiny(tmp_path / "base")
    export(model_on(tmp_path / "base"), tmp_path / "out")
    compare(tmp_path / "out", texts=["Hello world", "<|im_start|>user\nWhat is blue?<|im_end|>"])


def test_a_peft_folder(tmp_path):
    save_tiny(tmp_path / "base")
    export(model_on(tmp_path / "base"), tmp_path / "out", "lm_head_lora")
    compare(tmp_path / "out", tmp_path / "base")
