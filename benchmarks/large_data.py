"""Memory from a file of preferences to a trained adapter, over the number of pairs and of steps.

    python benchmarks/large_data.py [--pairs 20000 200000] [--long_run 5000] [--output FILE]

For each number a file of so many pairs is written, and ``qadapter train`` runs on it, with a tiny
model and its features on disk. What the run and its children hold is read as it goes: anonymous
memory (``Pss_Anon``, ``Pss_Shmem`` and what is swapped out), which is what a process needs; and
what it has mapped from files (``Pss_File``), which the system takes back whenever it likes. The
phases are told apart by the run's own lines. A last run takes many steps on few pairs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qadapter.console.environment import devices, versions

RESULTS = Path(__file__).with_name("results") / "large_data.json"
STEPS = 400
PAIRS_OF_LONG_RUN = 2000
_STEP = re.compile(r"^step (\d+)/")
PHASES = {"kept on disk": "features", "the base reads the training pairs": "training"}
"""What a line says → what is done from there on; first the pairs are read and tokenized."""
WORDS = "what is of a good answer bad ?".split()


def save_base(folder: Path) -> None:
    """Two layers, and a vocabulary of words and digits."""
    special = ["<s>", "</s>", "<unk>"]
    words = [*special, *WORDS, *map(str, range(10))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="</s>",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
        initializer_range=0.3,
    )).save_pretrained(folder)


def write_pairs(path: Path, count: int) -> None:
    """Some thirty tokens a pair and answer, all alike but for their numbers."""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            prompt = " ".join(f"what is {number + i} of" for i in range(1 + number % 5))
            good, bad = "a good answer " * (1 + number % 3), "bad " * (1 + number % 4)
            row = {"prompt": f"{prompt} ? ", "chosen": f"{good}{number}", "rejected": f"{bad}?"}
            file.write(json.dumps(row) + "\n")


def memory(process: psutil.Process) -> tuple[int, int]:
    """(anonymous, mapped from files) bytes of a process and its children."""
    anonymous = mapped = 0
    for one in (process, *process.children(recursive=True)):
        try:
            text = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        kib = {
            line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()[1:]
        }
        anonymous += kib["Pss_Anon"] + kib["Pss_Shmem"] + kib["SwapPss"]
        mapped += kib["Pss_File"]
    return anonymous << 10, mapped << 10


def measure(count: int, work: Path, steps: int = STEPS) -> dict[str, object]:
    """One run."""
    base, pairs, run = work / "base", work / f"{count}.jsonl", work / f"run-{count}"
    write_pairs(pairs, count)
    command = [
        sys.executable, "-m", "qadapter.cli", "train", "--model_name_or_path", str(base),
        "--dataset_name", str(pairs), "--output_dir", str(run), "--test_fraction", "0",
        "--cache_features", "disk", "--feature_cache_dir", str(work / f"features-{count}"),
        "--max_steps", str(steps), "--per_device_train_batch_size", "16", "--save_strategy", "no",
        "--logging_steps", "50", "--learning_rate", "1e-2", "--adapter_kind", "head",
    ]
    environment = {**os.environ, "XDG_CACHE_HOME": str(work / "cache"), "PYTHONUNBUFFERED": "1"}
    peaks: dict[str, dict[str, int]] = {}
    by_step: dict[int, int] = {}
    phase, start = "reading and tokenizing", time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    told: list[str] = []

    def follow() -> None:
        nonlocal phase
        for line in process.stdout:
            told.append(line)
            phase = next((name for words, name in PHASES.items() if words in line), phase)
            if (found := _STEP.match(line)) and int(found[1]) % (steps // 10) == 0:
                by_step[int(found[1])] = memory(watched)[0]

    watched = psutil.Process(process.pid)
    reader = threading.Thread(target=follow)
    reader.start()
    while process.poll() is None:
        anonymous, mapped = memory(watched)
        peak = peaks.setdefault(phase, {"anonymous": 0, "mapped": 0})
        peak["anonymous"] = max(peak["anonymous"], anonymous)
        peak["mapped"] = max(peak["mapped"], mapped)
        time.sleep(0.1)
    reader.join()
    if process.returncode != 0:
        raise SystemExit("".join(told))
    features = sum(path.stat().st_size for path in (work / f"features-{count}").rglob("*.safe*"))
    return {
        "pairs": count, "steps": steps, "file_bytes": pairs.stat().st_size,
        "feature_bytes": features, "seconds": round(time.monotonic() - start),
        "peak_anonymous_bytes": max(x["anonymous"] for x in peaks.values()),
        "phases": peaks, "anonymous_bytes_by_step": by_step,
    }


def table(runs: list[dict[str, object]]) -> str:
    """Of docs/scale.md: MiB of anonymous memory, at its peak in each phase."""
    phases = ("reading and tokenizing", "features", "training")
    lines = [f"| pairs | steps | file, features [MiB] | {' | '.join(phases)} |",
             f"| ---: | ---: | ---: |{' ---: |' * len(phases)}"]
    for run in runs:
        peaks = [f"{run['phases'][phase]['anonymous'] / 2**20:.0f}" for phase in phases]
        sizes = f"{run['file_bytes'] / 2**20:.0f}, {run['feature_bytes'] / 2**20:.0f}"
        lines.append(f"| {run['pairs']:,} | {run['steps']:,} | {sizes} | {' | '.join(peaks)} |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--pairs", type=int, nargs="+", default=[20_000, 200_000])
    options.add_argument("--long_run", type=int, default=5000, metavar="STEPS", help="0: none")
    options.add_argument("--work", type=Path, help="a folder for files; default: a temporary one")
    options.add_argument("--output", type=Path, default=RESULTS)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
        work = Path(folder)
        save_base(work / "base")
        runs = [measure(count, work) for count in chosen.pairs]
        if chosen.long_run:
            runs.append(measure(PAIRS_OF_LONG_RUN, work, chosen.long_run))
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "what": "qadapter train on a tiny model, features on disk; memory of all its processes, "
        "at its peak in each phase",
        "devices": devices(), "versions": versions(), "runs": runs,
    }
    chosen.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
