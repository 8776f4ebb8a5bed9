"""What launches and recipes ask of DeepSpeed and FSDP."""

from __future__ import annotations

import json
import logging

import pytest

from qadapter.errors import QAdapterError
from qadapter.training import QAdapterConfig

ZERO = {"train_batch_size": "auto", "bf16": {"enabled": "auto", "loss_scale": 0}}


def arguments(tmp_path, **changes):
    return QAdapterConfig(output_dir=str(tmp_path / "run"), use_cpu=True, **changes)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zero_1_and_2_are_data_parallelism(tmp_path, caplog, stage):
    offload = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(ZERO | {"zero_optimization": offload}))
    for given in (ZERO | {"zero_optimization": offload}, str(path)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = arguments(tmp_path, deepspeed=given)
        assert found.deepspeed is None and found.deepspeed_plugin is None
        assert f"ZeRO-{stage} is run as plain data parallelism" in caplog.text


@pytest.mark.parametrize("config, named", [
    ({"zero_optimization": {"stage": 3}}, ["ZeRO-3", "distributed_config"]),
    ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, ["optimizer", "auto"]),
    ({"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5}, ["gradient_clipping"]),
    ({"fp16": {"enabled": True}}, ["fp16"]),
    ([1], ["deepspeed", "JSON"]),
])
def test_more_than_data_parallelism_is_refused(tmp_path, config, named):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    with pytest.raises(QAdapterError) as error:
        arguments(tmp_path, deepspeed=str(path))
    assert all(part in str(error.value) for part in named)


@pytest.mark.parametrize("stage, fits", [("1", True), ("2", True), ("3", False)])
def test_accelerate_launch_with_deepspeed(tmp_path, monkeypatch, stage, fits):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    if fits:
        assert arguments(tmp_path).deepspeed_plugin is None
    else:
        with pytest.raises(QAdapterError, match="ZeRO-3"):
            arguments(tmp_path)


@pytest.mark.parametrize("version", ["1", "2"])
def test_accelerate_launch_with_fsdp_is_refused(tmp_path, monkeypatch, version):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(QAdapterError, match=rf"FSDP{version}.*distributed_config"):
        arguments(tmp_path)


def test_fsdp_of_a_recipe_is_refused_by_its_version(tmp_path):
    with pytest.raises(QAdapterError, match=r"FSDP2.*distributed_config"):
        arguments(tmp_path, fsdp="full_shard", fsdp_config={"version": 2})
