"""One rank of the vocabulary-parallel tests; test_shards.py starts them.

Every check runs on all ranks: the head's rows are shared out over them, and what comes back is held
against the whole head on the same inputs. Shapes: N rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from cases import (
    COEFFICIENTS,
    CPU_BACKENDS,
    DTYPES,
    LinearCase,
    Result,
    bits,
    check_linear,
    error,
    linear_case,
    linear_definition,
    linear_ours,
)
from ranks import alike, report
from torch import distributed

from qadapter.objective import ObjectiveConfig, linear_q_adapter_loss
from qadapter_kernels import linear_action_logit, linear_logsumexp, linear_soft_value
from qadapter_kernels.shards import Collectives

EXACT = 1e-10
"""What float64 may be off by (the design's facts)."""


def bounds(vocab: int, empty: bool = False) -> tuple[int, int]:
    """This rank's first row and the one after its last: uneven shards. ``empty``: the second rank's
    has none."""
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    parts = [vocab * (r + 1) * (r + 2) // (ranks * (ranks + 1)) for r in range(-1, ranks)]
    if empty:
        parts[1] = parts[2]
    return parts[rank], parts[rank + 1]


def of_shard(case: LinearCase, **options) -> tuple[LinearCase, dict]:
    """This rank's part of a case, and the arguments that say so."""
    start, end = bounds(len(case.weight), **options)
    bias = None if case.bias is None else case.bias[start:end]
    shard = case._replace(weight=case.weight[start:end], bias=bias)
    return shard, {"group": distributed.group.WORLD, "vocab_start": start}


def ours(case: LinearCase, backend: str | None = None, empty: bool = False, **options) -> Result:
    """Of the shards; the same bits everywhere."""
    shard, where = of_shard(case, empty=empty)
    result = linear_ours(shard, backend, **where, **options)
    assert_alike(result)
    return result


def assert_alike(tensors) -> None:
    assert alike([bits(x).tolist() for x in tensors]), "ranks differ"


def assert_equal(result, expected, tolerance: float = EXACT) -> None:
    for name, x, y in zip(expected._fields, result, expected, strict=True):
        off = error(x, y).max() if x.numel() else 0.0
        assert off <= tolerance, f"{name}: off by {off:.3e}"


def double(case: LinearCase) -> LinearCase:
    return LinearCase(*(
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in case
    ))


def call(case: LinearCase, hidden: torch.Tensor | None = None, **options):
    """The operator on this rank's part of a case."""
    shard, where = of_shard(case)
    return linear_soft_value(
        shard.adapter_hidden if hidden is None else hidden, shard.base_hidden, shard.weight,
        shard.actions, **shard.coef._asdict(), bias=shard.bias, logit_scale=shard.logit_scale,
        **where, **options,
    )


# --- the checks -------------------------------------------------------------------------------


def float64_is_one_process_to_1e_10():
    for name, coef in COEFFICIENTS.items():
        for vocab, empty in ((130, False), (67, True), (3, False)):
            case = double(linear_case(
                rows=9, vocab=vocab, coef=coef, bias=name != "q", logit_scale=0.5
            ))
            assert_equal(ours(case, empty=empty), linear_definition(case))


def every_backend_and_dtype_keeps_the_usual_tolerance():
    for backend in CPU_BACKENDS:
        for dtype in DTYPES:
            for name, coef in COEFFICIENTS.items():
                bias = name in ("q", "policy_dial")
                case = linear_case(rows=9, vocab=515, dtype=dtype, coef=coef, bias=bias,
                                   logit_scale=0.25 if bias else 1.0)
                result = ours(case, backend, workspace_mb=0.002 if bias else 512)
                assert result.grad.dtype == dtype
                check_linear(result, case)


def statistics_are_one_process():
    for empty in (False, True):
        case = double(linear_case(rows=7, vocab=131, bias=True, coef=COEFFICIENTS["policy_dial"]))
        case.bias[bounds(131)[0] : 131 : 5] = -torch.inf
        distributed.broadcast(case.bias, 0)
        mask = torch.tensor([True] * 6 + [False])
        wanted = {"row_mask": mask, "return_statistics": True}
        shard, where = of_shard(case, empty=empty)
        (soft, statistics), (whole, expected) = (
            linear_soft_value(
                case.adapter_hidden, case.base_hidden, x.weight, case.actions,
                **case.coef._asdict(), bias=x.bias, **options,
            )
            for x, options in ((shard, {**where, **wanted}), (case, wanted))
        )
        assert_equal(soft, whole)
        assert_equal(statistics, expected)
        assert all(x[-1] == 0 for x in (*soft, *statistics))
        assert_alike((*soft, *statistics))


def statistics_at_the_edges():
    """Streams without a token in common, without any, and on one rank alone."""
    sizes = [None] * distributed.get_world_size()
    distributed.all_gather_object(sizes, bounds(40))
    first = slice(*sizes[0])
    for excluded in ("here", "elsewhere", "all"):
        case = double(linear_case(rows=4, vocab=40, bias=True, coef=COEFFICIENTS["policy"]))
        bias = torch.zeros(40, dtype=torch.float64)
        if excluded == "here":
            bias[first] = -torch.inf
        elif excluded == "elsewhere":
            bias[first.stop :] = -torch.inf
        else:
            bias[:] = -torch.inf
        case = case._replace(bias=bias)
        shard, where = of_shard(case)
        found = [
            linear_soft_value(
                case.adapter_hidden, case.base_hidden, x.weight, case.actions,
                **case.coef._asdict(), bias=x.bias, return_statistics=True, **options,
            )
            for x, options in ((shard, where), (case, {}))
        ]
        for ours, theirs in zip(*found, strict=True):
            assert_equal(ours, theirs)


def excluded_tokens_and_rows():
    """−inf on a whole shard, at an action, and everywhere; a hidden state of NaN stays one."""
    size = 60
    for excluded in (range(size // 2, size), range(0, size, 3), range(size)):
        for name in ("policy", "q"):
            case = double(linear_case(rows=8, vocab=size, bias=True, coef=COEFFICIENTS[name]))
            case.bias[list(excluded)] = -torch.inf
            whole = linear_ours(case, "torch")
            assert not whole.grad.isnan().any()
            assert_equal(ours(case), whole)
            assert_equal(ours(case, empty=True), whole)
    case = double(linear_case(rows=4, vocab=size))
    case.adapter_hidden[1] = torch.nan
    result, whole = ours(case), linear_ours(case, "torch")
    for x, y in zip(result, whole, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=EXACT, equal_nan=True)


def a_certain_policy_keeps_its_digits():
    """g = −v and π̃(a) ≈ 1: the gradient is a difference that has to be taken before rounding."""
    for dtype in DTYPES:
        case = linear_case(rows=6, vocab=200, dtype=dtype, coef=COEFFICIENTS["policy"], scale=2.0)
        columns = case.actions.clamp_min(0)
        case.adapter_hidden.copy_(12 * case.weight[columns])
        case = case._replace(grad_q=torch.ones(6), grad_v=-torch.ones(6))
        case.actions[2] = 5
        for backend in CPU_BACKENDS:
            check_linear(ours(case, backend), case)


def an_offset_of_all_logits_changes_nothing_but_the_value():
    for offset in (1e4, -1e4):
        case = linear_case(rows=5, vocab=90, bias=True, coef=COEFFICIENTS["policy"])
        moved = case._replace(bias=case.bias + offset)
        result, expected = ours(moved), linear_ours(moved, None)
        # Logits of 10⁴ are rounded to 5e-4, each shard's log-sum-exp once more.
        for x, y in zip(result, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=4e-3)
        ones = moved._replace(grad_q=torch.zeros(5), grad_v=torch.ones(5),
                              weight=torch.ones_like(moved.weight))
        total = ours(ones).grad  # Σ π̃·1 = 1
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)


def padded_vocabularies():
    """Rows beyond the vocabulary, excluded by a bias of −inf, lie on the last ranks."""
    case = double(linear_case(rows=6, vocab=50, bias=True))
    garbage = torch.full((78, case.weight.shape[1]), 7.0, dtype=torch.float64)
    padded = case._replace(
        weight=torch.cat([case.weight, garbage]),
        bias=torch.cat([case.bias, torch.full((78,), -torch.inf, dtype=torch.float64)]),
    )
    assert_equal(ours(padded), linear_definition(case))


def a_cached_base():
    case = double(linear_case(rows=7, vocab=77, bias=True, coef=COEFFICIENTS["policy"]))
    shard, where = of_shard(case)
    found = []
    for x, options in ((shard, where), (case, {})):
        head = {"bias": x.bias, "logit_scale": x.logit_scale, **options}
        actions = case.actions.clamp_min(0)
        numbers = {
            "base_action_logit": linear_action_logit(case.base_hidden, x.weight, actions, **head),
            "base_logsumexp": linear_logsumexp(case.base_hidden, x.weight, actions, **head),
        }
        numbers["without"] = linear_logsumexp(case.base_hidden, x.weight, **head)
        hidden = case.adapter_hidden.clone().requires_grad_()
        soft = linear_soft_value(
            hidden, None, x.weight, case.actions, **case.coef._asdict(), **head,
            base_action_logit=numbers["base_action_logit"],
            base_logsumexp=numbers["base_logsumexp"],
        )
        (soft.value + soft.q_action).sum().backward()
        found.append((*numbers.values(), *soft, hidden.grad))
    assert_alike(found[0])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=EXACT)
    known = numbers["base_logsumexp"]  # given beside the hidden states
    assert_equal(
        ours(case, base_logsumexp=known), linear_ours(case, None, base_logsumexp=known)
    )


def the_preference_loss_is_one_process():
    case = double(linear_case(rows=24, vocab=61, bias=True))
    shard, where = of_shard(case)
    ids = torch.arange(24).reshape(4, 6) * 7 % 61
    mask = ids % 3 > 0
    config = ObjectiveConfig(alpha_0=0.3, alpha_tilde=0.5)
    found = []
    for x, options in ((shard, where), (case, {})):
        hidden = case.adapter_hidden.reshape(4, 6, -1).clone().requires_grad_()
        out = linear_q_adapter_loss(
            hidden, case.base_hidden.view_as(hidden), x.weight, ids, mask, config, bias=x.bias,
            return_statistics=True, **options,
        )
        out.loss.backward()
        found.append((out.loss.detach(), out.token_rewards, *out.statistics, hidden.grad))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=EXACT)


def no_gradient_is_asked_for():
    case = double(linear_case(rows=4))
    with torch.no_grad():
        soft = call(case, case.adapter_hidden.clone().requires_grad_())
    assert not soft.value.requires_grad
    with torch.inference_mode():
        assert_equal(call(case), soft)
    assert call(double(linear_case(rows=0))).value.shape == (0,)


def autocast_rounds_as_one_process():
    rounded = linear_case(rows=6, vocab=120, dtype=torch.bfloat16, coef=COEFFICIENTS["policy"])
    tensors = (x.float() for x in (rounded.adapter_hidden, rounded.base_hidden, rounded.weight))
    with torch.autocast("cpu", torch.bfloat16):
        result = ours(LinearCase(*tensors, *rounded[3:]))
    check_linear(result, rounded)


def compiled_is_eager_to_the_bit():
    case = linear_case(rows=5, vocab=70, dtype=torch.bfloat16, bias=True)
    shard, where = of_shard(case)

    def value(hidden):
        soft = linear_soft_value(
            hidden, case.base_hidden, shard.weight, case.actions, **case.coef._asdict(),
            bias=shard.bias, **where,
        )
        lse = linear_logsumexp(case.base_hidden, shard.weight, bias=shard.bias, **where)
        logit = linear_action_logit(
            case.base_hidden, shard.weight, case.actions, bias=shard.bias, **where
        )
        return soft.value.sum() + soft.q_action.sum() + (lse + logit).sum()

    found = []
    for function in (value, torch.compile(value, fullgraph=True, backend="aot_eager")):
        hidden = case.adapter_hidden.clone().requires_grad_()
        out = function(hidden)
        out.backward()
        found.append((out.detach(), hidden.grad))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


def two_collectives_forward_one_backward():
    case = linear_case(rows=6, vocab=120)
    hidden = case.adapter_hidden.clone().requires_grad_()
    profiles = []
    for _ in range(2):
        profiles.append(torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
        ))
    with profiles[0]:
        soft, _ = call(case, hidden, return_statistics=True)
    with profiles[1]:
        (soft.value + soft.q_action).sum().backward()
    forward, backward = (
        [4 * math.prod(event.input_shapes[0]) for event in profile.events()
         if event.name == "gloo:all_reduce"]
        for profile in profiles
    )
    expected = Collectives.of(*hidden.shape, cached_base=False, statistics=True)
    assert (forward, backward) == ([*expected[:2]], [expected.gradient])


def what_does_not_fit_is_named_on_every_rank():
    case = linear_case(rows=4, vocab=50)
    start, end = bounds(50)
    group = distributed.group.WORLD
    wrong = (
        ({"actions": torch.tensor([0, 50, 1, -1])}, {}, "actions holds 50, outside the vocabulary"),
        ({"actions": torch.tensor([0, -2, 1, -1])}, {}, "actions holds -2, outside the vocabulary"),
        ({}, {"vocab_start": 0}, "do not make one vocabulary"),
        ({"weight": case.weight[start : max(start, end - 1)]}, {}, "do not make one vocabulary"),
        ({}, {"group": None, "vocab_start": 3}, "vocab_start is 3, but there is no group"),
        ({}, {"group": "world"}, "group must be a torch.distributed process group"),
        ({}, {"vocab_start": -1}, "vocab_start must not be negative"),
        ({}, {"vocab_start": 1.0}, "vocab_start must be an integer"),
        ({"weight": case.weight[start:end, :-1]}, {}, "the hidden size is"),
    )
    for change, options, says in wrong:
        arguments = {"weight": case.weight[start:end], "actions": case.actions, **change}
        options = {"group": group, "vocab_start": start, **options}
        try:
            linear_soft_value(
                case.adapter_hidden, case.base_hidden, **arguments, alpha_0=1.0, **options
            )
        except (TypeError, ValueError) as raised:
            assert says in str(raised), str(raised)
        else:
            raise AssertionError(f"nothing raised: {says}")
    try:
        linear_action_logit(case.base_hidden, case.weight[start:end], torch.tensor([0, 1, 2, 99]),
                            group=group, vocab_start=start)
    except ValueError as raised:
        assert "actions holds 99" in str(raised)
    else:
        raise AssertionError("nothing raised")


def a_group_of_some_of_the_ranks():
    """Two groups of half the ranks each: a model on two ranks, twice."""
    ranks = list(range(distributed.get_world_size()))
    half = len(ranks) // 2
    groups = [distributed.new_group(part) for part in (ranks[:half], ranks[half:])]
    rank = distributed.get_rank()
    case = double(linear_case(rows=5, vocab=44, seed=rank // half))
    place, size = rank % half, -(-44 // half)
    start, end = place * size, min(44, (place + 1) * size)
    shard = case._replace(weight=case.weight[start:end])
    result = linear_ours(shard, None, group=groups[rank // half], vocab_start=start)
    assert_equal(result, linear_definition(case))


def the_ops_are_what_torch_expects():
    from qadapter_kernels import library

    case = linear_case(rows=5, vocab=26, hidden=8, bias=True)
    shard, where = of_shard(case)
    name, start = where["group"].group_name, where["vocab_start"]
    coef = (*COEFFICIENTS["policy_dial"],)
    inputs = (case.adapter_hidden.clone().requires_grad_(), case.base_hidden, shard.weight)
    arguments = (
        *inputs, case.actions, shard.bias, None, *coef, 0.5, 1 << 20, True, True, "", name, start,
    )
    torch.library.opcheck(library.linear_soft_value, arguments)
    torch.library.opcheck(library.linear_soft_value_backward, (
        case.adapter_hidden, shard.weight, case.actions, case.grad_q, case.grad_v,
        torch.full((5,), -0.5), 0.7, torch.bfloat16, name, start,
    ))


CHECKS: tuple[Callable[[], None], ...] = (
    float64_is_one_process_to_1e_10, every_backend_and_dtype_keeps_the_usual_tolerance,
    statistics_are_one_process, statistics_at_the_edges, excluded_tokens_and_rows,
    a_certain_policy_keeps_its_digits, an_offset_of_all_logits_changes_nothing_but_the_value,
    padded_vocabularies, a_cached_base, the_preference_loss_is_one_process,
    no_gradient_is_asked_for, autocast_rounds_as_one_process,
    two_collectives_forward_one_backward, what_does_not_fit_is_named_on_every_rank,
    a_group_of_some_of_the_ranks,
)
SLOW = compiled_is_eager_to_the_bit, the_ops_are_what_torch_expects
"""Run where there are two ranks only: how many there are means nothing to them."""


def checks_of(world_size: int) -> dict[str, Callable[[], None]]:
    return {check.__name__: check for check in (*CHECKS, *(SLOW if world_size == 2 else ()))}


if __name__ == "__main__":
    report(checks_of(int(os.environ["WORLD_SIZE"])), Path(sys.argv[1]))
