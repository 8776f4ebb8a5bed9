"""One process of the tensor-parallel tests; test_tensor_parallel.py starts them.

A base that ``tp_size`` splits over all processes is held against the same base, whole.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from data.tiny import chatml
from ranks import alike, report
from tiny_models import preference_rows, tiny_base, tiny_llama, tokenized
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterModel
from qadapter.errors import QAdapterError
from qadapter.training import QAdapterConfig, QAdapterTrainer
from qadapter.training.features import compute_features
from qadapter.training.retention import RetentionStates
from qadapter.trunk.sharding import TENSOR_PARALLEL, layout_of

OBJECTIVE = ObjectiveConfig(alpha_0=0.3, alpha_tilde=0.5)
IDS = torch.arange(3, 27).view(2, 12)
MASK = torch.tensor([[0] * 6 + [1] * 6] * 2)
KINDS = {
    "llama": lambda: tiny_llama(num_key_value_heads=4),
    "untied": lambda: tiny_llama(num_key_value_heads=4, tie_word_embeddings=False),
    "phi": lambda: tiny_base("phi"),
    "gemma2": lambda: tiny_base("gemma2", num_key_value_heads=4),
    "cohere": lambda: tiny_base("cohere", num_key_value_heads=4),
}
"""A head that is tied, one that is not, with a bias, a cap, a scale."""


def split() -> dict[str, DistributedConfig]:
    return {"distributed_config": DistributedConfig(tp_size=distributed.get_world_size())}


def shared() -> Path:
    """A folder that all processes have."""
    return Path(sys.argv[1])


@functools.cache
def folder_of(kind: str) -> Path:
    folder = shared() / kind
    if distributed.get_rank() == 0:
        KINDS[kind]().save_pretrained(folder)
    distributed.barrier()
    return folder


def build(kind: str, splits: bool, form: str = "linear", trained: bool = True) -> QAdapterModel:
    base = AutoModelForCausalLM.from_pretrained(folder_of(kind), **(split() if splits else {}))
    torch.manual_seed(distributed.get_rank())  # an adapter begins alike on all all the same
    model = QAdapterModel.from_base(base, AdapterConfig(form=form, rank=4), OBJECTIVE)
    torch.manual_seed(1)
    if trained:
        model.adapter.load_state_dict({
            name: 0.3 * torch.randn_like(x) if x.dim() else x
            for name, x in model.adapter.state_dict().items()
        })
    return model


def both(kind: str, form: str = "linear") -> tuple[QAdapterModel, QAdapterModel]:
    return build(kind, True, form), build(kind, False, form)


def assert_close(ours, theirs, name: str = "") -> None:
    """Products of the parts are added up in another order: a sum of n terms rounds by less than n
    times the type's step, and the longest are over the vocabulary's 600 (a gradient's last one)."""
    size = theirs.abs().max().clamp_min(1.0)
    torch.testing.assert_close(
        ours, theirs, rtol=0, atol=float(600 * torch.finfo(torch.float32).eps * size),
        msg=lambda said: f"{name}: {said}",
    )


def gradients(model: QAdapterModel, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [*model.adapter.parameters()]))


def soft_values(model: QAdapterModel, **options) -> list[torch.Tensor]:
    streams = [hidden.flatten(0, 1) for hidden in model.hidden_streams(IDS)]
    tokens = IDS.roll(-1, 1).flatten()
    soft = model.soft_value(*streams, tokens, **options)
    return [*soft, *gradients(model, (soft.value + soft.q_action.square()).sum())]


# --- the checks -------------------------------------------------------------------------------


def every_head_form_is_the_whole_bases():
    for kind, form in (("llama", "linear"), ("untied", "block"), ("llama", "mlp")):
        ours, theirs = both(kind, form)
        assert layout_of(ours.base).engine == TENSOR_PARALLEL
        assert layout_of(ours.base).tp_size == distributed.get_world_size()
        assert ours.base_identity == theirs.base_identity
        for run in (
            lambda m: [m(input_ids=IDS).logits], lambda m: [m.features(IDS)],
            lambda m: [m(input_ids=IDS, strength=torch.tensor([0.5, 2.0])).logits],
            lambda m: [m.token_rewards(IDS, MASK)], soft_values,
            lambda m: gradients(m, m(input_ids=IDS).logits.logsumexp(-1).sum()),
        ):
            results = run(ours)
            assert alike([x.tolist() for x in results])
            for x, y in zip(results, run(theirs), strict=True):
                assert_close(x, y, f"{kind}, {form}")


def every_kind_of_head_is_served():
    for kind in ("phi", "gemma2", "cohere"):
        ours, theirs = both(kind)
        for run in (lambda m: [m(input_ids=IDS, strength=0.5).logits], soft_values):
            for x, y in zip(run(ours), run(theirs), strict=True):
                assert_close(x, y, kind)


def a_fresh_adapter_is_the_base_and_alike_everywhere():
    model = build("llama", True, trained=False)
    assert alike([x.tolist() for x in model.adapter.state_dict().values()])
    assert torch.equal(model(input_ids=IDS).logits, model.base(input_ids=IDS).logits)


def what_is_generated_is_the_whole_bases():
    ours, theirs = both("llama")
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8}
    for more in ({"do_sample": False}, {"do_sample": True}, {"num_beams": 3, "do_sample": False}):
        torch.manual_seed(7 * distributed.get_rank())  # the first process's numbers are drawn with
        tokens = ours.generate(IDS, **options, **more)
        torch.manual_seed(0)
        assert torch.equal(tokens, theirs.generate(IDS, **options, **more)), more


def what_training_reads_is_the_whole_bases():
    ours, theirs = both("llama", "mlp")
    pairs = tokenized(6)
    parts = [
        compute_features(m, pairs, batch_tokens=64, pad_token_id=0, packed=True).shards[0].parts()
        for m in (ours, theirs)
    ]
    assert parts[0].keys() == parts[1].keys() and "base_logsumexp" in parts[0]
    for name, x in parts[0].items():
        assert_close(x.double(), parts[1][name].double(), name)
    texts = [([5, 6], [7, 8, 9]), ([], [4, 5, 6, 7])]
    found = []
    for model in (ours, theirs):
        states = RetentionStates(model, None, texts)
        divergence = states.divergence(model, torch.arange(len(states)))
        found.append([divergence, *gradients(model, divergence.sum())])
    for x, y in zip(*found, strict=True):
        assert_close(x, y)


def train(
    splits: bool, cache: str, retention: object, checkpoint: Path | None = None
) -> QAdapterTrainer:
    """Three steps of four pairs, on a base that all processes have a part of, or each has whole."""
    folder = shared() / f"{cache}{splits}"
    each = 1 if splits else distributed.get_world_size()
    arguments = QAdapterConfig(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, logging_steps=1, seed=0,
        max_steps=3, save_steps=2, learning_rate=1e-2, per_device_train_batch_size=4 // each,
        per_device_eval_batch_size=2, cache_features=cache, ddp_backend="gloo", report_to=[],
        feature_cache_dir=str(folder / "features"), retention_coef=1.0, retention_states=16,
        train_sampling_strategy="sequential",
    )
    trainer = QAdapterTrainer(
        build("llama", splits, "block", trained=False), arguments,
        train_dataset=preference_rows(14), eval_dataset=preference_rows(7),
        processing_class=chatml(), retention_dataset=retention,
    )
    assert trainer.get_total_train_batch_size(arguments) == 4
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def training_is_that_of_whole_bases():
    for cache, retention in (("disk", "own"), ("none", ["blue and green", "never, always"])):
        ours, theirs = train(True, cache, retention), train(False, cache, retention)
        weights = ours.model.adapter.state_dict()
        assert alike([x.tolist() for x in weights.values()])
        for name, x in theirs.model.adapter.state_dict().items():
            assert_close(weights[name], x, name)
        found, expected = ours.evaluate(), theirs.evaluate()
        logs = [[x for x in t.state.log_history if "loss" in x] for t in (ours, theirs)]
        for one, other in zip([found, *logs[0]], [expected, *logs[1]], strict=True):
            for name in one.keys() - {"grad_norm"}:
                if "runtime" not in name and "second" not in name:
                    assert abs(one[name] - other[name]) <= 1e-4 * max(1, abs(other[name])), name
        if ours.args.device.index is not None:
            continue  # accelerate 1.10's cpu:0 is no place that torch.load knows
        checkpoint = Path(ours.args.output_dir) / "checkpoint-2"
        for splits in (True, False):
            resumed = train(splits, cache, retention, checkpoint)
            for name, x in resumed.model.adapter.state_dict().items():
                assert_close(x, weights[name], name)
                assert not splits or torch.equal(x, weights[name]), name


def saved_it_loads_whole_and_split():
    ours, theirs = both("llama")
    folder = shared() / "saved"
    ours.save_pretrained(folder, is_main_process=distributed.get_rank() == 0)
    distributed.barrier()
    expected = theirs(input_ids=IDS).logits
    whole = QAdapterModel.from_pretrained(folder)
    assert torch.equal(whole(input_ids=IDS).logits, expected)
    parted = QAdapterModel.from_pretrained(folder, **split())
    assert layout_of(parted.base).engine == TENSOR_PARALLEL
    assert_close(parted(input_ids=IDS).logits, expected)
    written = parted.export(shared() / "exported")
    assert (written is not None) == (distributed.get_rank() == 0)
    if written is not None:
        stock = AutoModelForCausalLM.from_pretrained(shared() / "exported")
        assert_close(stock(input_ids=IDS).logits, expected)


def what_is_not_served_is_refused_by_name():
    odd = shared() / "odd"
    if distributed.get_rank() == 0:
        tiny_llama(num_key_value_heads=1).save_pretrained(odd)
    distributed.barrier()
    base = AutoModelForCausalLM.from_pretrained(folder_of("llama"), **split())
    lora = peft.LoraConfig(target_modules=["q_proj"])
    for run, says in (
        (lambda: QAdapterModel.from_base(base, lora), "fsdp_size"),
        (lambda: QAdapterModel.from_base(odd, **split()), "a tp_size that divides its heads"),
    ):
        try:
            run()
        except QAdapterError as error:
            assert says in str(error), str(error)
        else:
            raise AssertionError(f"nothing raised: {says}")
    QAdapterModel.from_base(base)  # the base is as it was


FEW = (every_head_form_is_the_whole_bases,)
CHECKS = (
    *FEW, every_kind_of_head_is_served, a_fresh_adapter_is_the_base_and_alike_everywhere,
    what_is_generated_is_the_whole_bases, what_training_reads_is_the_whole_bases,
    training_is_that_of_whole_bases,
    saved_it_loads_whole_and_split, what_is_not_served_is_refused_by_name,
)


def checks_of(world_size: int) -> dict[str, Callable[[], None]]:
    return {check.__name__: check for check in (CHECKS if world_size == 2 else FEW)}


if __name__ == "__main__":
    report(checks_of(int(os.environ["WORLD_SIZE"])), shared())
