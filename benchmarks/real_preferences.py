"""Do head Q-Adapters learn real preferences, and what does the base lose?

Two data sets from ../shared/data beside the repository: HH-RLHF harmless, and DSP's academy answers
against those of the other domains. Every choice is made by cross-validation on the development
prompts; the test prompts are scored once, for the configuration chosen there, with three seeds of
training on all development pairs.

    python benchmarks/real_preferences.py features    # the frozen base runs once; cached on disk
    python benchmarks/real_preferences.py search      # development prompts; resumes
    python benchmarks/real_preferences.py final       # test prompts, once
    python benchmarks/real_preferences.py probe       # a reward model on the same features
    python benchmarks/real_preferences.py report      # results/real_preferences.md, from the lines

Rewards and log-probabilities come from the cached features, in the base's bfloat16, as in training.
KL and perplexity are in float32 from the last hidden states on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from harness import RESULTS, ROOT, environment
from real_preferences_report import write_report
from real_preferences_scores import (
    PairScores,
    accuracies,
    divergence,
    draw,
    probe_margins,
    score_pairs,
)
from torch import Tensor

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterModel
from qadapter.data import load_preferences, split_by_prompt, tokenize_preferences
from qadapter.data.passages import passages
from qadapter.errors import QAdapterError
from qadapter.evaluation.bootstrap import ClusterBootstrap
from qadapter.evaluation.preference import wins
from qadapter.system.progress import silent, tqdm_bar
from qadapter.training import FeatureSet, QAdapterConfig, QAdapterTrainer
from qadapter.training.feature_store import load_or_compute
from qadapter.trunk.loading import cache_dir, load_tokenizer

DATA = ROOT.parent / "shared" / "data"
HELPFUL_FILE, HELPFUL_PAIRS = "hh_rlhf_helpful_transcripts.jsonl", 20
SPLIT_SEED, SEARCH_SEED, FINAL_SEEDS = 1, 0, (1, 2, 3)
FOLDS, FINALISTS = 3, 2
"""Every configuration is trained without the first fold and scored on it; the best few of those
within the bound on KL also on the other folds."""


@dataclass(frozen=True)
class Task:
    """A data set, and how it is cut."""

    file: str
    domain: str | None
    max_length: int
    """Tokens of prompt and answer."""
    test: int
    """Prompts."""
    kl_limit: float
    """Nats a token that a configuration may move on HH-RLHF helpful answers to be chosen."""
    search_pairs: int
    """Pairs of each prompt that the search trains on, drawn at random."""


TASKS = {
    "dsp": Task("dsp_responses.json", "academy", 256, test=100, kl_limit=0.012, search_pairs=2),
    "hh": Task("hh_rlhf_harmless.jsonl", None, 512, test=300, kl_limit=0.03, search_pairs=1),
}


@dataclass(frozen=True)
class Choice:
    """What the development prompts decide. α₀ = α̃ = ``alpha``."""

    alpha: float
    learning_rate: float
    epochs: int
    retention: float
    form: str = "mlp"
    rank: int = 128
    batch: int = 8
    chi2: float = 0.1
    normalization: str = "none"

    def objective(self) -> ObjectiveConfig:
        return ObjectiveConfig(
            alpha_0=self.alpha, alpha_tilde=self.alpha, chi2_coef=self.chi2,
            length_normalization=self.normalization,
            # Divided by the length, V of the prompt would no longer be the same for both answers.
            bootstrap="next" if self.normalization == "none" else "current",
        )


GRID = (
    Choice(1.0, 3e-4, 2, 0),
    Choice(1.0, 3e-4, 2, 10),
    Choice(0.3, 3e-4, 2, 10),
    Choice(1.0, 1e-3, 1, 0),
    Choice(0.3, 3e-4, 2, 30),
    Choice(0.3, 3e-4, 2, 30, rank=512),
    Choice(0.1, 3e-4, 2, 30),
    Choice(0.3, 3e-4, 2, 30, rank=2048),
    Choice(10.0, 3e-4, 2, 0, normalization="completion"),
    Choice(1.0, 3e-4, 2, 0, rank=512),
    Choice(1.0, 1e-3, 2, 0, batch=32),
)


# --- data, features, training, measures ---------------------------------------------------------


class Bench:
    """One task on one base."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.task, self.options = name, TASKS[name], options
        self.tokenizer = load_tokenizer(options.base)
        pairs, report = tokenize_preferences(
            load_preferences(options.data / self.task.file, domain=self.task.domain),
            self.tokenizer, max_length=self.task.max_length,
        )
        development, test = split_by_prompt(pairs, self.task.test, seed=SPLIT_SEED)
        helpful, _ = tokenize_preferences(
            load_preferences(options.data / HELPFUL_FILE, limit=2 * HELPFUL_PAIRS),
            self.tokenizer, max_length=self.task.max_length,
        )
        self.data = {
            "development": development, "test": test,
            "helpful": helpful.select(range(min(HELPFUL_PAIRS, len(helpful)))),
        }
        self.rows = report.summary()
        self.retention_texts = passages(held_to=True)
        self.unrelated_texts = passages(held_to=False)
        self.fresh = QAdapterModel.from_base(options.base)
        """Untrained: its log-probabilities are the base's."""
        self._features: dict[str, FeatureSet] = {}

    def features(self, part: str) -> FeatureSet:
        if part not in self._features:
            with (tqdm_bar if sys.stderr.isatty() else silent)(part, "tokens") as progress:
                self._features[part] = load_or_compute(
                    self.fresh, self.data[part], self.tokenizer, max_length=self.task.max_length,
                    cache_dir=self.options.cache, shard_mb=64, progress=progress,
                )
        return self._features[part]

    def fold(self, number: int) -> tuple[list[int], list[int]]:
        """Development pairs to train on and to score on."""
        prompts = self.data["development"]["prompt_id"][:]
        order = sorted(set(prompts))
        random.Random(SPLIT_SEED).shuffle(order)
        held_out = set(order[number::FOLDS])
        train = [i for i, prompt in enumerate(prompts) if prompt not in held_out]
        scored = [i for i, prompt in enumerate(prompts) if prompt in held_out]
        return _thin(train, prompts, self.task.search_pairs), scored

    def train(self, choice: Choice, seed: int, features: FeatureSet) -> QAdapterModel:
        torch.manual_seed(seed)
        model = QAdapterModel.from_base(
            self.fresh.base, AdapterConfig(form=choice.form, rank=choice.rank), choice.objective()
        )
        with tempfile.TemporaryDirectory() as folder:
            args = QAdapterConfig(
                output_dir=folder, per_device_train_batch_size=choice.batch, seed=seed,
                learning_rate=choice.learning_rate, num_train_epochs=choice.epochs,
                retention_coef=choice.retention, max_length=self.task.max_length,
                save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
            )
            QAdapterTrainer(
                model, args, train_dataset=features, processing_class=self.tokenizer,
                retention_dataset=self.retention_texts if choice.retention else None,
            ).train()
        return model

    def forgetting(self, model: QAdapterModel, answers: FeatureSet) -> dict[str, float]:
        """KL and perplexity, of the same states in every call."""
        kl_answers, _, _ = divergence(model, *_states(answers))
        kl_helpful, _, _ = divergence(model, *_states(self.features("helpful")))
        kl_unrelated, perplexity, perplexity_base = divergence(model, *self.unrelated_states)
        return {
            "kl_answers": kl_answers, "kl_helpful": kl_helpful, "kl_unrelated": kl_unrelated,
            "perplexity": perplexity, "perplexity_base": perplexity_base,
        }

    @functools.cached_property
    def unrelated_states(self) -> tuple[Tensor, Tensor]:
        """(h_b [N, D], the token that follows each [N]) of the texts for measuring."""
        hidden, tokens = [], []
        for text in self.unrelated_texts:
            ids = torch.tensor(self.tokenizer(text)["input_ids"])
            with torch.no_grad():
                hidden.append(self.fresh.base_hidden(ids[None])[0, :-1])
            tokens.append(ids[1:])
        return draw(torch.cat(hidden), torch.cat(tokens))


def _states(features: FeatureSet) -> tuple[Tensor, Tensor]:
    return draw(
        torch.cat([shard.hidden for shard in features.shards]),
        torch.cat([shard.tokens for shard in features.shards]).long(),
    )


def _thin(indices: Sequence[int], prompts: Sequence[str], most: int) -> list[int]:
    """At most so many pairs of each prompt."""
    of_prompt: dict[str, list[int]] = {}
    for index in indices:
        of_prompt.setdefault(prompts[index], []).append(index)
    rng = random.Random(SPLIT_SEED)
    return sorted(i for own in of_prompt.values() for i in rng.sample(own, min(most, len(own))))


class Stopwatch:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self, phase: str) -> dict[str, float]:
        return {
            f"{phase}_seconds": round(time.perf_counter() - self.wall, 1),
            f"{phase}_cpu_seconds": round(time.process_time() - self.cpu, 1),
        }


# --- steps --------------------------------------------------------------------------------------


def run_features(bench: Bench, log: Log) -> None:
    for part, dataset in bench.data.items():
        stored = set(bench.options.cache.rglob("*.safetensors"))
        watch = Stopwatch()
        features = bench.features(part)
        if set(bench.options.cache.rglob("*.safetensors")) != stored:
            log.add(
                "features", bench.name, part=part, pairs=len(features),
                prompts=len(set(dataset["prompt_id"])), answer_tokens=features.num_actions,
                max_length=bench.task.max_length, rows=bench.rows, **watch.read("feature"),
            )


def run_search(bench: Bench, log: Log) -> None:
    for choice in GRID[: bench.options.most]:
        search_fold(bench, log, choice, 0)
    for row in finalists(log.rows("search", bench.name), bench.task.kl_limit):
        for number in range(1, FOLDS):
            search_fold(bench, log, Choice(**row["choice"]), number)


def search_fold(bench: Bench, log: Log, choice: Choice, number: int) -> None:
    """Train without one fold, score it, write a line; not again if the line is there."""
    asked = dataclasses.asdict(choice)
    if any((row["choice"], row["fold"]) == (asked, number)
           for row in log.rows("search", bench.name)):
        return
    train, scored = bench.fold(number)
    features, held_out = (bench.features("development").select(i) for i in (train, scored))
    watch = Stopwatch()
    model = bench.train(choice, SEARCH_SEED, features)
    seconds = watch.read("training")
    right = wins(score_pairs(model, held_out).reward_margin)
    base = score_pairs(bench.fresh, held_out)
    log.add(
        "search", bench.name, choice=asked, fold=number, seed=SEARCH_SEED,
        train_pairs=len(train), pairs=len(scored), right=right.sum(), accuracy=right.mean(),
        base_right=wins(base.mean_logp_margin).sum(), **bench.forgetting(model, held_out),
        **seconds,
    )


def finalists(rows: Sequence[dict[str, Any]], kl_limit: float) -> list[dict[str, Any]]:
    """Best first, by the first fold."""
    within = [row for row in rows if row["fold"] == 0 and row["kl_helpful"] <= kl_limit]
    return sorted(within, key=lambda row: -row["accuracy"])[:FINALISTS]


def chosen(rows: Sequence[dict[str, Any]], kl_limit: float) -> Choice:
    """The finalist with the most pairs right over all folds; of equals, the one that moves the
    base less."""
    found = []
    for finalist in finalists(rows, kl_limit):
        own = [row for row in rows if row["choice"] == finalist["choice"]]
        kl = float(np.mean([row["kl_helpful"] for row in own]))
        if len(own) == FOLDS and kl <= kl_limit:
            found.append((-sum(row["right"] for row in own), kl, finalist["choice"]))
    if not found:
        raise QAdapterError(f"no configuration was searched to its end within KL {kl_limit}")
    return Choice(**min(found, key=lambda f: f[:2])[2])


def run_final(bench: Bench, log: Log) -> None:
    if log.rows("final", bench.name):
        raise QAdapterError(f"{bench.name}: the test split has been scored: it is scored once")
    searched = log.rows("search", bench.name)
    if not searched:
        raise QAdapterError(f"{bench.name}: nothing to choose from: run the search first")
    choice = chosen(searched, bench.task.kl_limit)
    development, test = bench.features("development"), bench.features("test")
    prompts = bench.data["test"]["prompt_id"][:]
    bootstrap = ClusterBootstrap(prompts)
    base = score_pairs(bench.fresh, test)
    right = []
    for seed in FINAL_SEEDS:
        watch = Stopwatch()
        model = bench.train(choice, seed, development)
        seconds = watch.read("training")
        scores = score_pairs(model, test)
        right.append(wins(scores.reward_margin))
        log.add(
            "final", bench.name, choice=dataclasses.asdict(choice), seed=seed,
            **accuracies(scores, bootstrap), **bench.forgetting(model, test), **seconds,
        )
    right_P = np.mean(right, axis=0)
    log.add(
        "mean", bench.name, choice=dataclasses.asdict(choice), seeds=FINAL_SEEDS,
        train_pairs=len(development), pairs=len(prompts), prompts=len(set(prompts)),
        **bootstrap.mean(right_P).as_dict("accuracy"),
        accuracy_seed_sd=float(np.std([r.mean() for r in right], ddof=1)),
        **bootstrap.mean(right_P - wins(base.mean_logp_margin)).as_dict("gain_over_base_mean"),
        **baselines(base, bench.data["development"], bootstrap),
    )


def baselines(base: PairScores, training: Dataset, bootstrap: ClusterBootstrap) -> dict[str, Any]:
    """What the base's log-probabilities score, and length in the sense the training pairs have."""
    longer = np.mean([
        np.sign(len(chosen) - len(rejected))
        for chosen, rejected in zip(training["chosen_ids"], training["rejected_ids"], strict=True)
    ])
    sign = 1 if longer > 0 else -1
    margins = {
        "base_sum": base.logp_margin, "base_mean": base.mean_logp_margin,
        "length": sign * (base.tokens[:, 0] - base.tokens[:, 1]),
    }
    found: dict[str, Any] = {"length_baseline": "longer" if sign > 0 else "shorter"}
    for name, margin in margins.items():
        found |= bootstrap.mean(wins(margin)).as_dict(f"accuracy_{name}")
    return found


def run_probe(bench: Bench, log: Log) -> None:
    """A baseline of the report: it chooses nothing."""
    margin_P = probe_margins(
        bench.features("development"), bench.data["development"]["prompt_id"][:],
        bench.features("test"),
    )
    bootstrap = ClusterBootstrap(bench.data["test"]["prompt_id"][:])
    log.add("probe", bench.name, **bootstrap.mean(wins(margin_P)).as_dict("accuracy"))


STEPS = {
    "features": run_features, "search": run_search, "final": run_final, "probe": run_probe,
}


class Log:
    """One JSON line a measurement, as soon as it is there."""

    def __init__(self, folder: Path, base: str) -> None:
        self.path = folder / "real_preferences.jsonl"
        machine = environment("cpu", None) | {"cores": os.cpu_count()}
        self.fixed = {"base": base, "environment": machine}

    def add(self, step: str, data: str, **fields: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = {"step": step, "data": data, **fields, **self.fixed}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=float, ensure_ascii=False) + "\n")
        shown = ("choice", "fold", "seed", "part", "pairs", "accuracy", "kl_answers", "kl_helpful",
                 "training_seconds", "feature_seconds")
        told = {key: row[key] for key in shown if key in row}
        print(step, data, json.dumps(told, default=float), flush=True)

    def rows(self, step: str, data: str) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        rows = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        return [row for row in rows if (row["step"], row["data"]) == (step, data)]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=[*STEPS, "report"])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--most", type=int, default=len(GRID), metavar="N",
                        help="search the first N configurations only")
    parser.add_argument("--base", default="smollm2@wheel", help="name or folder of the base")
    parser.add_argument("--data", type=Path, default=DATA, metavar="FOLDER")
    parser.add_argument("--cache", type=Path, default=cache_dir() / "features", metavar="FOLDER",
                        help="for the features of the frozen base")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's own choice")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    disable_progress_bar()
    try:
        if options.step != "report":
            needed = [TASKS[name].file for name in options.tasks] + [HELPFUL_FILE]
            missing = [str(options.data / n) for n in needed if not (options.data / n).is_file()]
            if missing:
                raise QAdapterError(f"real preference data is not there: {', '.join(missing)}")
            log = Log(options.output, options.base)
            for name in options.tasks:
                STEPS[options.step](Bench(name, options), log)
        write_report(options.output)
    except QAdapterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
