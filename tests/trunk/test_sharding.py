"""How a base lies over processes, in one: what is served and what is refused."""

from __future__ import annotations

import peft
import pytest
import torch
import torch.distributed as dist
from tiny_models import tiny_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import distribute_tensor
from transformers.distributed import DistributedConfig

from qadapter import AdapterConfig, QAdapterModel
from qadapter.errors import QAdapterError
from qadapter.policy.composition import compose
from qadapter.system.processes import leave_group
from qadapter.trunk.identity import digest_of
from qadapter.trunk.sharding import full, layout_of, within


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    leave_group()


def sharded(base, mesh, **policies):
    """As transformers shards a base: block by block, the norm and the head together."""
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh, **policies)
    last = [base.model.norm, base.lm_head]
    if base.lm_head.weight is base.model.embed_tokens.weight:
        last.append(base.model.embed_tokens)
    fully_shard(last, mesh=mesh, reshard_after_forward=False, **policies)
    return fully_shard(base, mesh=mesh, **policies)


def test_whole_base_is_whole():
    base = tiny_llama()
    assert layout_of(base).engine == "" and layout_of(base).tp_size == 1
    assert within(base, lambda: 3) == 3


@pytest.mark.parametrize("adapter", ["linear", "block", "mlp", "lora"])
@pytest.mark.parametrize("tied", [True, False])
def test_sharded_base_is_the_base(one_process, adapter, tied):
    def build(base):
        torch.manual_seed(0)
        if adapter == "lora":
            config = peft.LoraConfig(
                r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[1],
                init_lora_weights=True,
            )
        else:
            config = AdapterConfig(form=adapter, rank=4)
        model = QAdapterModel.from_base(base, config)
        torch.manual_seed(1)
        weights = {n: torch.randn_like(x) * 0.3 for n, x in model.adapter.state_dict().items()}
        model.adapter.load_state_dict(weights)
        return model

    whole = build(tiny_llama(tie_word_embeddings=tied))
    ours = build(sharded(tiny_llama(tie_word_embeddings=tied), one_process))
    assert layout_of(ours.base).engine == "FSDP2"
    assert ours.base_identity == whole.base_identity
    assert digest_of(ours.bare_base()) == digest_of(whole.bare_base())
    ids = torch.arange(3, 15).view(2, 6)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    for run in (
        lambda m: m(input_ids=ids).logits, lambda m: m(input_ids=ids, strength=0.5).logits,
        lambda m: m.token_rewards(ids, mask), lambda m: m.features(ids),
        lambda m: m.generate(ids, max_new_tokens=5, do_sample=False),
    ):
        assert torch.equal(run(ours), run(whole))


@pytest.mark.parametrize("made_from_weights", [
    {"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"},
    {"modules_to_save": ["input_layernorm"]},
])
def test_adapters_made_from_weights_are_refused(one_process, made_from_weights):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **made_from_weights)
    with pytest.raises(QAdapterError, match=r"each process keeps a part|PEFT can't adapt"):
        QAdapterModel.from_base(sharded(tiny_llama(), one_process), config)


def test_doors_inside_a_door_are_none(one_process):
    base = sharded(tiny_llama(), one_process)
    ids = torch.arange(3, 9)[None]

    def run():
        return base.model(input_ids=ids).last_hidden_state

    expected = tiny_llama().model(input_ids=ids).last_hidden_state
    found = within(base, lambda: (within(base, run), within(base, run)))
    assert all(torch.equal(x, expected) for x in found)


def test_a_base_that_ran_before_is_frozen_for_good(one_process):
    base = sharded(tiny_llama(), one_process)
    base(input_ids=torch.arange(3, 9)[None]).logits.sum()  # the head stays gathered
    model = QAdapterModel.from_base(base, AdapterConfig(rank=4))
    model.features(torch.arange(3, 9)[None])
    assert not any(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize(
    "field, words",
    [("pp_size", "pipeline"), ("ep_size", "expert")],
)
def test_other_parallelism_is_refused(field, words):
    base = tiny_llama()
    base.config.distributed_config = DistributedConfig()
    setattr(base.config.distributed_config, field, 2)
    with pytest.raises(QAdapterError, match=rf"{words} parallelism.*fsdp_size"):
        QAdapterModel.from_base(base)


def test_zero3_is_refused():
    base = tiny_llama()
    base.lm_head.weight.ds_id = 0  # as DeepSpeed marks what it has partitioned
    with pytest.raises(QAdapterError, match=r"ZeRO-3.*fsdp_size"):
        QAdapterModel.from_base(base)


def test_fsdp1_is_refused(one_process):
    base = tiny_llama()
    base.model.layers[1] = FullyShardedDataParallel(base.model.layers[1], device_id="cpu")
    with pytest.raises(QAdapterError, match=r"FSDP1.*fsdp_size"):
        QAdapterModel.from_base(base)


def test_half_sharded_base_is_refused(one_process):
    base = tiny_llama()
    fully_shard(base.model, mesh=one_process)
    with pytest.raises(QAdapterError, match="the whole is not: call fully_shard"):
        QAdapterModel.from_base(base)


def test_tensors_of_other_engines_are_refused(one_process):
    base = tiny_llama(tie_word_embeddings=False)
    base.lm_head.weight = torch.nn.Parameter(distribute_tensor(base.lm_head.weight, one_process))
    with pytest.raises(QAdapterError, match="not by FSDP2"):
        QAdapterModel.from_base(base)


def test_mixed_precision_is_refused(one_process):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    with pytest.raises(QAdapterError, match=r"mixed precision.*fsdp_mixed_precision"):
        QAdapterModel.from_base(sharded(tiny_llama(), one_process, mp_policy=policy))


def test_weights_kept_on_the_cpu_are_refused(one_process):
    base = sharded(tiny_llama(), one_process)
    base.config.distributed_config = DistributedConfig(fsdp_size=1, fsdp_cpu_offload=True)
    with pytest.raises(QAdapterError, match="fsdp_cpu_offload"):
        QAdapterModel.from_base(base)


def test_quantized_and_sharded_is_refused(one_process):
    base = sharded(tiny_llama(), one_process)
    base.is_quantized = True
    with pytest.raises(QAdapterError, match="quantized base can't be sharded"):
        QAdapterModel.from_base(base)


def test_the_whole_of_a_tensor(one_process):
    x = torch.randn(5, 3)
    assert torch.equal(full(distribute_tensor(x, one_process)), x)
    assert full(x).data_ptr() == x.data_ptr()


def test_what_needs_the_whole_base_says_so(one_process, tmp_path):
    def build(adapter):
        return QAdapterModel.from_base(sharded(tiny_llama(), one_process), adapter)

    head, lora = build(AdapterConfig(rank=4)), build(peft.LoraConfig(target_modules=["q_proj"]))
    for run in (
        lambda: lora.merge_adapter(), lambda: lora.init_continuous_batching(),
        lambda: compose([lora, lora], [1.0, 0.5]),
    ):
        with pytest.raises(QAdapterError, match=r"FSDP2 spreads it .* save the adapter"):
            run()
    with pytest.raises(QAdapterError, match=r"no name .* save the adapter"):
        head.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [{"tp_size": 2}, DistributedConfig(tp_size=2)], ids=type)
def test_a_lora_on_split_matrices_is_refused_before_the_base_is_looked_for(config, tmp_path):
    lora = peft.LoraConfig(target_modules=["q_proj"])
    with pytest.raises(QAdapterError, match=r"tensor parallelism .*fsdp_size"):
        QAdapterModel.from_base(tmp_path / "nowhere", lora, distributed_config=config)
    QAdapterModel.from_base(tiny_llama(), lora).save_pretrained(tmp_path / "lora")
    with pytest.raises(QAdapterError, match=r"tensor parallelism .*fsdp_size"):
        QAdapterModel.from_pretrained(
            tmp_path / "lora", tmp_path / "nowhere", distributed_config=config
        )
