"""Folders that trials begin from: a tiny base, preferences, and what commands made of them. Made
once, copied for every trial; every path in a command is relative, so copies are alike.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import forks
import yaml
from comparisons import old_rows, settings
from tiny_models import preference_rows, save_tiny, write_jsonl

from qadapter.system.manifest import MANIFEST_NAME

PAIRS = ("--dataset_name", "pairs.jsonl")
QUICK = ("--answer_prompts", "0", "--bootstrap_resamples", "5")
PLAIN = (
    "train", "--model_name_or_path", "base", *PAIRS, "--output_dir", "run", "--test_fraction", "0",
    "--max_steps", "4", "--learning_rate", "3e-2", "--per_device_train_batch_size", "4",
    "--adapter_kind", "head",
)
"""A short training, of which the adapter is all that is wanted."""
OWN = (*PLAIN, "--retention_dataset_name", "own")
HEAD = (*PLAIN, "--max_steps", "6", "--save_steps", "2")
LORA = (
    *HEAD, "--adapter_kind", "lora", "--lora_r", "2", "--save_total_limit", "2",
    "--cache_features", "disk", "--feature_shard_mb", "1",
)
STREAMED = (*HEAD, "--streaming", "--shuffle_buffer", "5")
MEASURED = (*HEAD, *QUICK, "--test_fraction", "0.3", "--eval_steps", "3")
EVAL = ("eval", "run", *PAIRS, *QUICK, "--max_rows", "2", "--output_dir", "ev")
JUDGE = ("judge", "run", *PAIRS, "--dataset_split", "train", "--num_prompts", "3",
         "--max_new_tokens", "4", "--judge_dataset_name", "new.jsonl", "--output_dir", "judged")
COMPARE = ("compare", "compare.yaml", "--output_dir", "compared")
SEED = ("--seed", "1")



def _break_off(home: Path) -> None:
    """As if the run had been killed between its second checkpoint and its third."""
    for path in (home / "run").iterdir():
        if path.name == "checkpoint-6":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _forget_measures(home: Path) -> None:
    for path in home.glob("compared/*/seed-0/validation.json"):
        path.unlink()


def _keep_caches(home: Path) -> None:
    shutil.rmtree(home / "run")


PLACES: dict[str, tuple[tuple[str, ...] | Callable[[Path], None], ...]] = {
    "bare": (),
    "head": (HEAD,),
    "broken off": (HEAD, _break_off),
    "broken off, another": ((*HEAD, *SEED), _break_off),
    "cached": (LORA, _keep_caches),
    "lora": (LORA,),
    "another": ((*HEAD, *SEED),),
    "plain": (PLAIN,),
    "held to its own": (OWN,),
    "plain lora": ((*PLAIN, "--adapter_kind", "lora", "--lora_r", "2"),),
    "plain, another": ((*PLAIN, *SEED),),
    "merged": (PLAIN, ("export", "run", "--output_dir", "exported")),
    "judged": (PLAIN, JUDGE),
    "compared": (COMPARE,),
    "compared, unmeasured": (COMPARE, _forget_measures),
}
"""Name → what made it, in order: commands, and what was done to the folder by hand."""


class Places:
    """Where the folders are, made as they are asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, name: str) -> Path:
        """The folder of a place; not to be written to."""
        folder = self.folder / name.replace(", ", "-").replace(" ", "-")
        if not folder.is_dir():
            making = self.folder / f"making-{folder.name}"
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir(parents=True)
            forks.call(lambda: _write_inputs(making), making)
            for step in PLACES[name]:
                if callable(step):
                    step(making)
                    continue
                ended = forks.run(step, making)
                if ended.code != 0:
                    raise SystemExit(f"{name}: {step} ended with {ended.code}: {ended.err}")
            making.rename(folder)
        return folder

    def copy(self, name: str, home: Path) -> Path:
        shutil.copytree(self.get(name), home, symlinks=True)
        return home


def _write_inputs(folder: Path) -> None:
    save_tiny(folder / "base")
    save_tiny(folder / "other-base", seed=1)
    write_jsonl(folder / "pairs.jsonl", preference_rows(12))
    write_jsonl(folder / "new.jsonl", preference_rows(80))
    write_jsonl(folder / "old.jsonl", old_rows(80))
    parts = {"train": 6, "validation": 4, "test": 4, "judge": 24, "max_length": 64}
    (folder / "compare.yaml").write_text(yaml.safe_dump(settings(
        data={"dataset_name": "new.jsonl", **parts}, old={"dataset_name": "old.jsonl", **parts},
        methods={
            "sft": {"method": "sft"},
            "q": {"method": "q_adapter", "alpha_0": 0.3, "alpha_tilde": 0.3},
        },
        sweeps={}, reference="sft",
        evaluation={"prompts": 2, "base_samples": 1, "max_new_tokens": 4, "retention": [
            {"name": "answers", "file": "old.jsonl", "preferred": True, "max_texts": 3},
        ]},
    )))


_OF_ONE_RUN = re.compile(
    r"seconds|rss|_at$|date|^environment$|^versions$|^devices$|runtime|per_second|resume|overwrite"
    "|^written$|^sha256$|^should_"  # what was asked of the process that wrote it
)


def facts(home: Path, patterns: Sequence[str] = ("**/*",)) -> dict[str, str]:
    """Name of a file that holds results → what it holds, without what no two runs have alike."""
    found = {}
    for path in sorted({path for pattern in patterns for path in home.glob(pattern)}):
        name = str(path.relative_to(home))
        # A manifest holds digests, of times too; what it lists is looked at here as well.
        if not path.is_file() or name.startswith("cache/") or path.name == MANIFEST_NAME:
            continue
        if path.suffix == ".safetensors":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix in (".json", ".jsonl"):
            text = path.read_text(errors="replace").replace(str(home), "HOME")
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            try:
                found[name] = json.dumps([
                    _timeless(record) for record in map(json.loads, lines)
                    if "train_runtime" not in record  # of one process: a resumed run has none
                ], sort_keys=True)
            except ValueError:
                found[name] = f"not JSON: {text}"
    return found


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if not _OF_ONE_RUN.search(k)}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def names(home: Path) -> set[str]:
    """All files and folders."""
    return {str(path.relative_to(home)) for path in home.rglob("*")}
