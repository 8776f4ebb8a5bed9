"""The CUDA sources compile for every target without spills; the library says why it can't serve."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from scripts import load_script

from qadapter_kernels import cuda_backend, native

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cuda_resources.py"
BOUNDS = {  # threads of a block, blocks a multiprocessor: what the sources' comments count on
    "logits_forward": (512, 2), "logits_backward": (256, 3), "combine_logits": (512, 1),
    "rows_forward": (1024, 1), "rows_forward_cluster": (256, 3), "pair_rewards": (256, 4),
}


@pytest.fixture(scope="module")
def script():
    module = load_script(SCRIPT)
    if module.find_nvcc() is None:
        pytest.skip("nvcc was not found")
    return module


@pytest.fixture(scope="module")
def usages(script):
    """From the log of the build that is installed where that was for all targets: compiling again
    takes a minute."""
    built = native.build_report().get("cuda", {})
    if built.get("built") and set(built["targets"]) == set(script.TARGETS):
        return script.parse("\n".join(built["ptxas"]))
    return script.compile_all()


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_without_spills(script, usages):
    assert {usage.target for usage in usages} == set(script.TARGETS)
    assert len({usage.kernel for usage in usages}) * len(script.TARGETS) == len(usages) >= 140
    for usage in usages:
        assert usage.spills == 0 and usage.stack == 0, usage
        threads, blocks = BOUNDS.get(usage.kernel.split("<")[0], (256, 1))
        granted = -(-usage.registers // 8) * 8  # registers are handed out in eights
        assert granted * threads * blocks <= 65_536, usage
    if f"nvcc {script.compiler_release()}." in script.TABLE.read_text():
        assert script.table(usages) == script.TABLE.read_text(), "run benchmarks/cuda_resources.py"


def test_spills_are_seen(script):
    log = """
ptxas info    : Compiling entry function '_Z5probev' for 'sm_80'
ptxas info    : Function properties for _Z5probev
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 456 bytes cmem[0]
"""
    assert script.parse(log) == [("probe", "sm_80", 32, 8, 16)]


# --- why not ----------------------------------------------------------------------------------


def test_cpu_tensors_are_not_served():
    assert "not cpu tensors" in cuda_backend.unavailable_reason("cpu")


def test_a_missing_library_is_the_reason(monkeypatch):
    monkeypatch.setattr(native, "unavailable_reason", lambda name: f"{name} was not built: no nvcc")
    assert cuda_backend.unavailable_reason("cuda") == "cuda was not built: no nvcc"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_the_reason(monkeypatch):
    monkeypatch.setattr(native, "unavailable_reason", lambda name: None)
    assert cuda_backend.unavailable_reason("cuda") == "PyTorch sees no CUDA device"


class _OtherArchitecture:
    """A library that holds no code for the device."""

    def qadapter_cuda_probe(self):
        return 209

    def qadapter_cuda_error_name(self, status):
        return {209: b"cudaErrorNoKernelImageForDevice"}[status]


def test_another_architecture_is_the_reason(monkeypatch):
    monkeypatch.setattr(native, "unavailable_reason", lambda name: None)
    monkeypatch.setattr(native, "library", lambda name: _OtherArchitecture())
    monkeypatch.setattr(native, "build_report", lambda: {"cuda": {"targets": ["sm_80", "sm_90a"]}})
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 63)
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.inference_mode(False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    assert cuda_backend.unavailable_reason("cuda") == (
        "the compiled kernels (sm_80, sm_90a) can't run on Tesla T4 (sm_75): "
        "cudaErrorNoKernelImageForDevice"
    )
    cuda_backend._device_reason.cache_clear()


@pytest.mark.skipif(
    torch.cuda.is_available() or native.unavailable_reason("cuda") is not None,
    reason="for a built library on a machine without a GPU",
)
def test_a_launch_that_fails_returns_its_error():
    library = native.library("cuda")
    coefficients = (ctypes.c_double * 4)(0, 1, 1, 0)
    status = library.qadapter_cuda_combine_logits(
        None, 0, 0, None, 0, 0, coefficients, None, 1, 1, None, None
    )
    assert library.qadapter_cuda_error_name(status).startswith(b"cudaError")
    assert library.qadapter_cuda_probe() != 0
