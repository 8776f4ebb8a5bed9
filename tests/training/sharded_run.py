"""One process of runs on sharded bases; test_sharded.py starts several."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from training_tiny import build_pairs, build_tokenizer
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from qadapter import AdapterConfig, QAdapterModel
from qadapter.training import QAdapterConfig, QAdapterTrainer

ADAPTERS = {
    "linear": lambda: AdapterConfig(rank=4),
    "block": lambda: AdapterConfig(form="block", rank=4),
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "top-lora": lambda: peft.LoraConfig(
        r=2, target_modules=["v_proj", "up_proj"], layers_to_transform=[1]
    ),
}
RUNS = {
    # name: adapter, base, cache_features, what it is held to
    "linear": ("linear", "tied", "none", 0.0),
    "linear cached": ("linear", "untied", "disk", 0.5),
    "block": ("block", "untied", "memory", 0.5),
    "lora": ("lora", "tied", "none", 0.5),
    "top-lora": ("top-lora", "untied", "disk", 0.5),
    "top-lora none": ("top-lora", "tied", "none", 0.0),
}
PAIRS = 24
STEP = 8
"""Pairs of an optimizer step, on all processes together."""
TEXTS = ["w1 w2 w3 w4 w5 w6 w7", "w9 w8 w7 w6", "w20 w21 w22 w23 w24 w25"]


def build(
    folder: Path, name: str, bases: Path, output: str, processes: int, **options
) -> QAdapterTrainer:
    adapter, base, cache, coef = RUNS[name]
    sharding = {}
    if processes > 1:
        sharding = {"distributed_config": DistributedConfig(fsdp_size=processes)}
    base = AutoModelForCausalLM.from_pretrained(bases / base, dtype=torch.float32, **sharding)
    # Other numbers on every process: what they start from is the first one's.
    torch.manual_seed(dist.get_rank() if processes > 1 else 0)
    model = QAdapterModel.from_base(base, ADAPTERS[adapter]())
    optimizer = torch.optim.SGD(model.adapter.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    arguments = QAdapterConfig(
        output_dir=str(folder / output), use_cpu=True, disable_tqdm=True, logging_steps=1, seed=0,
        num_train_epochs=1, per_device_train_batch_size=STEP // 2 // processes,
        gradient_accumulation_steps=2, per_device_eval_batch_size=2, save_strategy="steps",
        save_steps=1, ddp_backend="gloo" if processes > 1 else None, cache_features=cache,
        feature_cache_dir=str(folder / f"features-{output}"), feature_shard_mb=1,
        train_sampling_strategy="sequential", retention_coef=coef, retention_states=8,
        report_to="none", **options,
    )
    return QAdapterTrainer(
        model, arguments, train_dataset=build_pairs(PAIRS), processing_class=build_tokenizer(),
        optimizers=(optimizer, scheduler), retention_dataset=TEXTS if coef else None,
    )


def run(folder: Path, bases: Path, processes: int) -> None:
    """All runs; their results are in ``results.json``."""
    results = {}
    for name in RUNS:
        trainer = build(folder, name, bases, name, processes)
        before = trainer.evaluate(build_pairs(5, seed=2))  # fewer than a batch each, and uneven
        trainer.train()
        weights = {n: x.detach().clone() for n, x in trainer.model.adapter.state_dict().items()}
        after = trainer.evaluate(build_pairs(7, seed=1))
        prompt = torch.tensor([[5, 6, 7 + (dist.get_rank() if processes > 1 else 0)]])
        answer = trainer.model.generate(prompt, max_new_tokens=4, do_sample=False)
        found = {
            "before": before, "after": after, "answer": answer.tolist(),
            "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
            "identity": trainer.model.base_identity.weights_sha256,
        }
        everyone = [weights]
        if processes > 1:
            everyone = [None] * processes
            dist.all_gather_object(everyone, weights)
        found["alike"] = all(
            torch.equal(other[n], x) for other in everyone for n, x in weights.items()
        )
        results[name] = found
    if processes == 1 or dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=90))
    run(Path(sys.argv[1]), Path(sys.argv[2]), dist.get_world_size())
    dist.destroy_process_group()
