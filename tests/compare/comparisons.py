"""A tiny base, two preferences and a comparison of all methods on them, on disk."""

from __future__ import annotations

from pathlib import Path

import yaml
from tiny_models import preference_rows, save_tiny, write_jsonl


def old_rows(count: int) -> list[dict]:
    """The opposite preference, on other prompts."""
    return [
        {
            "prompt": [{"role": "user", "content": "And " + row["prompt"][0]["content"]}],
            "chosen": row["rejected"], "rejected": row["chosen"],
        }
        for row in preference_rows(count)
    ]


def write_place(folder: Path) -> Path:
    save_tiny(folder / "base")
    write_jsonl(folder / "new.jsonl", preference_rows(80))
    write_jsonl(folder / "old.jsonl", old_rows(80))
    (folder / "texts.txt").write_text("What is blue green?\nAlways red and hot, never short.\n")
    return folder


def settings(**changes) -> dict:
    """As a YAML file says it."""
    parts = {"max_length": 64, "validation": 6, "test": 6, "judge": 14}
    return {
        "model_name_or_path": "base", "title": "Tiny & small", "seeds": [0],
        "data": {"dataset_name": "new.jsonl", "train": 11, **parts},
        "old": {"dataset_name": "old.jsonl", "train": 6, **parts},
        "adapter": {"kind": "head", "form": "mlp", "rank": 4},
        "training": {
            "learning_rate": "1e-2", "per_device_train_batch_size": 4, "curve_points": 2,
        },
        "methods": {
            "sft": {"method": "sft"},
            "replay": {"method": "replay"},
            "dpo": {"method": "dpo", "beta": 0.3},
            "rloo": {"method": "rloo", "max_completion_length": 4},
            "q": {"method": "q_adapter", "alpha_0": 0.3, "alpha_tilde": 0.3, "retention_coef": 1},
            "asked": {"method": "prompted", "system": "be red"},
            "back": {"method": "reversed", "of": "q"},
        },
        "sweeps": {
            "alpha": {"of": "q", "option": "alpha", "values": [0.3, 1.0]},
            "form": {"of": "dpo", "option": "adapter.form", "values": ["linear", "mlp"]},
        },
        "reference": "dpo",
        "evaluation": {
            "prompts": 3, "base_samples": 2, "max_new_tokens": 4, "strengths": [1.0, 2.0],
            "retention": [
                {"name": "texts", "file": "texts.txt"},
                {"name": "answers", "file": "old.jsonl", "preferred": True, "max_texts": 5},
            ],
        },
        **changes,
    }


def write_config(folder: Path, name: str = "compare.yaml", **changes) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(settings(**changes), sort_keys=False))
    return path
