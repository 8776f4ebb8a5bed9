"""Uses an installed qadapter as a user would. Usage: try_installed.py compiled|pure"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

BIN = Path(sys.executable).parent
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def run(*arguments: str) -> str:
    """Output of a command of this environment; wide, so that no table breaks its lines."""
    done = subprocess.run(
        [str(BIN / arguments[0]), *arguments[1:]], env={"COLUMNS": "300", "PATH": "", "HOME": "."},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def check_installation() -> None:
    import qadapter
    import qadapter_kernels

    for package in (qadapter, qadapter_kernels):
        assert Path(package.__file__).is_relative_to(BIN.parent), package.__file__
    assert "transformers" not in sys.modules
    for name in ("triton", "pytest"):
        assert importlib.util.find_spec(name) is None, f"{name} is here"
    assert not [tool for tool in ("g++", "nvcc", "ninja", "git") if shutil.which(tool)]
    files = metadata.files("qadapter") or []
    tops = {file.parts[0] for file in files if ".." not in file.parts}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "qadapter", "qadapter_kernels"
    }, tops


def make_base(folder: Path, texts: list[str]) -> None:
    """A random Llama of two layers with a tokenizer of its own."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

    logging.disable_progress_bar()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<user>", "<assistant>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False,
                                   initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )).save_pretrained(folder)


def main(kind: str) -> None:
    check_installation()
    import qadapter

    version = metadata.version("qadapter")
    assert qadapter.__version__ == version
    assert run("qadapter", "--version").split() == ["qadapter", version]

    told = run("qadapter", "info")
    if kind == "compiled":
        assert "code for avx2, avx512, portable; here " in told, told
    else:
        assert "cpu library was not built: this wheel holds none" in told, told
        assert "cuda library was not built: this wheel holds none" in told, told

    data = Path(qadapter.__file__).parent / "demo/data/preferences.jsonl"
    rows = data.read_text().splitlines()[:12]
    Path("pairs.jsonl").write_text("\n".join(rows) + "\n")
    base = Path("base")
    if not base.exists():
        make_base(base, [json.loads(row)["chosen"] for row in rows])
    output = f"run-{kind}"
    run("qadapter", "train", "--model_name_or_path", "base", "--dataset_name", "pairs.jsonl",
        "--output_dir", output, "--max_steps", "2", "--max_length", "128")
    assert Path(output, "adapter_model.safetensors").exists()
    if kind == "compiled":
        run("qadapter", "generate", output, "--prompt", "Why?", "--max_new_tokens", "8")
    print(f"{kind} wheel {version}: used; its libraries:")
    print(run("python", "-m", "qadapter_kernels"), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
