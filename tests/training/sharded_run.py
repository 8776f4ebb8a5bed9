"""One process of runs on sharded bases; test_sharded.py starts several."""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from training_tiny import build_pairs, build_tokenizer
from transformers.distributed import DistributedConfig

from qadapter import AdapterConfig, QAdapterModel
from qadapter.errors import QAdapterError
from qadapter.policy.sampling import fused_sample
from qadapter.system.processes import leave_group
from qadapter.training import QAdapterConfig, QAdapterTrainer
from qadapter.trunk.loading import load_base
from qadapter.trunk.sharding import layout_of

ADAPTERS = {
    "linear": lambda: AdapterConfig(rank=4),
    "block": lambda: AdapterConfig(form="block", rank=4),
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "top-lora": lambda: peft.LoraConfig(
        r=2, target_modules=["v_proj", "up_proj"], layers_to_transform=[1]
    ),
}
TEXTS = ["w1 w2 w3 w4 w5 w6 w7", "w9 w8 w7 w6", "w20 w21 w22 w23 w24 w25"]
PAIRS, STEP = 24, 8
"""Pairs, and those of an optimizer step, on all processes together."""


@dataclasses.dataclass(frozen=True)
class Case:
    adapter: str
    base: str = "tied"
    cache: str = "none"
    held_to: Any = None
    rate: float = 0.5
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "linear": Case("linear"),
    "linear, features on disk": Case("linear", "untied", "disk", TEXTS),
    "block": Case("block", "untied", "memory", TEXTS),
    "lora": Case("lora", held_to="own", rate=2.0),
    "lora, checkpointed": Case(
        "lora", "untied", rate=0.1, options={"gradient_checkpointing": True}
    ),
    "top-lora": Case("top-lora", "untied", "disk", TEXTS, rate=0.05),
    "top-lora, at every step": Case("top-lora", options={"padding_free": False}),
}
RESUMED = "top-lora"
"""What is gone on with after one of three steps, on another number of processes."""


def build(folder: Path, bases: Path, name: str, sharding: dict[str, int] | None) -> QAdapterTrainer:
    case = CASES[name]
    processes = dist.get_world_size() if sharding else 1
    base = load_base(
        bases / case.base, dtype=torch.float32,
        **({"distributed_config": sharding} if sharding else {}),
    )
    torch.manual_seed(dist.get_rank() if sharding else 0)  # what begins is the first process's
    model = QAdapterModel.from_base(base, ADAPTERS[case.adapter]())
    optimizer = torch.optim.SGD(model.adapter.parameters(), lr=case.rate)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    arguments = QAdapterConfig(
        output_dir=str(folder / name), use_cpu=True, disable_tqdm=True, logging_steps=1, seed=0,
        num_train_epochs=1, per_device_train_batch_size=STEP // 2 // processes,
        gradient_accumulation_steps=2, per_device_eval_batch_size=2, save_strategy="steps",
        save_steps=1, ddp_backend="gloo" if sharding else None, cache_features=case.cache,
        feature_cache_dir=str(folder / "features"), feature_shard_mb=1, report_to="none",
        train_sampling_strategy="sequential", retention_states=8,
        retention_coef=0.0 if case.held_to is None else 0.5, **case.options,
    )
    return QAdapterTrainer(
        model, arguments, train_dataset=build_pairs(PAIRS), processing_class=build_tokenizer(),
        optimizers=(optimizer, scheduler), retention_dataset=case.held_to,
    )


def train(
    folder: Path, bases: Path, name: str, sharding: dict[str, int] | None,
    resume_from: Path | None = None,
) -> dict[str, Any]:
    """What a run comes to: numbers, and whether all processes have the same adapter."""
    trainer = build(folder, bases, name, sharding)
    found: dict[str, Any] = {"engine": layout_of(trainer.model.base).engine}
    found["begins alike"] = alike(trainer.model, sharding)
    found["before"] = trainer.evaluate(build_pairs(5, seed=2))  # no whole batch for each
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    found["after"] = trainer.evaluate(build_pairs(7, seed=1))
    found["logs"] = [entry for entry in trainer.state.log_history if "loss" in entry]
    found["identity"] = dataclasses.asdict(trainer.model.base_identity)
    found["answers"] = answers(trainer.model)
    found["alike"] = alike(trainer.model, sharding)
    loaded = QAdapterModel.from_pretrained(folder / name, trainer.model.base) if (
        not trainer.model.adapts_trunk
    ) else trainer.model
    found["logits"] = loaded(input_ids=torch.arange(3, 11)[None]).logits.flatten().tolist()
    return found


def alike(model: QAdapterModel, sharding: dict[str, int] | None) -> bool:
    """Whether all processes have the same adapter, to the bit."""
    weights = {n: x.detach().clone() for n, x in model.adapter.state_dict().items()}
    everyone = [weights]
    if sharding:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, weights)
    return all(torch.equal(other[n], x) for other in everyone for n, x in weights.items())


def answers(model: QAdapterModel) -> list[list[int]]:
    """Of all prompts on one process, of a part of them on each of several: they end apart."""
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
    many = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    model.eval()
    ours = [
        model.generate(
            torch.tensor([prompt]), max_new_tokens=3 + len(prompt), do_sample=False, strength=2.0
        )[0].tolist()
        for prompt in prompts[rank::many]
    ]
    everyone = [ours]
    if many > 1:
        everyone = [None] * many
        dist.all_gather_object(everyone, ours)
    return [everyone[i % many][i // many] for i in range(len(prompts))]


def sampled(bases: Path) -> bool:
    """Whether the fused sampler draws alike on all processes, with one seed."""
    base = load_base(bases / "tied", distributed_config={"fsdp_size": dist.get_world_size()})
    model = QAdapterModel.from_base(base, AdapterConfig(rank=4))
    torch.manual_seed(3)
    drawn = model.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=True, custom_generate=fused_sample
    ).tolist()
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, drawn)
    return all(x == drawn for x in everyone)


def equal_to_the_whole(bases: Path) -> dict[str, bool]:
    """What an adapter on a sharded base says, beside the same on a whole one; to the bit."""
    found, ids, processes = {}, torch.arange(3, 27).view(3, 8), dist.get_world_size()
    mask = torch.tensor([0, 0, 0, 1, 1, 0, 1, 1]).expand(3, -1)
    for form, name in (("linear", "tied"), ("block", "untied"), ("lora", "untied")):
        whole, ours = (
            QAdapterModel.from_base(load_base(bases / name, **kwargs), ADAPTERS[form]())
            for kwargs in ({}, {"distributed_config": {"fsdp_size": processes}})
        )
        kept = sum(p.to_local().numel() for p in ours.base.parameters() if isinstance(p, DTensor))
        found[f"{form} keeps a part"] = kept < 1.2 / processes * whole.base.num_parameters()
        torch.manual_seed(1)
        weights = {
            n: torch.randn_like(x) if x.dim() else x for n, x in whole.adapter.state_dict().items()
        }
        for model in (whole, ours):
            model.adapter.load_state_dict(weights)
        for what, run in {
            "logits": lambda m: m(input_ids=ids).logits,
            "two streams": lambda m: m(input_ids=ids, strength=0.5).logits,
            "rewards": lambda m: m.token_rewards(ids, mask),
        }.items():
            found[f"{form} {what}"] = torch.equal(run(ours), run(whole))
    return found


def exported(folder: Path, bases: Path) -> dict[str, Any]:
    """A policy written by the first process, and what it says here."""
    base = load_base(bases / "untied", distributed_config={"fsdp_size": dist.get_world_size()})
    model = QAdapterModel.from_base(base, ADAPTERS["lora"]())
    torch.manual_seed(1)
    for x in model.adapter.parameters():
        torch.nn.init.normal_(x, std=0.3)
    report = model.export(folder / "exported")
    written = [None] * dist.get_world_size()
    dist.all_gather_object(written, report is not None)
    ids = torch.arange(3, 11)[None]
    return {"written": written, "logits": model(input_ids=ids).logits.tolist()}


def two_processes(folder: Path, bases: Path, alone: Path) -> dict[str, Any]:
    results = {name: train(folder, bases, name, {"fsdp_size": 2}) for name in CASES}
    results["resumed"] = train(
        folder / "resumed", bases, RESUMED, {"fsdp_size": 2}, alone / RESUMED / "checkpoint-1"
    )
    results["sampled alike"] = sampled(bases)
    results["equal"] = equal_to_the_whole(bases)
    results["exported"] = exported(folder, bases)
    try:
        load_base(bases / "tied", distributed_config={"fsdp_size": 4})
    except QAdapterError as error:
        results["too few"] = str(error)
    return results


def four_processes(folder: Path, bases: Path, two: Path) -> dict[str, Any]:
    name, replicated = "linear, features on disk", {"fsdp_size": 4}
    if hasattr(DistributedConfig, "dp_replicate_size"):  # newer than transformers 5.17
        replicated = {"fsdp_size": 2, "dp_replicate_size": 2}
    return {
        "equal": equal_to_the_whole(bases),
        name: train(folder, bases, name, {"fsdp_size": 4}),
        "lora": train(folder, bases, "lora", replicated),
        "resumed": train(
            folder / "resumed", bases, RESUMED, {"fsdp_size": 4}, two / RESUMED / "checkpoint-1"
        ),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=100))
    runs = {2: two_processes, 4: four_processes}[dist.get_world_size()]
    results = runs(*map(Path, sys.argv[1:]))
    if dist.get_rank() == 0:
        Path(sys.argv[1], "results.json").write_text(json.dumps(results))
    leave_group()
