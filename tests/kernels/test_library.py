"""The operators as PyTorch sees them: opcheck, torch.compile, argument checks, backends."""

from __future__ import annotations

import runpy

import pytest
import torch
from cases import CPU_BACKENDS, linear_case, logits_case, same_bits
from torch._dynamo.testing import CompileCounterWithBackend

from qadapter_kernels import (
    backends,
    bradley_terry,
    dispatch,
    library,
    linear_logsumexp,
    linear_soft_value,
    native,
    serving,
    soft_value,
)

COEF = (0.5, 1.0, 1.0, -0.25)
OPTIONS = dict(zip(("alpha_0", "alpha_tilde", "adapter_coef", "base_coef"), COEF, strict=True))


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def _no_graphs_left_over():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- torch.library.opcheck: schema, fake implementation, autograd, dynamic shapes ----------------


def logits_arguments(requires_grad=True, statistics=False, lse=False, rows=5, backend="torch"):
    case = logits_case(rows=rows, vocab=13, dtype=torch.bfloat16)
    base_lse = case.base_logits.float().logsumexp(-1) if lse else None
    return (
        case.adapter_logits.requires_grad_(requires_grad), case.base_logits, case.actions,
        base_lse, *COEF, statistics, False, backend,
    )


@pytest.mark.parametrize("options", [
    {}, {"statistics": True}, {"lse": True}, {"rows": 1}, {"requires_grad": False},
], ids=str)
def test_opcheck_soft_value(backend, options):
    torch.library.opcheck(library.soft_value, logits_arguments(**options, backend=backend))


@pytest.mark.parametrize("op", [library.soft_value_backward, library.soft_value_backward_])
def test_opcheck_soft_value_backward(backend, op):
    case = logits_case(rows=5, vocab=13, dtype=torch.bfloat16)
    normalizer = torch.randn(2, 5) + 20
    torch.library.opcheck(op, (
        case.adapter_logits, case.base_logits, case.actions, normalizer, case.grad_q, case.grad_v,
        *COEF, backend,
    ))


def linear_arguments(requires_grad=True, statistics=False, lse=False, need_grad=True, backend=""):
    case = linear_case(rows=5, vocab=13, hidden=8, dtype=torch.bfloat16, bias=True)
    return (
        case.adapter_hidden.requires_grad_(requires_grad), case.base_hidden, case.weight,
        case.actions, case.bias, torch.randn(5) if lse else None, *COEF, 0.5, 1 << 20, statistics,
        need_grad, backend, "", 0,
    )


@pytest.mark.parametrize("options", [
    {}, {"statistics": True}, {"lse": True}, {"requires_grad": False, "need_grad": False},
], ids=str)
def test_opcheck_linear_soft_value(backend, options):
    torch.library.opcheck(library.linear_soft_value, linear_arguments(**options, backend=backend))


def test_opcheck_linear_soft_value_backward():
    case = linear_case(rows=5, vocab=13, hidden=8, dtype=torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        torch.library.opcheck(library.linear_soft_value_backward, (
            case.adapter_hidden, case.weight, case.actions, case.grad_q, case.grad_v,
            torch.empty(0), 0.7, dtype, "", 0,
        ))


def test_opcheck_linear_logsumexp(backend):
    case = linear_case(rows=5, vocab=13, hidden=8, dtype=torch.bfloat16, bias=True)
    torch.library.opcheck(library.linear_logsumexp, (
        case.base_hidden, case.weight, case.actions, case.bias, 0.5, 1 << 20, backend, "", 0,
    ))


def test_opcheck_linear_action_logit():
    case = linear_case(rows=5, vocab=13, hidden=8, dtype=torch.bfloat16, bias=True)
    torch.library.opcheck(library.linear_action_logit, (
        case.base_hidden, case.weight, case.actions, case.bias, 0.5, "", 0,
    ))


SEQUENCES = torch.tensor([0, 3, 3, 4, 9])


@pytest.mark.parametrize("bootstrap_next, denominators", [
    (True, (None, None)), (False, (2.0, 10.0)),
])
def test_opcheck_bradley_terry(backend, bootstrap_next, denominators):
    q, v = torch.randn(2, 9).unbind()
    torch.library.opcheck(library.bradley_terry, (
        q.clone().requires_grad_(), v.clone().requires_grad_(), SEQUENCES, torch.ones(4),
        0.9, 0.1, bootstrap_next, *denominators, backend,
    ))
    torch.library.opcheck(library.bradley_terry_backward, (
        torch.randn(9), torch.randn(4), SEQUENCES, torch.ones(4), 0.9, 0.1, bootstrap_next,
        *denominators, torch.randn(3), torch.randn(4), torch.randn(9), backend,
    ))


# --- torch.compile: one graph, the same bits, no recompilation per length -----------------------


def logits_step(a, b, actions, backend=None):
    soft, statistics = soft_value(a, b, actions, **OPTIONS, return_statistics=True, backend=backend)
    return (soft.q_action * 0.3 - soft.value).square().mean(), *soft, *statistics


def linear_step(h, hb, weight, actions, backend=None):
    soft = linear_soft_value(h, hb, weight, actions, **OPTIONS, backend=backend)
    lse = linear_logsumexp(hb, weight, actions, backend=backend)
    return (soft.q_action * 0.3 - soft.value).square().mean(), *soft, lse


def sequence_step(q, v, offsets, backend=None):
    return tuple(bradley_terry(
        q, v, offsets, gamma=0.9, chi2_coef=0.1, length_normalization="completion", backend=backend
    ))


STEPS = [logits_step, linear_step, sequence_step]


def step_inputs(step, rows):
    if step is logits_step:
        case = logits_case(rows=rows, vocab=33, dtype=torch.bfloat16)
        return case.adapter_logits.requires_grad_(), case.base_logits, case.actions
    if step is linear_step:
        case = linear_case(rows=rows, vocab=33, hidden=16, dtype=torch.bfloat16)
        return case.adapter_hidden.requires_grad_(), case.base_hidden, case.weight, case.actions
    q, v = (torch.randn(rows).requires_grad_() for _ in range(2))
    return q, v, torch.tensor([0, 1, rows // 2, rows // 2, rows])


def outputs_and_gradients(step, inputs, **options):
    outputs = step(*inputs, **options)
    leaves = [x for x in inputs if x.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs[0], leaves)]


@pytest.mark.parametrize("step", STEPS)
def test_compile_gives_the_same_bits(backend, step):
    """fullgraph: a graph break would raise. Outputs and gradients, through AOTAutograd."""
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = step_inputs(step, 12)
    expected = outputs_and_gradients(step, inputs, backend=backend)
    assert same_bits(outputs_and_gradients(compiled, inputs, backend=backend), expected)
    with torch.no_grad():
        assert same_bits(compiled(*inputs, backend=backend), step(*inputs, backend=backend))


@pytest.mark.slow
def test_inductor_gives_the_same_bits(monkeypatch, tmp_path):
    """The compiler that fuses what stands around the op leaves the op's own numbers alone. (Its
    C++ compilation takes 10 s.)"""
    # Its cache takes what was compiled for AVX-512 where torch is held to AVX2, and then is wrong.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = torch.compile(lambda *inputs: linear_step(*inputs)[1:], fullgraph=True)
    inputs = step_inputs(linear_step, 12)
    with torch.no_grad():
        assert same_bits(compiled(*inputs), linear_step(*inputs)[1:])
    assert same_bits(
        torch.autograd.grad(compiled(*inputs)[1].sum(), inputs[0]),
        torch.autograd.grad(linear_step(*inputs)[2].sum(), inputs[0]),
    )


@pytest.mark.parametrize("step", STEPS)
def test_ten_lengths_compile_once(step):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for rows in (12, 13, 16, 17, 31, 64, 65, 100, 128, 257):
        inputs = step_inputs(step, rows)
        expected = outputs_and_gradients(step, inputs)
        for x in inputs:
            if x.shape[0] == rows:  # not the head, not the offsets
                torch._dynamo.mark_dynamic(x, 0)
        assert same_bits(outputs_and_gradients(compiled, inputs), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("step", STEPS)
def test_lengths_do_not_recompile_with_everything_dynamic(step):
    """dynamic=True makes symbols of the α's too; Dynamo may take two attempts, not one a length."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    attempts = []
    for rows in (12, 13, 31, 64):
        outputs_and_gradients(compiled, step_inputs(step, rows))
        attempts.append(counter.frame_count)
    assert attempts == attempts[:1] * 4


def test_in_place_backward_compiles():
    def step(x, b, actions):
        logits = x * 2  # something whose backward does not need its output
        soft = soft_value(logits, b, actions, **OPTIONS, inplace_backward=True)
        return (soft.value.sum() + soft.q_action.sum(),)

    inputs = step_inputs(logits_step, 12)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert same_bits(
        outputs_and_gradients(compiled, inputs), outputs_and_gradients(step, inputs)
    )


# --- argument checks: each message names the argument ------------------------------------------


def logits_call(**changes):
    case = logits_case(rows=5, vocab=13)
    arguments = dict(
        adapter_logits=case.adapter_logits, base_logits=case.base_logits, actions=case.actions,
        **OPTIONS,
    )
    return soft_value(**(arguments | changes))


def linear_call(**changes):
    case = linear_case(rows=5, vocab=13, hidden=8)
    arguments = dict(
        adapter_hidden=case.adapter_hidden, base_hidden=case.base_hidden, weight=case.weight,
        actions=case.actions, **OPTIONS,
    )
    return linear_soft_value(**(arguments | changes))


def sequence_call(**changes):
    arguments = dict(q_action=torch.zeros(9), value=torch.zeros(9), sequence_offsets=SEQUENCES)
    return bradley_terry(**(arguments | changes))


ACTIONS = torch.zeros(5, dtype=torch.int64)
META = torch.device("meta")
BAD_ARGUMENTS = [
    (logits_call, "adapter_logits", torch.zeros(5, 2, 13), ValueError, "shape"),
    (logits_call, "adapter_logits", torch.zeros(5, 13, dtype=torch.int64), TypeError, "int64"),
    (logits_call, "base_logits", torch.zeros(5, 12), ValueError, "equal"),
    (logits_call, "base_logits", torch.zeros(5, 13, dtype=torch.bfloat16), TypeError, "bfloat16"),
    (logits_call, "base_logits", torch.zeros(5, 13, device=META), ValueError, "meta"),
    (logits_call, "base_logits", torch.zeros(5, 13, requires_grad=True), ValueError, "frozen"),
    (logits_call, "actions", torch.zeros(4, dtype=torch.int64), ValueError, "shape"),
    (logits_call, "actions", torch.zeros(5), TypeError, "float32"),
    (logits_call, "actions", torch.zeros(5, dtype=torch.bool), TypeError, "bool"),
    (logits_call, "actions", ACTIONS.to(META), ValueError, "meta"),
    (logits_call, "actions", ACTIONS + 13, ValueError, "13.*vocabulary of 13"),
    (logits_call, "actions", ACTIONS - 2, ValueError, "-2.*vocabulary"),
    (logits_call, "alpha_0", float("nan"), ValueError, "finite"),
    (logits_call, "alpha_tilde", 0.0, ValueError, "positive"),
    (logits_call, "alpha_tilde", -1.0, ValueError, "positive"),
    (logits_call, "adapter_coef", float("inf"), ValueError, "finite"),
    (logits_call, "base_coef", float("inf"), ValueError, "finite"),
    (logits_call, "base_logsumexp", torch.zeros(4), ValueError, "shape"),
    (logits_call, "base_logsumexp", ACTIONS, TypeError, "int64"),
    (logits_call, "row_mask", torch.ones(5), ValueError, "bool"),
    (logits_call, "row_mask", torch.ones(4, dtype=torch.bool), ValueError, "shape"),
    (logits_call, "row_mask", torch.ones(5, dtype=torch.bool, device=META), ValueError, "meta"),
    (logits_call, "backend", "tritton", ValueError, "torch, triton, cpu, cuda"),
    (linear_call, "adapter_hidden", torch.zeros(8), ValueError, "shape"),
    (linear_call, "base_hidden", torch.zeros(5, 7), ValueError, "equal"),
    (linear_call, "base_hidden", torch.zeros(5, 8, requires_grad=True), ValueError, "frozen"),
    (linear_call, "weight", torch.zeros(13, 7), ValueError, "hidden size is 8"),
    (linear_call, "weight", torch.zeros(0), ValueError, "ZeRO-3"),
    (linear_call, "weight", torch.zeros(0, 8), ValueError, "ZeRO-3"),
    (linear_call, "weight", torch.zeros(13, 8, device=META), ValueError, "meta"),
    (linear_call, "weight", torch.zeros(13, 8, requires_grad=True), ValueError, "frozen"),
    (linear_call, "bias", torch.zeros(12), ValueError, "shape"),
    (linear_call, "bias", torch.zeros(13, requires_grad=True), ValueError, "frozen"),
    (linear_call, "bias", torch.zeros(13, device=META), ValueError, "meta"),
    (linear_call, "actions", ACTIONS + 13, ValueError, "vocabulary of 13"),
    (linear_call, "adapter_coef", 0.0, ValueError, "adapted stream"),
    (linear_call, "logit_scale", float("nan"), ValueError, "finite"),
    (linear_call, "workspace_mb", 0, ValueError, "positive"),
    (linear_call, "backend", "gpu", ValueError, "torch, triton, cpu, cuda"),
    (sequence_call, "q_action", torch.zeros(3, 3), ValueError, "shape"),
    (sequence_call, "q_action", torch.zeros(9, dtype=torch.int64), TypeError, "int64"),
    (sequence_call, "value", torch.zeros(8), ValueError, "shape"),
    (sequence_call, "sequence_offsets", SEQUENCES[:-1], ValueError, "2B \\+ 1"),
    (sequence_call, "sequence_offsets", SEQUENCES + 1, ValueError, "from 0 to 9"),
    (sequence_call, "sequence_offsets", torch.tensor([0, 5, 3, 7, 9]), ValueError, "rise"),
    (sequence_call, "sequence_offsets", torch.tensor([0, 5, 12]), ValueError, "from 0 to 9"),
    (sequence_call, "sequence_offsets", SEQUENCES.float(), TypeError, "float32"),
    (sequence_call, "bootstrap", "last", ValueError, "next.*current"),
    (sequence_call, "length_normalization", "mean", ValueError, "none.*completion.*padded"),
    (sequence_call, "num_pairs", -1, ValueError, "-1"),
    (sequence_call, "num_actions", float("nan"), ValueError, "nan"),
    (sequence_call, "gamma", float("nan"), ValueError, "finite"),
    (sequence_call, "chi2_coef", float("inf"), ValueError, "finite"),
]


@pytest.mark.parametrize(
    "call, name, value, error, says", BAD_ARGUMENTS,
    ids=[f"{i}-{row[0].__name__}-{row[1]}" for i, row in enumerate(BAD_ARGUMENTS)],
)
def test_a_bad_argument_is_named(call, name, value, error, says):
    with pytest.raises(error, match=rf"(?s)({name}.*{says})|({says}.*{name})"):
        call(**{name: value})


def test_padded_normalization_needs_the_length():
    with pytest.raises(ValueError, match="padded_length"):
        sequence_call(length_normalization="padded")


def test_statistics_need_the_base_logits():
    with pytest.raises(ValueError, match=r"return_statistics.*base_logsumexp"):
        linear_call(return_statistics=True, base_logsumexp=torch.zeros(5))


def test_an_id_outside_the_vocabulary_may_stand_in_a_masked_row():
    """Padding of −100 or an image token where nothing is scored is nobody's error."""
    mask = torch.tensor([True, False, True, True, False])
    actions = torch.tensor([1, -100, 2, 3, 500])
    out = logits_call(actions=actions, row_mask=mask)
    assert not out.q_action[~mask].any()
    with pytest.raises(ValueError, match="actions holds 500"):
        logits_call(actions=actions, row_mask=mask | (actions == 500))


# --- choice of backend --------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_the_package_run_says_what_was_compiled_and_why_not(capsys, monkeypatch):
    report = {"cpu": {"compiler": "g++ 12", "instruction_sets": ["avx2", "portable"]}}
    monkeypatch.setattr(native, "build_report", lambda: report)
    monkeypatch.setattr(native, "unavailable_reason", {"cpu": None, "cuda": "no nvcc"}.get)
    runpy.run_module("qadapter_kernels", run_name="__main__")
    taken = native.library("cpu").qadapter_cpu_isa().decode()
    code = f"code for avx2, portable; here {taken} is taken; built with g++ 12"
    assert capsys.readouterr().out == f"cpu: {code}\ncuda: no nvcc\n"


def test_backends_says_what_is_there_and_why():
    rows = {row.name: row for row in backends()}
    assert set(rows) == {"torch", "triton", "cpu", "cuda"}
    assert rows["torch"].available and all(row.reason for row in rows.values())
    assert sum("cpu" in row.default_for for row in rows.values()) == 1
    for name in CPU_BACKENDS:
        assert "cpu" in rows[name].devices


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_serving_says_what_select_takes(device):
    rows = {row.operator: row for row in serving(device)}
    assert tuple(rows) == dispatch.OPERATORS and rows.pop("sample").device == device
    taken = dispatch.default(device).NAME
    assert {row.backend for row in rows.values()} == {taken}
    for row in rows.values():
        assert row.is_fallback == (taken != dispatch.PREFERENCE.get(device, ("torch",))[0])
        assert ("not " in row.reason) == row.is_fallback


def test_serving_says_what_was_passed_over_and_why(monkeypatch):
    reasons = {"triton": "too old", "cuda": None}
    for name, reason in reasons.items():
        monkeypatch.setattr(
            dispatch.load(name), "unavailable_reason", lambda device, reason=reason: reason
        )
    rows = {row.operator: row[2:] for row in serving("cuda")}
    sample = rows.pop("sample")
    assert rows.pop("linear_state_scores") == ("torch", True, "not triton: too old")
    assert set(rows.values()) == {("cuda", True, "not triton: too old")}
    assert sample == (None, True, "not triton: too old")  # only Triton has a sampler
    reasons["triton"] = None
    monkeypatch.setattr(dispatch.load("triton"), "unavailable_reason", lambda device: None)
    assert {row[2:] for row in serving("cuda")} == {("triton", False, "the first choice")}
    assert serving("cpu")[-1][2:] == (None, False, "no kernel for cpu tensors: PyTorch's own")


def test_serving_under_a_forced_backend(monkeypatch):
    variable = dispatch.ENVIRONMENT_VARIABLE
    monkeypatch.setenv(variable, "torch")
    *rows, sample = serving("cpu")
    assert {row[2:] for row in rows} == {("torch", True, f"{variable} forces it")}
    assert sample.backend is None and not sample.is_fallback  # it is not chosen by the variable
    monkeypatch.setenv(variable, "cuda")
    scores = next(row for row in serving("cuda") if row.operator == "linear_state_scores")
    assert scores.backend == "torch" and scores.reason.startswith("cuda has no kernel for it (")
    assert "QADAPTER_BACKEND forces it, and it can't: " in serving("cpu")[0].reason


def test_a_forced_backend_that_cannot_serve_says_why(monkeypatch):
    with pytest.raises(RuntimeError, match="'cuda' can't serve cpu tensors: "):
        logits_call(backend="cuda")
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(RuntimeError, match="'cuda' can't serve cpu tensors: "):
        logits_call()
    logits_call(backend="torch")  # the argument goes first


@pytest.mark.skipif("cpu" not in CPU_BACKENDS, reason="the CPU backend was not built")
def test_float64_is_served_by_torch():
    x = torch.zeros(2, 3, dtype=torch.float64)
    assert dispatch.select(x).NAME == "torch" and dispatch.select(x.float()).NAME == "cpu"
    with pytest.raises(RuntimeError, match="float64"):
        dispatch.select(x, "cpu")
