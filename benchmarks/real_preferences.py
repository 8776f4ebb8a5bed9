"""Do head Q-Adapters learn real preferences, and what does the base lose?

Two data sets from ../shared/data beside the repository: HH-RLHF harmless, and DSP's academy answers
against those of the other domains. Every choice is made on a validation split; the test split is
scored once, for the configuration chosen there, with three seeds of training.

    python benchmarks/real_preferences.py features    # the frozen base runs once; cached on disk
    python benchmarks/real_preferences.py search      # validation split; resumes where it stopped
    python benchmarks/real_preferences.py final       # test split, once
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
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from harness import RESULTS, ROOT, environment
from real_preferences_report import write_report
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterModel
from qadapter.base import cache_dir, load_tokenizer
from qadapter.data import load_preferences, split_by_prompt, tokenize_preferences
from qadapter.errors import QAdapterError
from qadapter.evaluation.scoring import Scorer, evaluating
from qadapter.training import FeatureSet, QAdapterConfig, QAdapterTrainer
from qadapter.training.feature_store import load_or_compute
from qadapter.training.features import FeatureCollator
from qadapter.training.losses import batch_loss

DATA = ROOT.parent / "shared" / "data"
UNRELATED = ROOT / "qadapter" / "demo" / "data" / "unrelated.jsonl"
HELPFUL_FILE = "hh_rlhf_helpful_transcripts.jsonl"
RETENTION_GENRES = ("story", "reference", "dialogue", "instructions")
"""Of the unrelated texts: these for the retention term, the others for measuring."""
SPLIT_SEED, SEARCH_SEED, FINAL_SEEDS = 0, 0, (1, 2, 3)
KL_STATES = 1500
"""States of each kind of text at which KL and perplexity are measured, drawn once."""
KL_LIMIT = 0.03
"""Nats a token that a configuration may move on HH-RLHF helpful answers to be chosen."""
BATCH_PAIRS, RANK = 8, 128


@dataclass(frozen=True)
class Task:
    """A data set and how it is cut; sizes in prompts."""

    title: str
    file: str
    domain: str | None
    max_length: int
    """Tokens of prompt and answer."""
    train: int
    validation: int
    test: int
    pairs_per_prompt: int = 4
    """Of training and validation prompts, drawn at random; test prompts keep all."""


TASKS = {
    "dsp": Task("DSP, academy against each other domain", "dsp_responses.json", "academy", 160,
                300, 98, 100, pairs_per_prompt=2),
    "hh": Task("HH-RLHF harmless", "hh_rlhf_harmless.jsonl", None, 192, 750, 150, 150),
}


@dataclass(frozen=True)
class Choice:
    """What the validation split decides. α₀ = α̃ = ``alpha``."""

    alpha: float
    learning_rate: float
    epochs: int
    retention: float
    form: str = "mlp"
    chi2: float = 0.1

    def objective(self) -> ObjectiveConfig:
        return ObjectiveConfig(
            alpha_0=self.alpha, alpha_tilde=self.alpha, chi2_coef=self.chi2
        )


GRID = (
    Choice(0.3, 1e-3, 1, 10),
    Choice(0.3, 3e-4, 2, 10),
    Choice(1.0, 1e-3, 1, 0),
    Choice(0.1, 3e-4, 2, 10),
    Choice(1.0, 3e-4, 2, 0),
    Choice(0.3, 3e-4, 1, 10),
    Choice(0.3, 3e-4, 2, 10, form="linear"),
    Choice(0.3, 3e-4, 2, 10, chi2=0.0),
    Choice(0.3, 1e-3, 2, 10),
    Choice(0.1, 1e-3, 1, 10),
    Choice(0.3, 1e-3, 1, 0),
    Choice(1.0, 1e-3, 1, 10),
)


# --- data and features --------------------------------------------------------------------------


class Prepared(NamedTuple):
    """Tokenized pairs of each part, and what became of the rows."""

    train: Dataset
    validation: Dataset
    test: Dataset
    helpful: Dataset
    """Answers of HH-RLHF helpful: ordinary assistant's text that nothing here trains on."""
    summary: str


def prepare(task: Task, data: Path, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, tokenize and split by prompt, with a seed of its own."""
    pairs = load_preferences(data / task.file, domain=task.domain)
    tokenized, report = tokenize_preferences(pairs, tokenizer, max_length=task.max_length)
    train, validation, test = split_by_prompt(
        tokenized, (task.validation, task.test), seed=SPLIT_SEED
    )
    first_prompts = set(list(dict.fromkeys(train["prompt_id"]))[: task.train])
    train = train.select([i for i, p in enumerate(train["prompt_id"]) if p in first_prompts])
    helpful, _ = tokenize_preferences(
        load_preferences(data / HELPFUL_FILE, limit=40), tokenizer, max_length=task.max_length
    )
    return Prepared(
        _thin(train, task.pairs_per_prompt), _thin(validation, task.pairs_per_prompt), test,
        helpful.select(range(min(20, len(helpful)))), report.summary(),
    )


def _thin(pairs: Dataset, most: int) -> Dataset:
    """At most so many pairs of each prompt."""
    of_prompt: dict[str, list[int]] = {}
    for index, prompt in enumerate(pairs["prompt_id"]):
        of_prompt.setdefault(prompt, []).append(index)
    rng = random.Random(SPLIT_SEED)
    return pairs.select(
        sorted(i for own in of_prompt.values() for i in rng.sample(own, min(most, len(own))))
    )


class Stopwatch:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self, phase: str) -> dict[str, float]:
        return {
            f"{phase}_seconds": round(time.perf_counter() - self.wall, 1),
            f"{phase}_cpu_seconds": round(time.process_time() - self.cpu, 1),
        }


class Bench:
    """One task on one base: its data, cached features, training and scores."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.task, self.options = name, TASKS[name], options
        self.tokenizer = load_tokenizer(options.base)
        self.data = prepare(self.task, options.data, self.tokenizer)
        texts = [json.loads(line) for line in UNRELATED.read_text(encoding="utf-8").splitlines()]
        self.retention_texts = [t["text"] for t in texts if t["genre"] in RETENTION_GENRES]
        self.unrelated_texts = [t["text"] for t in texts if t["genre"] not in RETENTION_GENRES]
        self.fresh = QAdapterModel.from_base(options.base)
        """Untrained: its log-probabilities are the base's."""

    def model(self, choice: Choice, seed: int) -> QAdapterModel:
        torch.manual_seed(seed)
        return QAdapterModel.from_base(
            self.fresh.base, AdapterConfig(form=choice.form, rank=RANK), choice.objective()
        )

    def features(self, part: str) -> FeatureSet:
        return load_or_compute(
            self.fresh, getattr(self.data, part), self.tokenizer, max_length=self.task.max_length,
            cache_dir=self.options.cache, shard_mb=32, show_progress=sys.stderr.isatty(),
        )

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

    def train(self, choice: Choice, seed: int) -> QAdapterModel:
        model = self.model(choice, seed)
        with tempfile.TemporaryDirectory() as folder:
            args = QAdapterConfig(
                output_dir=folder, per_device_train_batch_size=BATCH_PAIRS, seed=seed,
                learning_rate=choice.learning_rate, num_train_epochs=choice.epochs,
                retention_coef=choice.retention, max_length=self.task.max_length,
                save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
            )
            QAdapterTrainer(
                model, args, train_dataset=self.features("train"),
                processing_class=self.tokenizer,
                retention_dataset=self.retention_texts if choice.retention else None,
            ).train()
        return model

    def measure(self, model: QAdapterModel, part: str, base: PairScores) -> dict[str, Any]:
        """Accuracies, KL and perplexity on a held-out part."""
        scores = score_pairs(model, self.features(part))
        prompts = getattr(self.data, part)["prompt_id"][:]
        right = wins(scores.reward_margin)
        kl_answers, _, _ = divergence(model, *sample_states(self.features(part)))
        kl_helpful, _, _ = divergence(model, *sample_states(self.features("helpful")))
        kl_unrelated, ppl, ppl_base = divergence(model, *self.unrelated_states)
        return {
            "pairs": len(prompts), "prompts": len(set(prompts)),
            "accuracy": right.mean(), "accuracy_se": clustered_se(right, prompts),
            "accuracy_length_controlled": length_controlled(right, scores.tokens),
            "accuracy_policy_sum": wins(scores.logp_margin).mean(),
            "accuracy_policy_mean": wins(scores.mean_logp_margin).mean(),
            "gain_over_base_mean": (right - wins(base.mean_logp_margin)).mean(),
            "gain_over_base_mean_se": clustered_se(right - wins(base.mean_logp_margin), prompts),
            "kl_answers": kl_answers, "kl_helpful": kl_helpful, "kl_unrelated": kl_unrelated,
            "perplexity": ppl, "perplexity_base": ppl_base, "right": right,
        }

    def baselines(self, part: str, base: PairScores) -> dict[str, Any]:
        """What the base's log-probabilities score, and length in the sense the training pairs
        have."""
        prompts = getattr(self.data, part)["prompt_id"][:]
        train = self.data.train
        longer = np.mean([
            np.sign(len(c) - len(r))
            for c, r in zip(train["chosen_ids"], train["rejected_ids"], strict=True)
        ])
        found: dict[str, Any] = {"length_baseline": "longer" if longer > 0 else "shorter"}
        margins = {
            "base_sum": base.logp_margin, "base_mean": base.mean_logp_margin,
            "length": (base.tokens[:, 0] - base.tokens[:, 1]) * (1 if longer > 0 else -1),
        }
        for name, margin in margins.items():
            found[f"accuracy_{name}"] = wins(margin).mean()
            found[f"accuracy_{name}_se"] = clustered_se(wins(margin), prompts)
        return found


# --- scores -------------------------------------------------------------------------------------


class PairScores(NamedTuple):
    """One entry a pair, in the data set's order; P pairs, chosen first."""

    rewards: np.ndarray
    """R [P, 2]."""
    logps: np.ndarray
    """Σ log π̃ [P, 2]."""
    tokens: np.ndarray
    """Of the answers [P, 2]."""

    @property
    def reward_margin(self) -> np.ndarray:
        return self.rewards[:, 0] - self.rewards[:, 1]

    @property
    def logp_margin(self) -> np.ndarray:
        return self.logps[:, 0] - self.logps[:, 1]

    @property
    def mean_logp_margin(self) -> np.ndarray:
        means = self.logps / self.tokens
        return means[:, 0] - means[:, 1]


@torch.no_grad()
def score_pairs(model: QAdapterModel, features: FeatureSet) -> PairScores:
    """Without gradients, from cached features."""
    collate = FeatureCollator()
    outputs = []
    with evaluating(model):
        for start in range(0, len(features), BATCH_PAIRS):
            pairs = [features[i] for i in range(start, min(start + BATCH_PAIRS, len(features)))]
            loss = batch_loss(model, collate(pairs))
            # Columns: number of actions, then losses.PER_PAIR; log-probabilities are its last two.
            outputs.append(torch.cat([loss.rewards, loss.columns[:, 6:8]], dim=1).double())
    rewards, logps = torch.cat(outputs).numpy().reshape(-1, 2, 2).swapaxes(0, 1)
    tokens = np.array([features[i].num_actions for i in range(len(features))])
    return PairScores(rewards, logps, tokens)


def sample_states(features: FeatureSet) -> tuple[Tensor, Tensor]:
    """(h_b, action) at the same random states in every call."""
    return draw(
        torch.cat([shard.hidden for shard in features.shards]),
        torch.cat([shard.tokens for shard in features.shards]).long(),
    )


def draw(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    drawn = torch.randperm(len(tokens), generator=generator)[:KL_STATES]
    return hidden[drawn], tokens[drawn]


def divergence(
    model: QAdapterModel, hidden: Tensor, tokens: Tensor
) -> tuple[float, float, float]:
    """Mean KL(π‖π̃) in nats a token, perplexity of π̃ and of π; float32."""
    with evaluating(model):
        scores = Scorer(model).score(model.adapter(hidden), hidden, tokens)
    return (
        scores.kl_base_policy.double().mean().item(),
        (-scores.policy_logprob.double().mean()).exp().item(),
        (-scores.base_logprob.double().mean()).exp().item(),
    )


def wins(margin_P: np.ndarray) -> np.ndarray:
    """A tie is half right."""
    return (np.sign(margin_P) + 1) / 2


def length_controlled(right_P: np.ndarray, tokens_P2: np.ndarray) -> float | None:
    """Mean of the accuracies where the chosen answer is the longer and where it is the shorter
    one: 0.5 for whatever looks at length alone."""
    longer = np.sign(tokens_P2[:, 0] - tokens_P2[:, 1])
    groups = [right_P[longer == sign] for sign in (1, -1)]
    return None if not all(map(len, groups)) else float(np.mean([g.mean() for g in groups]))


def clustered_se(x_P: np.ndarray, clusters: Sequence[str]) -> float:
    """Standard error of a mean over items that come in clusters (pairs of one prompt)."""
    _, number = np.unique(list(clusters), return_inverse=True)
    sums = np.bincount(number, x_P - x_P.mean())
    return float(np.sqrt((sums**2).sum() * len(sums) / max(len(sums) - 1, 1)) / len(x_P))


# --- steps --------------------------------------------------------------------------------------


def run_features(bench: Bench, log: Log) -> None:
    for part in ("train", "validation", "helpful", "test"):
        stored = set(bench.options.cache.rglob("*.safetensors"))
        watch = Stopwatch()
        features = bench.features(part)
        if set(bench.options.cache.rglob("*.safetensors")) != stored:
            dataset = getattr(bench.data, part)
            log.add(
                "features", bench.name, part=part, pairs=len(features),
                prompts=len(set(dataset["prompt_id"])), answer_tokens=features.num_actions,
                max_length=bench.task.max_length, rows=bench.data.summary,
                **watch.read("feature"),
            )


def run_search(bench: Bench, log: Log) -> None:
    done = [row["choice"] for row in log.rows("search", bench.name)]
    base = None
    for choice in GRID[: bench.options.most]:
        if dataclasses.asdict(choice) in done:
            continue
        if base is None:
            base = score_pairs(bench.fresh, bench.features("validation"))
        add_run(bench, log, "search", "validation", choice, SEARCH_SEED, base)


def add_run(
    bench: Bench, log: Log, step: str, part: str, choice: Choice, seed: int, base: PairScores
) -> np.ndarray:
    """Train, measure, write a line; returns which pairs were right."""
    watch = Stopwatch()
    model = bench.train(choice, seed)
    seconds = watch.read("training")
    watch = Stopwatch()
    measured = bench.measure(model, part, base)
    right = measured.pop("right")
    log.add(
        step, bench.name, choice=dataclasses.asdict(choice), seed=seed, **measured,
        **bench.baselines(part, base), **seconds, **watch.read("evaluation"),
    )
    return right


def best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The highest accuracy among those within ``KL_LIMIT``; of equals, the one that moves the base
    less."""
    within = [row for row in rows if row["kl_helpful"] <= KL_LIMIT]
    if not within:
        raise QAdapterError(f"no configuration of the search stays within KL {KL_LIMIT}")
    return max(within, key=lambda row: (round(row["accuracy"], 4), -row["kl_helpful"]))


def run_final(bench: Bench, log: Log) -> None:
    if log.rows("final", bench.name):
        raise QAdapterError(f"{bench.name}: the test split has been scored: it is scored once")
    searched = log.rows("search", bench.name)
    if not searched:
        raise QAdapterError(f"{bench.name}: nothing to choose from: run the search first")
    choice = Choice(**best(searched)["choice"])
    base = score_pairs(bench.fresh, bench.features("test"))
    right_SP = np.stack([
        add_run(bench, log, "final", "test", choice, seed, base) for seed in FINAL_SEEDS
    ])
    prompts = bench.data.test["prompt_id"][:]
    gain_P = right_SP.mean(0) - wins(base.mean_logp_margin)
    log.add(
        "mean", bench.name, choice=dataclasses.asdict(choice), seeds=FINAL_SEEDS,
        searched=len(searched), pairs=len(prompts), prompts=len(set(prompts)),
        accuracy=right_SP.mean(), accuracy_se=clustered_se(right_SP.mean(0), prompts),
        accuracy_seed_sd=right_SP.mean(1).std(ddof=1),
        gain_over_base_mean=gain_P.mean(), gain_over_base_mean_se=clustered_se(gain_P, prompts),
    )


STEPS = {"features": run_features, "search": run_search, "final": run_final}


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
        shown = ("seed", "choice", "pairs", "accuracy", "kl_answers", "training_seconds",
                 "feature_seconds")
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
