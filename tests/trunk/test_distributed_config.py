"""What a distributed_config asks for, before anything is loaded."""

from __future__ import annotations

import pytest
from tiny_models import tiny_llama
from transformers.distributed import DistributedConfig

from qadapter.errors import QAdapterError
from qadapter.trunk.loading import load_base


@pytest.mark.parametrize("given, words", [
    ({"fsdp_sise": 2}, ["fsdp_sise", "did you mean 'fsdp_size'"]),
    ({"fsdp_size": "all"}, ["fsdp_size", "'all'"]), ({"fsdp_size": 0}, ["fsdp_size", "0"]),
    ({"fsdp_size": True}, ["fsdp_size"]), ("fsdp", ["distributed_config", "map"]),
    ({"pp_size": 2}, ["pipeline parallelism", "fsdp_size=N"]), ({"ep_size": 2}, ["expert"]),
    ({"fsdp_size": 3}, ["3 processes", "launch has 1", "torchrun"]),
    (DistributedConfig(fsdp_size=2), ["2 processes", "torchrun"]),
    ({"fsdp_size": 2, "tp_size": 2}, ["together", "one of them"]),
])
def test_what_a_distributed_config_asks_for_is_checked_first(given, words):
    with pytest.raises(QAdapterError) as error:
        load_base("no/such-base", distributed_config=given)
    assert all(word in str(error.value) for word in words)


def test_a_quantized_base_is_not_sharded(tmp_path, monkeypatch):
    base = tiny_llama()
    base.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    base.config.save_pretrained(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(QAdapterError, match=r"a quantized base can't be sharded"):
        load_base(tmp_path, distributed_config={"fsdp_size": 2})
