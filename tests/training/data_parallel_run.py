"""One process of a data-parallel run on the tiny model; test_data_parallel.py starts two."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import peft
import torch
from accelerate.utils import gather_object
from training_tiny import build_model, build_pairs, build_tokenizer

from qadapter.system.processes import leave_group
from qadapter.training import QAdapterConfig, QAdapterTrainer, feature_store, features

ADAPTERS = {
    "head": None,
    "lora": peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1]),
}


def run(folder: Path, batch_size: int, cache_features: str, adapter: str) -> None:
    """Three epochs over 16 pairs with an optimizer that is linear in the gradient; then once more
    from a checkpoint on.

    Args:
        adapter: a head adapter, or a LoRA in the upper of two blocks.
    """
    trainer = build(folder, batch_size, cache_features, adapter)
    trainer.train()
    metrics = trainer.evaluate(build_pairs(7, seed=1))
    resumed = build(folder, batch_size, cache_features, adapter)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    alike = all(
        torch.equal(a, b) for (_, a), (_, b) in zip(
            sorted(trainer.model.adapter.state_dict().items()),
            sorted(resumed.model.adapter.state_dict().items()), strict=True,
        )
    )
    streamed = streaming(folder / "streamed", batch_size, adapter)
    computed = gather_object([COMPUTED])
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "metrics": metrics, "logs": logs, "processes": trainer.accelerator.num_processes,
            "resumed_alike": alike, "streamed": streamed, "computed": computed,
        }
        (folder / "result.json").write_text(json.dumps(result))


def streaming(folder: Path, batch_size: int, adapter: str) -> list[float]:
    """Losses of six steps on a stream, the last three after a resume."""
    arguments = {
        "max_steps": 6, "shuffle_buffer": 5, "save_steps": 3, "save_total_limit": None,
        "train_sampling_strategy": "random",
    }
    first = build(folder, batch_size, "auto", adapter, True, **arguments)
    first.train()
    resumed = build(folder, batch_size, "auto", adapter, True, **arguments)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        for trainer in (first, resumed)
    ]
    assert losses[0] == losses[1], losses
    return losses[0]


COMPUTED: list[list[int]] = []
"""Rows of the shards that this process has computed; they are of three pairs."""


def counting(model, dataset, *arguments):
    COMPUTED.append(list(dataset["row"]))
    return features.compute_shard(model, dataset, *arguments)


def build(
    folder: Path, batch_size: int, cache_features: str, adapter: str, stream: bool = False,
    **changes,
) -> QAdapterTrainer:
    model = build_model(ADAPTERS[adapter])
    rate = 1.0 if adapter == "head" else 0.1
    optimizer = torch.optim.SGD(model.adapter.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    settings = {
        "output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
        "seed": 0, "num_train_epochs": 3, "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2,
        "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2,
        "ddp_backend": "gloo" if "WORLD_SIZE" in os.environ else None,
        "cache_features": cache_features, "feature_cache_dir": str(folder / "features"),
        "train_sampling_strategy": "sequential", "retention_coef": 0.0,
    }
    pairs = build_pairs(16)
    return QAdapterTrainer(
        model, QAdapterConfig(**settings | changes),
        train_dataset=pairs.to_iterable_dataset(num_shards=2) if stream else pairs,
        processing_class=build_tokenizer(), optimizers=(optimizer, scheduler),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    feature_store.compute_shard, feature_store._MOST_PAIRS = counting, 3
    run(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
    leave_group()
    threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in threads), threads  # none meets the interpreter's end
