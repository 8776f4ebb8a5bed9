"""Results of a comparison that were written by hand, so that nothing is trained."""

from __future__ import annotations

from pathlib import Path

from qadapter.compare.config import BASE
from qadapter.compare.kinds import Prompted
from qadapter.compare.run import run_folder
from qadapter.evaluation.report import write_json

JUDGE = "hidden-state judge"


def estimate(name: str, value: float | None) -> dict:
    return {name: value, f"{name}_ci": None if value is None else [value - 0.1, value + 0.1]}


def measured(config, strengths, kl=0.2, number=0.6, judges=None) -> dict:
    """A run's file, as ``run_comparison`` writes it. ``judges``: name → accuracy, which is
    also the gain that each gives."""
    texts = [texts.name for texts in config.evaluation.retention]
    preferences = {
        "prompt_ids": ["a", "a", "b"], "reward_margins": [number, number, None],
        "longer_wins": 0.25, "shorter_wins": 0.75, "random_baseline": 0.5,
    }
    for name in ("", "_length_controlled", "_policy_mean", "_base_mean"):
        preferences |= estimate(f"preference_accuracy{name}", number)
    preferences |= estimate("log_loss", number)
    kept = {"kl_by_text": [kl, kl]}
    for name, value in (("kl_per_token", kl), ("top1_agreement", number), ("perplexity", number),
                        ("perplexity_base", number)):
        kept |= estimate(name, value)
    judged = {
        name: {**estimate("win_rate", x), **estimate("gain", x), "gain_by_prompt": [x, x]}
        for name, x in (judges or {JUDGE: number}).items()
    }
    answers = {
        "judged": judged, "kl_of_own_answers": kl, "kl_on_base_answers": kl,
        "statistics": {"words_mean": number, "distinct_3": number},
    }
    return {
        "preferences": {
            "new": preferences, "old": {**preferences, "policy_margins": [number] * 5},
        },
        "dial": [
            {"strength": strength, "retention": dict.fromkeys(texts, kept),
             "answers": {"new": answers, "old": answers}} for strength in strengths
        ],
    }


def write_results(config, folder: Path, **numbers) -> Path:
    """A finished comparison's folder."""
    environment = {"machine": "<this>"}
    accuracies = numbers.get("judges", {JUDGE: numbers.get("number", 0.6)})
    judges = {kind: {name: estimate("accuracy", x) for name, x in accuracies.items()}
              for kind in ("new", "old")}
    write_json(folder / "config.json", config.as_dict())
    write_json(folder / BASE / "validation.json", {
        "name": BASE, **measured(config, [0.0], **numbers), "judges": judges,
        "environment": environment,
    })
    curve = [{"tokens": 1000 * i, "kl_per_token": numbers.get("kl", 0.2),
              "top1_agreement": numbers.get("number", 0.6)} for i in (1, 2)]
    for row in config.rows():
        for seed in row.seeds:
            where = run_folder(folder, row.name, seed)
            strengths = [0.0] if isinstance(row.method, Prompted) else [1.0, 2.0]
            write_json(where / "validation.json", {
                "name": row.name, "seed": seed, **measured(config, strengths, **numbers),
            })
            if row.method.trained:
                write_json(where / "training.json", {
                    "seed": seed, "trained_by": "<us>", "steps": 4, "tokens": 9, "seconds": 1.0,
                    "trainable_parameters": 9, "processor_seconds": 1.0, "curve": curve,
                    "options": {"note": "</td><script>"},
                })
    return folder
