"""What the base learns before anything is compared, so that there is something to forget."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from qadapter.adapters.head_adapter import AdapterConfig
from qadapter.compare.config import FIRST_NAME, FirstSpec
from qadapter.compare.data import PreferenceData
from qadapter.evaluation import evaluate_preferences
from qadapter.evaluation.report import write_json
from qadapter.exporting.export import export
from qadapter.objective import ObjectiveConfig
from qadapter.policy.model import QAdapterModel
from qadapter.system.scratch import scratch_folder
from qadapter.training import QAdapterConfig, QAdapterTrainer
from qadapter.trunk.loading import LoadedBase


def teach_first(
    spec: FirstSpec, base: LoadedBase, old: PreferenceData, tokenizer: PreTrainedTokenizerBase,
    folder: Path, say: Callable[[str], None],
) -> None:
    """Train a linear head adapter on the old preference, by DPO's loss, and write the base with it
    merged in to ``folder/first``; how it ranks the held-out old pairs, to ``folder/first.json``."""
    say(f"the base learns the old preference first: {len(old.train.tokens):,} pairs")
    torch.manual_seed(spec.seed)
    model = QAdapterModel.from_base(
        base, AdapterConfig(form="linear", rank=spec.rank),
        ObjectiveConfig(alpha_0=spec.beta, alpha_tilde=spec.beta, chi2_coef=0.0),
    )
    start = time.perf_counter()
    with scratch_folder(tempfile.gettempdir(), "training") as scratch:
        trainer = QAdapterTrainer(model, QAdapterConfig(
            output_dir=str(scratch), seed=spec.seed, learning_rate=spec.learning_rate,
            num_train_epochs=spec.num_train_epochs, cache_features="disk",
            retention_coef=0.0,
            per_device_train_batch_size=spec.per_device_train_batch_size,
            save_strategy="no", report_to="none", disable_tqdm=True,
        ), train_dataset=old.train.tokens, processing_class=tokenizer)
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.train()
    seconds = time.perf_counter() - start
    found = evaluate_preferences(model.eval(), old.validation.tokens).as_dict()
    del found["reliability_bins"]
    write_json(folder / f"{FIRST_NAME}.json", {
        "options": dataclasses.asdict(spec), "pairs": len(old.train.tokens),
        "steps": trainer.state.global_step, "seconds": seconds, "validation": found,
    })
    export(model, folder / FIRST_NAME, "merged", tokenizer=tokenizer)
    say(f"it learned in {seconds:.0f} s: held-out old pairs ranked right by log-probability a "
        f"token {found['preference_accuracy_policy_mean']:.3f}, before "
        f"{found['preference_accuracy_base_mean']:.3f}")
