"""Which base is which: any weight that differs, in whatever dtype and wherever it lies."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from tiny_models import tiny_base

from qadapter import AdapterConfig, QAdapterError, QAdapterModel
from qadapter.trunk import identity
from qadapter.trunk.identity import BaseIdentity, digest_of, summed
from qadapter.trunk.loading import as_loaded, load_base


def identity_of(model, **changes) -> BaseIdentity:
    found = BaseIdentity.of(as_loaded(model, {}))
    return BaseIdentity.saved(json.loads(json.dumps(dataclasses.asdict(found))) | changes)


def same(ours: BaseIdentity, theirs: BaseIdentity) -> bool:
    try:
        ours.require(theirs, "adapter")
        theirs.require(ours, "adapter")
    except QAdapterError as error:
        assert "trunk's weights differ" in str(error)
        return False
    return True


def changed(model, name, position, by=1):
    """A copy in which one element of one tensor moved to the next number of its dtype."""
    model = copy.deepcopy(model)
    whole = model.state_dict()[name].view(-1)
    whole.view({2: torch.int16, 4: torch.int32}[whole.itemsize])[position] += by
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_element_is_enough(dtype):
    model = tiny_base("phi").to(dtype)
    ours = identity_of(model)
    for name, x in model.model.named_parameters(prefix="model"):
        for position in (0, x.numel() // 2 + 1, x.numel() - 1):
            assert not same(ours, identity_of(changed(model, name, position)))


def test_one_element_is_enough_across_dtypes():
    """Where it is more than rounding to bfloat16 hides."""
    model = tiny_base()
    ours = identity_of(model)
    for dtype in (torch.bfloat16, torch.float64):
        assert same(ours, identity_of(copy.deepcopy(model).to(dtype)))
        moved = changed(model, "model.layers.0.mlp.up_proj.weight", 77, 1 << 17).to(dtype)
        assert not same(ours, identity_of(moved))


def test_exchanged_tensors_and_rows_are_noticed():
    model = tiny_base()
    ours = identity_of(model)
    first, second = (layer.mlp.up_proj.weight.data for layer in model.model.layers)
    kept = first.clone()
    first[:], second[:] = second.clone(), kept
    assert not same(ours, identity_of(model))
    second[:], first[:] = first.clone(), kept
    assert same(ours, identity_of(model))
    for rows in ([1, 0], [40, 8]):
        first[:] = kept
        first[rows] = kept[rows[::-1]]
        assert not same(ours, identity_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.int64])
@pytest.mark.parametrize("count", [0, 1, 7, 488, identity._BLOCK, identity._BLOCK + 489])
def test_sums_are_of_every_element_of_every_size(dtype, count):
    torch.manual_seed(count)
    x = (torch.rand(count + 3) * 100).to(dtype)
    seen = {summed([("x", x[3:])])}  # a view that starts between words
    assert summed([("x", x[3:].clone())]) in seen
    for position in {0, count // 2, count - 1} if count else ():
        x[3 + position] += 1
        seen.add(summed([("x", x[3:])]))
    assert len(seen) == 1 + len({0, count // 2, count - 1} if count else ())


def test_adapters_saved_before_know_their_base_by_samples():
    model = tiny_base("phi")
    ours = identity_of(model, content={})
    assert same(ours, identity_of(model))
    other = copy.deepcopy(model)
    other.model.layers[1].self_attn.q_proj.weight.data.mul_(1.05)
    assert not same(ours, identity_of(other))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_what_is_offloaded_is_read_where_it_lies(tmp_path, where):
    def offloaded(model):
        model.tie_weights()
        if where == "disk":
            disk_offload(model.model, tmp_path / str(len(list(tmp_path.iterdir()))))
        else:
            cpu_offload(model.model)
        assert model.model.layers[0].mlp.up_proj.weight.is_meta
        return model

    ours = identity_of(tiny_base(tie_word_embeddings=False))
    assert same(ours, identity_of(offloaded(tiny_base(tie_word_embeddings=False))))
    other = tiny_base(tie_word_embeddings=False)
    other.model.layers[1].self_attn.q_proj.weight.data.mul_(1.05)
    assert not same(ours, identity_of(offloaded(other)))


def test_norms_and_biases_tell_quantized_bases_apart():
    model = tiny_base("phi")
    ours = identity_of(model)
    for method, told in (("bitsandbytes", True), ("awq", False)):
        packed = copy.deepcopy(model)
        packed.is_quantized = True
        packed.config.quantization_config = {"quant_method": method}
        assert same(ours, identity_of(packed))
        packed.model.layers[0].mlp.fc1.bias.data[3] += 1
        assert same(ours, identity_of(packed)) is not told


def test_a_checkpoint_of_which_one_byte_changed_is_another(tmp_path):
    tiny_base(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    QAdapterModel.from_base(tmp_path / "base", AdapterConfig(rank=2)).save_pretrained(
        tmp_path / "adapter"
    )
    path = tmp_path / "base/model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for position in range(header + 1, len(content), len(content) // 20):
        flipped = content.copy()
        flipped[position] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(QAdapterError, match=r"(trunk's weights|its head) differ"):
            QAdapterModel.from_pretrained(tmp_path / "adapter")
    path.write_bytes(content)
    assert load_base(tmp_path / "base").model
    QAdapterModel.from_pretrained(tmp_path / "adapter")


def test_weights_are_read_without_holding_on_to_their_memory():
    model = tiny_base().to(torch.bfloat16)
    digest_of(model)
    identity_of(model)
    assert all(x.untyped_storage().resizable() for x in model.parameters())
